"""A model whose weights are adapted, quantized, offloaded or in another type is pruned as what it does.

The reference is the same model with the weights that it applies as plain tensors.
"""

import copy

import pytest
import tiny_families
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from tiny_families import Tiny, refused_on_images
from torch import nn

from vlm_prune.pruning import METHODS
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.projector import Affine, Projector

TURNS = [[([0], "Is there a 7?")], [([1, 2], "red?")]]
READING = ["zoo", "zoo-exact", "visionzip", "apet"]  # what the projector's layers do
EVERY = [*METHODS, "fastv+merge"]
SOME = [*READING, "none", "fopru", "cdpruner", "downsample", "adaptinfer", "dart", "sparsevlm"]


READS = "reads the table of its tower's positions without calling the module, which is on no device"
WORDS = "reads its word embeddings without calling the module, which is on no device"
NOT_OFFLOADED = {
    "idefics3": "moves embeddings to model.device, which is none",
    "glm4v": READS,
    "glm46v": READS,
    "gemma4": WORDS,
    "gemma4_sharing": WORDS,
}


def runs(model, tiny, names, inputs=None):
    """What each method that the family has keeps of each image, and the logits of its forward."""
    inputs, found = inputs or tiny.inputs(TURNS), {}
    for name in names:
        method = build(name, budget=6, **({"directions": 4} if name == "zoo" else {}))
        if refused_on_images(method, model):
            continue
        with method(model) as trace, torch.no_grad():
            logits = model(**inputs).logits
        found[name] = [indices.tolist() for indices in trace.kept], logits
    return found


def assert_alike(ours, theirs, **close):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name][0] == theirs[name][0], name
        torch.testing.assert_close(ours[name][1], theirs[name][1], **close, msg=name)


def projections(model):
    """Names of the projector's two linear layers, and the layers."""
    projector = family_of(model).projector
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in (projector.first, projector.second)}


@pytest.mark.parametrize("kind", ["cpu", pytest.param("disk", marks=pytest.mark.slow)])
def test_an_offloaded_model_is_pruned_as_the_model_in_memory(kind, tiny, tmp_path):
    """Every method gives the same to the last bit, whichever ran before it."""
    if tiny.name in NOT_OFFLOADED:
        pytest.skip(f"transformers itself {NOT_OFFLOADED[tiny.name]}")
    names = EVERY if tiny.name == "llava" or kind == "disk" else SOME
    plain = runs(tiny.model, tiny, names)
    model = copy.deepcopy(tiny.model)
    if kind == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert model.device.type == "meta"
    for order in (names, names[::-1]):
        assert_alike(runs(model, tiny, order), plain, atol=0, rtol=0)


