"""SigLIP and SigLIP 2: features as their own libraries have them, and a recipe that moves the vision blocks alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_prune.continual.attention import BLOCK
from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import make_method
from vlm_prune.continual.train import ContinualRun, train_tasks

SIGLIPS = ["open_clip siglip", "siglip", "siglip 2"]
pytestmark = pytest.mark.parametrize("any_clip", SIGLIPS, indirect=True)
WORDS = ["a photo of a red disc.", "a bar."]


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def test_scores_are_those_of_the_model_but_for_its_bias(any_clip):
    model, image = any_clip.model, any_clip.eval_transform(picture())[None]
    ids = any_clip.tokenize(WORDS)
    cosines = any_clip.encode_image(image) @ any_clip.encode_text(ids).T
    if any_clip.hugging_face:
        # the processors' own sizes go before those of the image processors inside
        sizes = {"patch_size": 8, "max_num_patches": 16} if "siglip2" in str(type(model)) else {}
        shown = any_clip.processor(
            images=[picture()], text=WORDS, return_tensors="pt", padding="max_length", truncation=True,
            max_length=ids.shape[1], padding_side="right", **sizes,
        )  # fmt: skip
        shown.pop("attention_mask", None)
        want = model(**shown).logits_per_image
        assert ids.tolist() == shown["input_ids"].tolist()
    else:
        output = model(image, ids)
        want = output[2] * output[0] @ output[1].T + output[3]
    found = any_clip.scale * cosines + model.logit_bias
    torch.testing.assert_close(found, want, rtol=1e-3, atol=0.5)
    # images are squeezed, not cut
    wide = Image.fromarray(np.hstack([np.array(picture())] * 2))
    assert any_clip.eval_transform(wide).shape == image.shape[1:]


def test_prompts_fill_the_whole_context(any_clip):
    """The text tower pools the last position, which is padding in all but the longest prompts."""
    assert (
        len({len(any_clip.tokenize([words])[0]) for words in ("a", "a photo of a red disc.")}) == 1
    )


@pytest.mark.parametrize("name", ["lora", "codyra", "keeplora"])
def test_the_recipe_moves_the_blocks_of_the_vision_tower_alone(name, any_clip, tasks, tmp_path):
    before = {n: t.clone() for n, t in any_clip.model.state_dict().items()}
    texts = any_clip.encode_texts(WORDS)
    method = make_method(name, rank=2, encoder="vision")
    recipe = Recipe(steps=2, batch=3, lr=1e-2)
    train_tasks(ContinualRun(tmp_path / "run", method, recipe, cpu=True), any_clip, tasks)
    after = any_clip.model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(n.startswith("vis") and BLOCK.fullmatch(n.rpartition(".")[0]) for n in changed)
    assert not any("logit" in n or "pool" in n or "head." in n for n in changed)
    assert torch.equal(any_clip.encode_texts(WORDS), texts)
    loaded = load_clip(str(tmp_path / "run" / "model")) if any_clip.hugging_face else None
    if loaded is not None:
        assert torch.equal(loaded.encode_texts(WORDS), texts)
        assert type(loaded.model) is type(any_clip.model)


def test_the_recipe_lowers_the_loss(any_clip, tasks, tmp_path):
    method = make_method("lora", rank=4, encoder="vision")
    recipe = Recipe(steps=20, batch=9, lr=3e-3, joint=False)
    train_tasks(ContinualRun(tmp_path / "run", method, recipe, cpu=True), any_clip, tasks[:1])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
