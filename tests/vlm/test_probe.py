"""What the question looks at, layer by layer, against the model's own attention maps."""

import pytest
import torch

from vlm_prune.pruning.received import from_rows
from vlm_prune.vlm.probe import question_rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_layer_attends_as_its_own_maps_say(side, llava, images, make_inputs):
    inputs = make_inputs([(1, "Is there a 7?"), (1, "What color is the star?")], images, side)
    ours = [from_rows(rows, rows.columns) for rows in question_rows(llava, inputs)]
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    llava.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = llava(**inputs, position_ids=position_ids, output_attentions=True).attentions
    finally:
        llava.set_attn_implementation("sdpa")
    is_image = inputs["input_ids"] == llava.config.image_token_id
    assert len(ours) == len(maps) == 6
    for received, weights in zip(ours, maps, strict=True):
        for row in range(2):
            last = int(is_image[row].nonzero()[-1])
            asked = inputs["attention_mask"][row].bool()
            asked[: last + 1] = False
            expected = weights[row, :, asked][:, :, is_image[row]].mean((0, 1))
            torch.testing.assert_close(received[row], expected, atol=1e-6, rtol=1e-4)