def test_a_model_dispatched_over_cpu_and_disk_is_pruned_as_the_one_in_memory(llava_tiny, tmp_path):
    plain = runs(llava_tiny.model, llava_tiny, EVERY)
    model = copy.deepcopy(llava_tiny.model)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "disk"}
    for name, _ in model.model.language_model.named_children():
        places[f"model.language_model.{name}"] = "cpu"
    del places["model.language_model.layers"]
    for number in range(len(model.model.language_model.layers)):
        places[f"model.language_model.layers.{number}"] = ("disk", "cpu")[number % 2]
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert model.lm_head.weight.device.type == "meta"
    assert_alike(runs(model, llava_tiny, EVERY[::-1]), plain, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_on_the_projector_is_part_of_what_methods_see(tiny):
    """As merged weights; switched off and on again, and trained further, inside one process."""
    if not isinstance(family_of(tiny.model).projector, Projector):
        pytest.skip("a linear projector is called as it is")
    model, plain = copy.deepcopy(tiny.model), runs(tiny.model, tiny, READING)
    config = LoraConfig(r=4, target_modules=list(projections(model)), init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    for _ in range(2):
        merged = copy.deepcopy(adapted).merge_and_unload()
        ours = runs(model, tiny, READING)
        assert_alike(ours, runs(merged, tiny, READING), atol=2e-4, rtol=1e-3)
        assert any(ours[name][0] != plain[name][0] for name in ours)
        with adapted.disable_adapter():
            assert_alike(runs(model, tiny, READING), plain, atol=1e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-2)  # no version counter tells of this


def test_a_hook_on_the_projector_is_part_of_what_methods_see(llava_tiny):
    model = copy.deepcopy(llava_tiny.model)
    layer = model.model.multi_modal_projector.linear_1
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    plain = copy.deepcopy(llava_tiny.model)
    with torch.no_grad():
        plain.model.multi_modal_projector.linear_1.weight.mul_(3)
        plain.model.multi_modal_projector.linear_1.bias.mul_(3)
    ours, theirs = (runs(m, llava_tiny, READING) for m in (model, plain))
    assert_alike(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_read_as_numbers(bits, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(tiny_families, "WIDTH", 64)  # 4 bits come in blocks of 64
    tiny = Tiny("llava")
    tiny.model.save_pretrained(tmp_path)
    names = ["model.vision_tower", "model.language_model", "lm_head"]
    from transformers import BitsAndBytesConfig

    model = type(tiny.model).from_pretrained(
        tmp_path, device_map="cpu", dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=names,
        ),
    )  # fmt: skip
    plain, projector = copy.deepcopy(tiny.model), model.model.multi_modal_projector
    assert "bit" in type(projector.linear_1).__name__
    for name in ("linear_1", "linear_2"):
        ours, theirs = getattr(projector, name), getattr(plain.model.multi_modal_projector, name)
        with torch.no_grad():
            numbers = dequantized(ours, bits)
            assert (numbers - theirs.weight).abs().max() > 1e-4  # codes are coarser
            theirs.weight.copy_(numbers)
    for name in READING:
        method = build(name, budget=6)
        kept = []
        for each in (model, plain):
            with method(each) as trace, torch.no_grad():
                each(**tiny.inputs(TURNS))
            kept.append([set(indices.tolist()) for indices in trace.kept])
        # the layers round what they read too, so that of like tokens another one may be kept
        assert all(len(one - other) <= 1 for one, other in zip(*kept, strict=True)), name
    features = tiny.encode(tiny.inputs(TURNS)).groups[0].tokens.features
    read = family_of(model).projector.weights(features)
    for weight, name in ((read.w1, "linear_1"), (read.w2, "linear_2")):
        expected = getattr(plain.model.multi_modal_projector, name).weight
        torch.testing.assert_close(weight, expected, atol=5e-3, rtol=5e-3)


def dequantized(layer, bits):
    """The numbers that a layer of bitsandbytes stands for, by its own functions."""
    from bitsandbytes import functional

    if bits == 4:
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_weights_are_read_as_numbers(name, llava_tiny):
    quantization = pytest.importorskip("torchao.quantization")
    model, plain = copy.deepcopy(llava_tiny.model), copy.deepcopy(llava_tiny.model)
    quantization.quantize_(model.model.multi_modal_projector, getattr(quantization, name)())
    for layer in ("linear_1", "linear_2"):
        ours = getattr(model.model.multi_modal_projector, layer)
        theirs = getattr(plain.model.multi_modal_projector, layer)
        with torch.no_grad():
            theirs.weight.copy_(ours.weight.dequantize())
    features = llava_tiny.encode(llava_tiny.inputs(TURNS)).groups[0].tokens.features
    read, exact = (family_of(m).projector.weights(features) for m in (model, plain))
    close = {"atol": 5e-3, "rtol": 5e-3}  # one of them rounds the rows that it reads as well
    torch.testing.assert_close(read.w1, exact.w1, **close)
    torch.testing.assert_close(read.w2, exact.w2, **close)
    found = runs(model, llava_tiny, READING)
    if name == "Int8WeightOnlyConfig":
        assert_alike(found, runs(plain, llava_tiny, READING), atol=2e-4, rtol=1e-3)


def test_a_model_in_double_precision_is_pruned_as_one_in_single(tiny):
    """Converted between two runs: nothing of the first one's type is left."""
    model, names = copy.deepcopy(tiny.model), EVERY if tiny.name == "llava" else SOME
    single = runs(model, tiny, names)
    decoder = family_of(model).decoder
    if decoder._can_set_experts_implementation():
        decoder.set_experts_implementation("eager")  # grouped products are none of doubles
    model.double()
    inputs = tiny.inputs(TURNS)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    double = runs(model, tiny, names, inputs)
    same = [name for name in single if single[name][0] == double[name][0]]
    assert len(same) >= len(single) - 2  # rounding decides between like tokens
    for name in same:
        assert double[name][1].dtype == torch.float64
        torch.testing.assert_close(double[name][1].float(), single[name][1], atol=2e-3, rtol=1e-2)


def test_weights_are_the_same_object_until_they_change():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8), nn.Linear(8, 6)
    projector, features = Projector(first, nn.GELU(), second), torch.randn(2, 3, 4)
    read = projector.weights(features)
    assert read.w1 is first.weight and read.b2 is second.bias
    assert Projector(first, nn.GELU(), second).weights(features) is read
    for change in (
        lambda: second.weight.data.mul_(1.001),
        lambda: first.bias.data.add_(1e-3),
        lambda: second.register_forward_hook(lambda *call: 2 * call[2]),
        lambda: first.double() and second.double(),
    ):
        change()
        like = features.to(first.weight.dtype)
        again = projector.weights(like)
        assert again is not read
        assert projector.weights(like) is again
        read = again
    torch.testing.assert_close(read.w2, 2 * second.weight)
    torch.testing.assert_close(read.b2, 2 * second.bias)


def test_a_projector_of_tensors_is_the_one_of_modules():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8, bias=False), nn.Linear(8, 6)
    ours = Projector.of(first.weight, None, nn.GELU(), second.weight, second.bias)
    features = torch.randn(5, 4)
    assert torch.equal(ours(features), Projector(first, nn.GELU(), second)(features))
    assert ours.weights(features).b1 is None and isinstance(ours.second, Affine)
    assert ours.parameters() == [] and len(Projector(first, nn.GELU(), second).parameters()) == 3
