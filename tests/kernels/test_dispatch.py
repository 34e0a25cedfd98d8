"""Where an operation runs, and that nothing needs triton until it runs there."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import gelu

from vlm_prune.kernels import dispatch
from vlm_prune.kernels.dispatch import backend, backend_for, implementation
from vlm_prune.kernels.token_sensitivity import directional, op
from vlm_prune.pruning import METHODS
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.tokens import AttentionRows, DecoderTokens, VisionTokens


def test_a_cpu_runs_the_reference_and_the_override_ends_with_its_block():
    tensor = torch.zeros(1)
    assert backend_for(tensor) == "reference"
    with backend("triton"):
        with backend("reference"):
            assert implementation("greedy_select", tensor).__name__.endswith("reference")
        assert backend_for(tensor) == "triton"
    with pytest.raises(KeyError), backend("triton"):
        raise KeyError
    assert backend_for(tensor) == "reference"


@pytest.mark.parametrize("activation", [gelu, torch.tanh])
def test_a_sensitivity_forces_no_implementation_on_other_threads(activation, monkeypatch, make):
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    chosen = []

    def noted(name, tensor):
        chosen.append(backend_for(on_gpu))
        return implementation(name, tensor)

    monkeypatch.setattr(op, "implementation", noted)
    directional(make(1, 3), make(4, 3), None, activation, make(2, 4), make(2, 3))
    assert chosen in ([], ["triton"])


@pytest.mark.gpu
def test_a_gpu_runs_triton_except_in_float64():
    assert backend_for(torch.zeros(1, device="cuda")) == "triton"
    assert backend_for(torch.zeros(1, device="cuda", dtype=torch.float64)) == "reference"


def test_every_operation_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from pathlib import Path
import vlm_prune.kernels
from importlib import import_module
for path in sorted(Path(list(vlm_prune.kernels.__path__)[0]).glob("*/op.py")):
    import_module(f"vlm_prune.kernels.{path.parent.name}")
from vlm_prune.kernels.attention_received import attention_received
assert attention_received(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)).tolist() == [[0.5, 0.5]]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.fixture
def vision(make):
    query, key = make(2, 2, 13, 8), make(2, 2, 13, 8)
    w1, b1, w2 = make(20, 16), make(20), make(10, 20)
    features = make(2, 12, 16)
    projector = Projector.of(w1, b1, gelu, w2, None)
    return VisionTokens(
        features, projector(features), ((3, 4),), (0, 1), projector,
        query_key=lambda: (query, key), patches=lambda: features,
    )  # fmt: skip


@pytest.fixture
def decoder(make, device):
    rows = AttentionRows(
        make(2, 4, 5, 8), make(2, 2, 20, 8), torch.arange(15, 20, device=device).repeat(2, 1),
        torch.ones(2, 20, dtype=torch.bool, device=device),
        torch.arange(2, 14, device=device).repeat(2, 1), 0.3,
    )  # fmt: skip
    question_mask = torch.ones(2, 5, dtype=torch.bool, device=device)

    def some(queries):
        return replace(
            rows, query=rows.query[:, :, queries].clone(), columns=rows.columns[:, queries]
        )

    features = (make(2, 12, 6), make(2, 5, 6))
    return DecoderTokens(
        *features, question_mask, question_mask, some, lambda: rows, lambda: (None, None)
    )


@pytest.mark.parametrize("name", ["fopru", "zoo", "zoo-exact", "divprune", "adaptinfer", "fastv"])
def test_a_pruner_keeps_the_same_tokens_on_both(name, vision, decoder):
    method, kept = METHODS[name](budget=5), {}
    for side in ("reference", "triton"):
        with backend(side):
            if method.stage == "decoder":
                reduced = method.reduce(decoder, 5)
            else:
                reduced = method.reduce(vision)
        kept[side] = [places.tolist() for places in reduced.indices]
    assert kept["triton"] == kept["reference"]
    assert [len(places) for places in kept["triton"]] == [5, 5]
