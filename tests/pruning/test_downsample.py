"""Videos of smaller frames, against frames that are shrunk and cut into patches by other code."""

import numpy as np
import pytest
import torch
from tiny_families import Tiny
from torch.nn.functional import avg_pool2d, interpolate

from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of

pytest.importorskip("torchvision")
ROWS = [[(["a"], "Is it red?")]]  # six frames of 84 x 84
KINDS = ["qwen2_5_vl", "qwen3_vl", "llava_onevision"]


def shrunk(frames, side):
    return interpolate(frames, (side, side), mode="bicubic", antialias=True)


@torch.no_grad()
def of_smaller_frames(tiny, inputs):
    """Features of one token of each frame, and those that deepstack adds."""
    family, pixels = family_of(tiny.model), inputs["pixel_values_videos"]
    if (
        tiny.name == "llava_onevision"
    ):  # 28 x 28 pixels: four patches, of which one token is the mean
        tower = tiny.model.model.vision_tower
        options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
        seen = tower(shrunk(pixels[0], 28), **options).hidden_states[-1]
        grid = tiny.model.model.multi_modal_projector(seen).transpose(1, 2).unflatten(2, (2, 2))
        return avg_pool2d(grid, 2).flatten(1), []
    processor = tiny.processor.video_processor
    frames = torch.tensor(np.moveaxis(tiny.clips["a"], -1, 1)).float() / 255
    mean, std = (
        torch.tensor(own)[:, None, None] for own in (processor.image_mean, processor.image_std)
    )
    frames = shrunk((frames - mean) / std, 28)[None]
    patches, *grid = processor.patchify(frames, 14, 2, 2)
    output = family.encode(
        pixel_values_videos=patches[0], video_grid_thw=torch.tensor([grid]), input_ids=None
    )
    return output.projected[0], [layer[0] for layer in output.deepstack]


@pytest.mark.parametrize("name", KINDS)
def test_the_language_model_gets_what_the_tower_makes_of_smaller_frames(name):
    """With the positions of the tokens in the middle of the whole frames."""
    tiny = Tiny(name)
    inputs, family, seen = tiny.inputs(ROWS), family_of(tiny.model), []

    def note(module, args, kwargs):
        seen.append(kwargs)

    def run():
        hook = family.decoder.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            tiny.model(**inputs)
        hook.remove()
        return seen.pop()

    whole = run()
    with build("downsample", budget="1/frame")(tiny.model) as trace:
        given = run()
    features, deep = of_smaller_frames(tiny, inputs)
    frames, rows, columns = tiny.encode(inputs).video_grids[0]
    middle = rows // 2 * columns + columns // 2
    assert trace.tower_flops[0] < tiny.encode(inputs).flops[0]
    assert trace.kept[0].tolist() == [rows * columns * f + middle for f in range(frames)]
    ids = inputs["input_ids"][0]
    shown = (ids == family.video_token).nonzero()[:, 0]
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[shown] = False
    stays[shown[trace.kept[0]]] = True
    is_video = ids[stays] == family.video_token
    torch.testing.assert_close(given["inputs_embeds"][0, is_video], features, atol=1e-5, rtol=1e-4)
    assert torch.equal(
        given["inputs_embeds"][0, ~is_video], whole["inputs_embeds"][0, stays][~is_video]
    )
    assert len(given.get("deepstack_visual_embeds") or []) == len(deep)
    for ours, theirs in zip(given.get("deepstack_visual_embeds") or [], deep, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    if family.mrope:
        assert torch.equal(given["position_ids"][-3:, 0], whole["position_ids"][-3:, 0, stays])


def test_what_cannot_be_shrunk_is_named():
    tiny = Tiny("llava_onevision")
    inputs = tiny.inputs(ROWS)
    with (
        build("downsample", budget=5)(tiny.model),
        torch.no_grad(),
        pytest.raises(
            InputError, match=r"budget 5 is below one token for each of the 6 frames .* 1/frame"
        ),
    ):
        tiny.model(**inputs)
    with pytest.raises(InputError, match="give the model pixels, not what was encoded"):
        build("downsample", budget=9)(tiny.model, vision=tiny.encode(inputs))
    for name in ("llava_next_video", "internvl", "smolvlm"):
        with pytest.raises(InputError, match=f"takes smaller images, which {name} models lack"):
            build("downsample", budget=9)(Tiny(name).model)
