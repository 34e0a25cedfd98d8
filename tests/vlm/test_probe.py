"""What the question looks at, layer by layer, against the model's own attention maps."""

import threading

import pytest
import torch

from vlm_prune.learners.model import REQUIRED
from vlm_prune.pruning.received import from_rows
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.layout import alike, image_columns, image_ordinals, image_rows
from vlm_prune.vlm.probe import question_rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_layer_attends_as_its_own_maps_say(side, llava, images, make_inputs):
    inputs = make_inputs([(1, "Is there a 7?"), (1, "What color is the star?")], images, side)
    ours = [from_rows(rows, rows.columns) for (rows,) in question_rows(llava, inputs)]
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
            own_rows = inputs["attention_mask"][row].bool()
            own_rows[: last + 1] = False
            expected = weights[row, :, own_rows][:, :, is_image[row]].mean((0, 1))
            torch.testing.assert_close(received[row], expected, atol=1e-6, rtol=1e-4)


def test_what_other_threads_run_meanwhile_is_not_read(llava_tiny):
    model, inputs = llava_tiny.model, llava_tiny.inputs([[([0], "Is there a 7?")]])
    expected = [from_rows(rows, rows.columns) for (rows,) in question_rows(model, inputs)]
    other = llava_tiny.inputs([[([1, 2], "What color is the star?")]])

    def meanwhile(*_):
        hook.remove()
        thread = threading.Thread(target=lambda: model(**other))
        thread.start()
        thread.join()

    hook = model.model.language_model.layers[2].register_forward_pre_hook(meanwhile)
    ours = [from_rows(rows, rows.columns) for (rows,) in question_rows(model, inputs)]
    assert all(map(torch.equal, ours, expected))


@torch.no_grad()
def test_images_of_several_sizes_on_every_family(tiny):
    """From pixels and from images encoded beforehand; maps are those of the model's own forward."""
    prompts = [[([0], "Is there a 7?")], [([1, 2], "What color is the star?")]]
    inputs, family = tiny.inputs(prompts), family_of(tiny.model)
    if (REQUIRED | {"softmax attention in every decoder layer"}) & family.lacks:
        with pytest.raises(InputError, match="layer 0 has linear_attention|of their own, which"):
            next(question_rows(tiny.model, inputs))
        return
    tiny.model.set_attn_implementation("eager")
    try:
        maps = tiny.model(**inputs, output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation("sdpa")
    names = ("input_ids", "pixel_values", *family.image_inputs)
    images = family.encode(**{name: inputs[name] for name in names if name in inputs})
    is_image = inputs["input_ids"] == family.image_token
    ordinal = image_ordinals(is_image, images.counts)
    rows = image_rows(ordinal, len(images.counts))
    columns = image_columns(ordinal, images.counts)
    mask = inputs["attention_mask"]
    encoded = {
        "input_ids": inputs["input_ids"], "attention_mask": mask,
        "position_ids": family.positions(inputs["input_ids"], mask, images.inputs) * mask,
        "mm_encoder_outputs": family.output(images.projected, images.deepstack),
        **family.arguments(inputs["input_ids"], mask, images.inputs),
    }  # fmt: skip
    for given in (inputs, encoded):
        layers = list(question_rows(tiny.model, given))
        assert len(layers) == len(maps) == 4
        for groups, weights in zip(layers, maps, strict=True):
            for own, found in zip(alike(images.counts), groups, strict=True):
                for image, received in zip(own, from_rows(found, found.columns), strict=True):
                    row = int(rows[image])
                    reads = mask[row].bool()
                    reads[: int(is_image[row].nonzero()[-1]) + 1] = False
                    expected = weights[row, :, reads][:, :, columns[image]].mean((0, 1))
                    torch.testing.assert_close(received, expected, atol=1e-6, rtol=1e-4)
