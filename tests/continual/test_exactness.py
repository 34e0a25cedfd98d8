"""What must not change: outputs of split, fresh and merged models, weights, and state dicts."""

import copy

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

from vlm_prune.continual import clip as clip_module
from vlm_prune.continual.attention import fuse, sites, split
from vlm_prune.continual.clip import check_activation, load_clip
from vlm_prune.continual.config import Placement, Recipe
from vlm_prune.continual.delta import Delta, Factors
from vlm_prune.continual.layer import GatedLoRA
from vlm_prune.continual.methods import Context
from vlm_prune.continual.methods.codyra import CoDyRA
from vlm_prune.continual.model import insert, remove
from vlm_prune.vlm.common.errors import InputError


@torch.no_grad()
def outputs(clip, batch):
    return clip.encode_image(batch[0]), clip.encode_text(batch[1])


def make_layer(base, number):
    generator = torch.Generator().manual_seed(number)
    return GatedLoRA(base, 4, torch.randn(4, generator=generator), generator)


def scatter(layers):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.copy_(0.1 * torch.randn(layer.B.shape, generator=generator))
            layer.gate[::2] = 0


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_split_attention_gives_the_same_outputs_and_fuses_back_without_loss(any_clip, batch):
    before, weights = outputs(any_clip, batch), copy.deepcopy(any_clip.model.state_dict())
    split(any_clip.model)
    for a, b in zip(outputs(any_clip, batch), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    fuse(any_clip.model)
    after = any_clip.model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert same(outputs(any_clip, batch), before)


def test_every_block_has_six_sites_in_each_tower(any_clip):
    split(any_clip.model)
    found = list(sites(any_clip.model).values())
    for tower in ("vision", "text"):
        layers = {site.layer for site in found if site.tower == tower}
        assert len(layers) >= 2
        for layer in layers:
            kinds = [s.module for s in found if (s.tower, s.layer) == (tower, layer)]
            assert sorted(kinds) == sorted(["q", "k", "v", "o", "in", "out"])


def test_fresh_adapters_give_the_base_bit_for_bit(any_clip, batch):
    split(any_clip.model)
    # frozen as it will be: torch's attention rounds otherwise where weights are not
    any_clip.model.requires_grad_(False)
    before = outputs(any_clip, batch)
    insert(any_clip, Placement(), make_layer)
    assert same(outputs(any_clip, batch), before)


def test_merged_is_unmerged_and_unmerging_restores(any_clip, batch, tmp_path):
    weights = copy.deepcopy(any_clip.model.state_dict())
    layers = insert(any_clip, Placement(), make_layer)
    scatter(layers)
    apart = outputs(any_clip, batch)
    delta = Delta({name: Factors.of(layer, layer.gate) for name, layer in layers.items()})
    assert all(factors.rank == 2 for factors in delta.factors.values())
    remove(any_clip, layers, {name: f.matrix() for name, f in delta.factors.items()})
    merged = any_clip.model.state_dict()
    assert list(merged) == list(weights)
    for a, b in zip(outputs(any_clip, batch), apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert any(not torch.equal(merged[name], weights[name]) for name in weights)
    delta.save(tmp_path / "task.safetensors")
    Delta.load(tmp_path / "task.safetensors").apply(any_clip.model, -1)
    for name, tensor in any_clip.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)


def test_merging_sums_in_float32(clip):
    clip.model.bfloat16()
    layers = insert(clip, Placement("vision", ("q",)), make_layer)
    scatter(layers)
    name, layer = next(iter(layers.items()))
    exact = layer.base.weight.float() + (layer.B * layer.gate) @ layer.A
    change = {name: ((layer.B * layer.gate) @ layer.A).detach()}
    remove(clip, layers, change)
    split(clip.model)
    assert torch.equal(clip.model.get_submodule(name).weight, exact.bfloat16())


@pytest.fixture
def delta(clip):
    """A delta of three sites of the tower."""
    layers = insert(clip, Placement("vision", ("in", "q", "o")), make_layer)
    scatter(layers)
    found = Delta({name: Factors.of(layer, layer.gate) for name, layer in layers.items()})
    remove(clip, layers, {})
    return found


def test_a_delta_of_another_model_is_refused_and_changes_nothing(delta, make_clip):
    other = make_clip(width=48)
    weights = copy.deepcopy(other.model.state_dict())
    with pytest.raises(InputError, match="another model"):
        delta.apply(other.model)
    after = other.model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


DAMAGE = {
    "A of another width": lambda f: setattr(f, "A", f.A[:, :-1]),
    "B of another height": lambda f: setattr(f, "B", f.B[:-1]),
    "A of another rank": lambda f: setattr(f, "A", f.A[:-1]),
    "B of another rank": lambda f: setattr(f, "B", f.B[:, :-1]),
    "a gate of another rank": lambda f: setattr(f, "gate", f.gate[:-1]),
    "a vector": lambda f: setattr(f, "A", f.A[0]),
    "nan": lambda f: setattr(f, "B", f.B * torch.nan),
    "an infinite gate": lambda f: setattr(f, "gate", f.gate / 0),
    "whole numbers": lambda f: setattr(f, "A", f.A.long()),
    "a component that there is not": lambda f: setattr(f, "kept", f.kept + 100),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_delta_with_a_bad_factor_is_refused_and_changes_nothing(kind, delta, clip, tmp_path):
    """The bad site is the last one, so that changes before it would show."""
    DAMAGE[kind](list(delta.factors.values())[-1])
    weights = copy.deepcopy(clip.model.state_dict())
    with pytest.raises(InputError) as caught:
        delta.apply(clip.model)
    assert "\n" not in str(caught.value)
    after = clip.model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    delta.save(tmp_path / "delta.safetensors")
    if "of another width" not in kind and "of another height" not in kind:
        with pytest.raises(InputError, match="is no readable delta of a task"):
            Delta.load(tmp_path / "delta.safetensors")


@pytest.mark.parametrize(
    "facts",
    [
        None,
        "null",
        "[1]",
        "{",
        "[" * 100_000,
        '{"name": ' * 100_000,
        '{"name": "../escaped"}',
        '{"name": 7}',
        '{"name": ""}',
        '{"name": 1e999}',
    ],
    ids=lambda f: str(f)[:9],
)
def test_a_file_that_is_no_delta_is_refused(facts, delta, tmp_path):
    path = tmp_path / "delta.safetensors"
    delta.save(path)
    tensors = load_file(path)
    save_file(tensors, path, None if facts is None else {"facts": facts})
    with pytest.raises(InputError, match="is no readable delta of a task") as caught:
        Delta.load(path)
    assert "\n" not in str(caught.value)
    for content in (b"", b"x" * 64, (1 << 50).to_bytes(8, "little"), path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no readable delta of a task"):
            Delta.load(path)
    with pytest.raises(InputError, match="is no readable delta of a task"):
        Delta.load(tmp_path)


def test_vit_b_16_has_4425984_trainable_parameters():
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    with torch.device("meta"):
        model = CLIP(**config)
    clip = clip_module.Clip(model, None, None, None)
    method = CoDyRA(rank=16)
    ids = torch.zeros(1, 77, dtype=torch.long)
    groups = method.begin_task(Context(clip, Recipe(), 0, ids, ids[:0]))
    assert sum(p.numel() for group in groups for p in group["params"]) == 4_425_984
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_425_984


def test_a_plain_gelu_build_of_openai_weights_is_refused():
    with pytest.raises(InputError, match="use 'ViT-B-16-quickgelu'"):
        load_clip("ViT-B-16", "openai")
    check_activation("ViT-B-16-quickgelu", "openai")
    check_activation("ViT-B-16", "laion2b_s34b_b88k")


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_clip("ViT-B-16", str(tmp_path / "weights.pt"))


def test_unknown_models_are_refused():
    with pytest.raises(InputError, match="no model 'ViT-B-61'"):
        load_clip("ViT-B-61")
    with pytest.raises(InputError, match="cannot load CLIP 'no/such-model'"):
        load_clip("no/such-model")


def test_a_saved_model_loads_in_its_own_library(any_clip, batch, tmp_path):
    any_clip.save(tmp_path / "model")
    loaded = load_clip(str(tmp_path / "model"))
    assert same(outputs(loaded, batch), outputs(any_clip, batch))
    assert list(loaded.model.state_dict()) == list(any_clip.model.state_dict())


def test_a_tokenizer_of_its_own_is_saved_with_the_model(clip, word_tokenizer, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    clip.config["text_cfg"]["hf_tokenizer_name"] = "tokenizer.json"
    word_tokenizer.save_pretrained(first)
    clip.save(first)
    load_clip(str(first)).save(second)
    tokens = load_clip(str(second)).tokenize(["a red disc."])
    assert tokens[0, :6].tolist() == word_tokenizer("a red disc.")["input_ids"]
    assert tokens.shape == (1, 16)


def test_a_placement_without_sites_is_refused(clip):
    with pytest.raises(InputError, match="did you mean 'vision'"):
        Placement("vison")
    with pytest.raises(InputError, match="each module once"):
        Placement(modules=())
    with pytest.raises(InputError, match="rank 99"):
        insert(clip, Placement(), lambda base, n: GatedLoRA(base, 99, None, torch.Generator()))
    assert not any("q_proj" in name for name in clip.model.state_dict())
