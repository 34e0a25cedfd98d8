"""lmms-eval's tasks about videos: real schemas, with clips that are made here."""

import json
import re
from importlib.util import find_spec

import datasets
import pytest
from lmms_eval.api.instance import Instance
from tiny_families import Tiny
from video_files import write_clip

from vlm_prune.benchmarks.lmms_eval.model import PrunedChat

pytest.importorskip("av")
pytest.importorskip("torchvision")
OPTIONS = ["red", "blue", "green", "white"]
LETTERED = [f"{letter}. {option}" for letter, option in zip("ABCD", OPTIONS, strict=True)]


def videomme(number):
    return {
        "video_id": f"{number:03d}",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Astronomy",
        "url": "https://www.youtube.com/watch?v=a",
        "videoID": f"clip{number}",
        "question_id": f"{number:03d}-1",
        "task_type": "Counting Problem",
        "question": "What color is the sky?",
        "options": LETTERED,
        "answer": "B",
    }


def egoschema(number):
    return {
        "question_idx": str(number),
        "question": "What does C do?",
        "video_idx": f"clip{number}",
        "option": [*LETTERED, "E. black"],
        "answer": "1",
    }


def mlvu(number):
    return {
        "video_name": f"clip{number}.mp4",
        "duration": 1.0,
        "question": "What color is the sky?\n(A) red\n(B) blue\n(C) green\n(D) white",
        "candidates": str(OPTIONS),
        "answer": "B",
        "task_type": "needle",
        "question_id": f"needle_{number}",
    }


def longvideobench(number):
    return {
        "video_id": f"clip{number}",
        "question": "What color is the sky?",
        "option0": "red",
        "option1": "blue",
        "option2": "green",
        "option3": "N/A",
        "option4": "N/A",
        "correct_choice": 1,
        "id": f"clip{number}_0",
        "video_path": f"clip{number}.mp4",
        "subtitle_path": f"clip{number}_en.json",
        "duration_group": 15,
        "duration": 1.0,
        "question_category": "S2E",
        "topic_category": "NP-News-Programs",
        "level": "L1-Perception",
        "view_count": 1,
        "starting_timestamp_for_subtitles": 0.0,
    }


# of each task its rows, where they and the videos lie, and a package that its code imports
TASKS = {
    "videomme": (videomme, "Video-MME/videomme/test", "Video-MME/data", "cv2"),
    "egoschema_subset": (egoschema, "egoschema/Subset/test", "egoschema/videos", "requests"),
    "mlvu_dev": (mlvu, "MLVU_dev/mlvu/test", "MLVU_dev", "yaml"),
    "longvideobench_val_v": (
        longvideobench, "LongVideoBench/validation", "LongVideoBench/videos", "decord",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four rows of each, the last one without its video."""
    root = tmp_path_factory.mktemp("videos")
    for make, name, folder, _ in TASKS.values():
        (root / name).parent.mkdir(parents=True)
        (root / folder).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list([make(number) for number in range(4)])
        table.to_parquet(f"{root / name}-00000-of-00001.parquet")
        for number in range(3):
            write_clip(root / folder / f"clip{number}.mp4", range(0, 1000, 250))
    for folder in ("MVBench/json", "MVBench/video/star/Charades_segment"):
        (root / folder).mkdir(parents=True)
    rows = [
        {"video": f"ZS9XR{n}.mp4", "question": "What happened?", "candidates": OPTIONS,
         "answer": "blue", "start": 11.1, "end": 19.6}
        for n in range(3)
    ]  # fmt: skip
    (root / "MVBench/json/action_sequence.json").write_text(json.dumps(rows))
    for row in rows:
        write_clip(root / "MVBench/video/star/Charades_segment" / row["video"], range(0, 1000, 250))
    return root


@pytest.fixture(scope="module")
def onevision_model(tmp_path_factory):
    folder, tiny = tmp_path_factory.mktemp("model"), Tiny("llava_onevision")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def evaluated(run, model, root, tasks, output, *more):
    return run(
        "eval", "--model", model, "--tasks", ",".join(tasks), "--data-root", root, "--limit", "20",
        "--batch-size", "2", "--output", output, *more,
    )  # fmt: skip


def test_videos_of_a_local_copy_are_asked_about(run, onevision_model, root, tmp_path):
    """What a task's own code lacks is named; a row whose video is missing is left out."""
    tasks, method = [*TASKS, "mvbench_action_sequence"], ["--method", "evs", "--budget", "2/frame"]
    method += ["--frames", "3"]
    code, out, err = evaluated(run, onevision_model, root, tasks, tmp_path, *method)
    assert code == 0, err
    assert re.search(r"first token +[0-9.]+ -> [0-9.]+ ms; the tower is [0-9.]+ % of the", out)
    assert "(kept / per layer / paper's count)" in out
    results = json.loads((tmp_path / "results.json").read_text())
    lacking = {name: package for name, (*_, package) in TASKS.items() if not find_spec(package)}
    assert {*results["tasks"]} == {*tasks} - {*lacking}
    runnable = [name for name in TASKS if name not in lacking]
    assert {*results["skipped"]} == {*lacking, *(f"{name} row 3" for name in runnable)}
    for name in runnable:
        assert "is not there; download it again" in results["skipped"][f"{name} row 3"]
    for name, package in lacking.items():
        assert f"needs the package {package!r}" in results["skipped"][name]
    for found in results["tasks"].values():
        assert found["n"] == 3 and 0 <= found["accuracy"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    # three of four frames, of 2 x 2 tokens, and a newline
    assert all(row["image_tokens"] == [13] and len(row["kept"][0]) == 6 for row in rows)
    assert results["time_ms"]["baseline_prefill"] > 0


def test_videos_of_unlike_length_in_one_batch_get_what_each_gets_alone(onevision_model, tmp_path):
    for number, frames in enumerate((2, 3, 2)):
        write_clip(tmp_path / f"{number}.mp4", range(0, 250 * frames, 250))

    def replies(batch_size):
        lm = PrunedChat(str(onevision_model), "evs", 0.5, batch_size=batch_size, device="cpu")
        lm.keep_loaded = True
        lm.task_dict["clips"] = {"test": [{"url": str(tmp_path / f"{n}.mp4")} for n in range(3)]}
        requests = [
            Instance(
                "generate_until", ("", messages, {"max_new_tokens": 3}, n, "clips", "test"), 0,
                {"task": "clips", "doc_id": n, "repeats": 1},
            )
            for n in range(3)
        ]  # fmt: skip
        return [reply.text for reply in lm.generate_until(requests)]

    def messages(doc):
        content = [{"type": "video", "url": doc["url"]}, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": content}]

    assert replies(3) == replies(1)


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("tiny", "mvbench_action_sequence", "llava models take no videos here"),
        (None, "egoschema", "has no answers to score; run its validation set"),
        (None, "mvbench_state_change", "expected state_change/train"),
    ],
)
def test_what_is_not_asked_is_named(run, onevision_model, root, tmp_path, model, task, message):
    """EgoSchema's whole test set would be sent to a server for its score."""
    more = ["--method", "random", "--budget", "4"]
    code, _, err = evaluated(run, model or onevision_model, root, [task], tmp_path, *more)
    assert code == 2 and message in err and "Traceback" not in err
