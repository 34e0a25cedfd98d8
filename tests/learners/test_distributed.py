"""Two processes on a CPU, as torchrun and `accelerate launch` start them."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState

from vlm_prune.learners import WingsConfig
from vlm_prune.learners.data import read_llava
from vlm_prune.learners.recipe import PRESETS
from vlm_prune.learners.train import WingsRun, train_wings

WORKER = """
import pickle, sys
from vlm_prune.learners.train import train_wings

with open(sys.argv[1], "rb") as file:
    train_wings(*pickle.load(file))
"""
RATES = {"projector_lr": 1e-2, "learner_lr": 1e-2, "language_lr": 1e-2}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.7, 0.2])
def test_two_processes_lose_as_one_does_on_the_same_batches(
    ratio, checkpoint, conversations, tmp_path
):
    """Some micro-batches have images on one process and text alone on the other."""
    examples = read_llava(conversations / "data.json", conversations)
    recipe, wings = replace(PRESETS["paper-2"], batch=4, **RATES), WingsConfig(4, max_positions=128)
    one, two = (
        WingsRun(
            str(checkpoint), tmp_path / name, "wings", recipe, wings, ratio, bf16=False, cpu=True
        )
        for name in ("one", "two")
    )
    AcceleratorState._reset_state(True)
    train_wings(one, examples)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "run.pickle").write_bytes(pickle.dumps((two, examples)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(tmp_path / "run.pickle")],
        check=False, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    losses = [
        [json.loads(line)["loss"] for line in (run.output / "log.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert len(losses[0]) >= 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
