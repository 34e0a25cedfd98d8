"""A small file that a processor would make huge is refused within two gigabytes, on every road."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from PIL import Image

LIMIT = 2 * 2**30
COMMON = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30,) * 2)
from pathlib import Path
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.timing import peak_bytes
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load
folder = Path(sys.argv[1])
image, question = folder / "thin.png", "Is it red?"
model, processor = load("tiny")
said = {}

def refused(road, call):
    try:
        said[road] = f"not refused: {call()}"
    except InputError as error:
        said[road] = str(error)
"""
# The library and the commands as far as they share no code; a refusal of one row is that row's error
ROADS = """
from vlm_prune.benchmarks.batch.inputs import decode, find_images, input_root
from vlm_prune.benchmarks.batch.config import MapConfig
from vlm_prune.benchmarks.batch.pipeline import Answerer
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.experiments.iit import evaluate as iit
from vlm_prune.benchmarks.experiments.schedule import change_points_of, prompts_of_file
from vlm_prune.benchmarks.report.demo import Comparer
from vlm_prune.learners.data import Conversations, read_llava
from vlm_prune.pruning.pipeline import PrunedVLM

refused("ask", lambda: PrunedVLM(model, processor).answer(image, question))
answerer = Answerer(MapConfig(str(folder), question, "tiny", Variant("zoo", 64)), "cpu")
import pyarrow as pa
(pixels,) = decode(find_images(folder, question), input_root(folder))
said["map"] = answerer(pixels).to_pylist()[0]["error"]
refused("demo", lambda: Comparer(model, processor)(image, question, "zoo", "64"))
prompts = prompts_of_file(folder / "data.json", folder, 1)
refused("schedule", lambda: change_points_of(model, processor, prompts, 1))
family = family_of(model)
layout = family.image_token, family.tokens_per_image, 2048
data = Conversations(
    read_llava(folder / "data.json", folder), processor, *layout, family.check_size
)
refused("training", lambda: data[0])
refused("iit", lambda: iit.evaluate_conversations(model, processor, folder, folder / "out"))
"""
ROWS = """
from vlm_prune.benchmarks.lmms_eval.load import load_task
check = lambda image: family_of(model).check_size(processor.image_processor, *image.size)
refused("lmms-eval", lambda: load_task("pope", folder, limit=1, check=check))
"""
END = "print(json.dumps([said, peak_bytes(model.device)]))"


@pytest.fixture
def folder(tmp_path):
    """A picture of 10,000 x 1 pixels, and files of several kinds that name it."""
    Image.new("RGB", (10_000, 1)).save(tmp_path / "thin.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "thin.png", "conversations": turns}]))
    turn = {"question": "What?", "options": ["a"], "answer": "A", "image": "thin.png"}
    line = {"id": "V/0", "setting": "V", "turns": [turn]}
    (tmp_path / "iit.jsonl").write_text(json.dumps(line))
    (tmp_path / "POPE").mkdir()
    Image.new("RGB", (10_000, 1)).save(tmp_path / "POPE" / "thin.gif")
    row = {"question": "?", "answer": "yes", "category": "", "question_id": "1", "id": "1"}
    (tmp_path / "POPE" / "test.jsonl").write_text(json.dumps(row | {"image": "thin.gif"}))
    return tmp_path


def measured(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code + END, folder],
        check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, peak = json.loads(done.stdout.splitlines()[-1])
    for road, message in said.items():
        assert "an image of 10000 x 1 becomes 3360000 x 336 for this model" in message, road
    assert peak < LIMIT
    return set(said)


def test_thin_pictures_are_refused_before_they_are_resized(folder):
    (folder / "POPE" / "thin.gif").unlink()
    found = measured(ROADS, folder)
    assert found == {"ask", "map", "demo", "schedule", "training", "iit"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_thin_pictures_in_rows_are_refused_before_they_are_resized(folder):
    assert measured(ROWS, folder) == {"lmms-eval"}
