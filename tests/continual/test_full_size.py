"""ViT-B/16 at full size: one task of X-TAIL's shape ends, resumes and merges within 8 GB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource, sys
import numpy as np, torch
from PIL import Image
from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import make_method
from vlm_prune.continual.streams.base import LabeledImages, StreamTask
from vlm_prune.continual.streams.names import table
from vlm_prune.continual.train import ContinualRun, train_tasks
from pathlib import Path

folder, kill, batch, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Random(LabeledImages):
    def __init__(self, count):
        self.labels = [n % 100 for n in range(count)]
    def __len__(self):
        return len(self.labels)
    def item(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (224, 224, 3), np.uint8)
        return Image.fromarray(pixels), self.labels[index]

torch.manual_seed(0)
clip = load_clip("ViT-B-16-quickgelu", None)
names = table()["aircraft"]
task = StreamTask("aircraft", names.classes, (names.x_tail,), Random(1600), (), Random(4))
method = make_method("codyra")
if kill:
    class Killed(type(method)):
        def loss(self, pixels, labels, step):
            if step == kill:
                sys.exit(3)
            return super().loss(pixels, labels, step)
    method = Killed()
recipe = Recipe(batch=batch, steps=steps, prompts=24)
run = ContinualRun(folder, method, recipe, save_every=1, cpu=True, recompute=True)
results = train_tasks(run, clip, [task])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
keys = set(clip.model.state_dict())
print(json.dumps({"peak": peak, "drift": results.drift, "keys": keys == set(load_clip(str(folder / "model")).model.state_dict())}))
"""


@pytest.mark.slow
def test_one_task_of_x_tails_shape_ends_resumes_and_merges_within_8_gb(tmp_path):
    """100 classes, 16 images of each, rank 16 in both towers; steps that are fewer and smaller than X-TAIL's."""

    def run(kill):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(kill), "8", "2"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    killed = run(1)
    assert killed.returncode == 3, killed.stderr
    assert list((tmp_path / "run").glob("step-0-1"))
    ended = run(0)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["peak"] <= 8e9 and found["keys"] and found["drift"][0] > 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").open()]
    assert steps == [0, 1]
    assert not list(Path(tmp_path / "run").glob("step-*"))
