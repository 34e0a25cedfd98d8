"""What is found for the heads of one model: kept on disk, used on that model, refused on others."""

import pytest
import torch
from attention_cases import short
from tiny_families import Tiny

from vlm_prune.pruning.attention import build_attention
from vlm_prune.pruning.attention.calibration import HeadCalibration
from vlm_prune.pruning.attention.sale import calibrate_sale
from vlm_prune.vlm.common.errors import InputError

ROWS = [[([0, 1, 2], "Is there a 7?")], [([1, 2, 3, 0, 1], "What color is the star?")]]


@pytest.fixture(scope="module")
def llava():
    return Tiny("llava")


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def test_sale_s_thresholds_are_used_by_layer_and_head(llava, tmp_path):
    inputs, path = llava.inputs(ROWS), tmp_path / "sale.safetensors"
    method = short("sale", density=None, threshold=0.5)
    found = calibrate_sale(llava.model, [inputs], method, bound=0.6)
    assert {*found.of_layers("thresholds")} == {0, 1, 2, 3}
    found.save(path)
    calibrated = short("sale", density=None, threshold=0.5, calibration=str(path))
    real = inputs["attention_mask"].bool()
    dense = logits_of(llava.model, inputs)[real]
    off, densities = [], []
    for each in (method, calibrated):
        with each(llava.model) as trace:
            off.append(float((logits_of(llava.model, inputs)[real] - dense).abs().max()))
        densities.append(trace.density)
    # thresholds only fall, so that more is kept and the answer is nearer
    assert off[1] < off[0] and densities[0] < densities[1] < 1
    # a head whose threshold is 0 keeps everything
    zeros = {name: torch.zeros_like(tensor) for name, tensor in found.tensors.items()}
    HeadCalibration.of("sale", zeros, llava.model).save(path)
    with short("sale", density=None, calibration=str(path))(llava.model) as trace:
        torch.testing.assert_close(
            logits_of(llava.model, inputs)[real], dense, atol=1e-5, rtol=1e-4
        )
    assert trace.density == 1
    with pytest.raises(InputError, match="give density=null"):
        short("sale", density=0.5, calibration=str(path))
    with pytest.raises(InputError, match="no prompt has the 2048 tokens"):
        calibrate_sale(llava.model, [inputs])


def test_files_of_other_models_methods_and_kinds_are_refused(llava, tmp_path):
    path = tmp_path / "found.safetensors"
    tensors = {f"layers.{layer}.thresholds": torch.full((2,), 0.01) for layer in range(4)}
    HeadCalibration.of("sale", tensors, llava.model, prompts=1).save(path)
    read = HeadCalibration.read(path, "sale")
    assert read.about == {"prompts": 1} and read.tensors.keys() == tensors.keys()
    method = short("sale", density=None, calibration=str(path))
    # another precision is the same model; other weights are not
    precise = llava.model.to(torch.bfloat16)
    read.check(precise, "found")
    llava.model.float()
    weight = llava.model.model.language_model.layers[2].self_attn.k_proj.weight
    before = weight.data.clone()
    weight.data += 0.1
    try:
        with pytest.raises(InputError, match=r"found.safetensors is of another model"):
            method.admit(llava.model)
    finally:
        weight.data = before
    with pytest.raises(InputError, match="is for sale, not for act"):
        HeadCalibration.read(path, "act")
    (tmp_path / "text").write_text("[]")
    for wrong in (tmp_path / "text", tmp_path / "nothing", tmp_path):
        given = build_attention("sale", density=None, calibration=str(wrong))
        with pytest.raises(InputError, match="cannot read|holds nothing that vlm-prune calibrate"):
            given.admit(llava.model)
