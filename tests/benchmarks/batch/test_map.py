"""A folder through Ray Data: a row's answer is its own, and a killed run ends with the same table."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_families import Tiny
from video_files import write_clip

from vlm_prune.benchmarks.batch import pipeline
from vlm_prune.benchmarks.batch.config import MapConfig
from vlm_prune.benchmarks.batch.inputs import decode, find_images, input_root, open_below
from vlm_prune.benchmarks.batch.output import ANSWERS, Parts, parts_of
from vlm_prune.benchmarks.batch.pipeline import Answerer, local_ray, placed
from vlm_prune.benchmarks.batch.vllm_stage import ERROR, engine_request
from vlm_prune.benchmarks.cli import map as command
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.smol import adapter_path
from vlm_prune.vlm.tiny import checkpoint_path

PROMPT = "What color is the star?"
EAGER = (  # a part after every block, so that a kill finds some
    "from vlm_prune.benchmarks.cli import app as cli; from vlm_prune.benchmarks.batch import pipeline; "
    "pipeline.PART_SECONDS = 0; cli.main()"
)


@pytest.fixture(scope="module")
def cluster():
    """One Ray of two CPUs for all runs of this process."""
    with local_ray(2):
        yield


def draw(folder, count):
    """Scenes of the embedded tasks, and some broken files; gives the broken ones' names."""
    scenes = [TASKS["attribute"].sample(number, 0, "val").images[0] for number in range(12)]
    for shelf in range(3):
        (folder / f"shelf{shelf}").mkdir(parents=True)
    for number in range(count):
        path = folder / f"shelf{number % 3}" / f"{number:04d}.png"
        scenes[number % 12].resize((60 + number % 7, 60), 0).save(path)
    (folder / "cut.png").write_bytes(path.read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    (folder / "notes.txt").write_text("not listed")
    return {"cut.png", "text.png", "empty.jpg", "bomb.png"}


def arguments(folder, output, *more, prompt=PROMPT):
    return ["map", "--input", folder, "--prompt", prompt, "--output", output, "--cpus", "2", *more]


def rows(output):
    return parquet.read_table(output).to_pylist()


@pytest.fixture(scope="module")
def shelves(tmp_path_factory):
    """A folder of pictures, the names of the broken ones, and where its table goes."""
    folder = tmp_path_factory.mktemp("map")
    pictures, outside = folder / "in", folder / "outside.png"
    broken = draw(pictures, 12)
    Image.new("RGB", (8, 8)).save(outside)
    (folder / "elsewhere").mkdir()
    (pictures / "out.png").symlink_to(outside)
    (pictures / "folder").symlink_to(folder / "elsewhere")
    (pictures / "inner.png").symlink_to(pictures / "shelf0" / "0000.png")
    os.mkfifo(pictures / "pipe.png")
    Image.new("RGB", (20_000, 1)).save(pictures / "thin.png")
    return pictures, broken | {"out.png", "folder", "pipe.png", "thin.png"}, folder / "out.parquet"


def test_images_of_a_run_that_noted_no_settings_are_found_anew(tmp_path, monkeypatch):
    def listed(path):
        return pa.table({"row": [0], "path": [path], "prompt": [PROMPT]})

    def kill(*_):
        raise KeyboardInterrupt

    output = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("vlm_prune.benchmarks.batch.output.record_settings", kill)
        with pytest.raises(KeyboardInterrupt):
            Parts(output, {"input": "one"}, lambda: listed("one.png"))
    parts = Parts(output, {"input": "other"}, lambda: listed("other.png"))
    assert parts.images["path"].to_pylist() == ["other.png"]
    parts.release()


def test_another_adapter_or_checkpoint_under_the_same_name_is_refused(tmp_path, monkeypatch):
    lora, model, output = tmp_path / "lora", tmp_path / "model", tmp_path / "out.parquet"
    shutil.copytree(adapter_path(), lora)
    shutil.copytree(checkpoint_path(), model)
    draw(tmp_path / "in", 1)
    config = MapConfig(
        str(tmp_path / "in"), PROMPT, str(model), Variant("zoo", 64), limit=2, adapter=str(lora)
    )

    def answered(config, workers, missing, batch_size):
        yield pa.Table.from_pylist([{"row": 0, "answer": "red"}], schema=pipeline.REFUSED)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "local_ray", nullcontext)
    monkeypatch.setattr(pipeline, "_answers", answered)
    with pytest.raises(KeyboardInterrupt):
        pipeline.map_images(config, output)
    for name, file in (
        ("adapter_digest", lora / "adapter_model.safetensors"),
        ("checkpoint", model / "model.safetensors"),
    ):
        tensors = load_file(file)
        save_file({key: -tensor for key, tensor in tensors.items()}, file)
        with pytest.raises(InputError, match=f"holds a run with another .*{name}.*; give another"):
            pipeline.map_images(config, output)


def test_rows_are_what_the_images_get_alone(run, shelves, cluster):
    pictures, broken, output = shelves
    given = arguments(pictures, output, "--batch-size", "5")
    code, out, err = run(*given)
    assert code == 0, err
    assert f"21 rows, {len(broken)} with an error" in out

    table = rows(output)
    assert list(table[0]) == ["path", "prompt", *ANSWERS.names[1:]]
    assert [row["path"] for row in table] == sorted(row["path"] for row in table)
    assert {row["path"] for row in table if row["error"]} == broken
    vlm = PrunedVLM.from_pretrained("tiny", "zoo", 64)
    for row in table:
        if row["error"]:
            assert row["answer"] is row["image_tokens"] is row["kept_tokens"] is None
            assert "\n" not in row["error"]
        else:
            alone = vlm.answer(pictures / row["path"], PROMPT)
            assert row["answer"] == alone
            assert (row["image_tokens"], row["kept_tokens"]) == (576, 64)
    assert len({row["answer"] for row in table}) > 3  # the model does look
    assert not parts_of(output).exists()

    written = output.stat().st_mtime_ns
    code, again, _ = run(*given)
    assert code == 0 and again.strip() == out.strip()  # nothing left to do
    code, _, err = run(*arguments(pictures, output, prompt="Is there a 7?"))
    assert code == 2 and "another prompt, " not in err and "another prompt; give" in err
    assert output.stat().st_mtime_ns == written


def stop(command, output, number):
    """Run the command until some parts are there, then send a signal; gives exit code and parts."""
    process = subprocess.Popen(
        [sys.executable, "-c", EAGER, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    before = len(list(parts_of(output).glob("part-*")))
    deadline = time.monotonic() + 300
    while len(list(parts_of(output).glob("part-*.parquet"))) < before + 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, sorted(parts_of(output).glob("part-*.parquet"))


@pytest.mark.slow
def test_a_killed_run_resumes_and_another_prompt_is_refused(run, shelves, tmp_path, cluster):
    """Its table is the one of the run that the test before this one has left."""
    pictures, _, whole = shelves
    if not whole.exists():
        assert run(*arguments(pictures, whole))[0] == 0
    killed = tmp_path / "out.parquet"

    code, parts = stop(arguments(pictures, killed, "--batch-size", "1"), killed, signal.SIGKILL)
    assert code == -signal.SIGKILL and not killed.exists()
    answered = sum(len(parquet.read_table(part)) for part in parts)
    assert 0 < answered < 21

    code, _, err = run(*arguments(pictures, killed, prompt="Is there a 7?"))
    assert code == 2 and "another prompt; give another --output" in err

    before = [part.read_bytes() for part in parts]
    Image.new("RGB", (8, 8)).save(pictures / "later.png")  # the images are those of the start
    assert run(*arguments(pictures, killed))[0] == 0
    assert before and rows(killed) == rows(whole)


@pytest.mark.slow
def test_a_thousand_images_killed_and_interrupted(run, tmp_path, cluster):
    pictures, whole, output = tmp_path / "in", tmp_path / "whole.parquet", tmp_path / "out.parquet"
    broken = draw(pictures, 1000 - 4)
    command = arguments(pictures, output)
    assert stop(command, output, signal.SIGKILL)[0] == -signal.SIGKILL
    assert stop(command, output, signal.SIGINT)[0] == 130
    assert stop(command, output, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not output.exists()
    code, out, err = run(*command)
    assert code == 0 and "1000 rows, 4 with an error" in out, err
    assert run(*arguments(pictures, whole, "--batch-size", "16"))[0] == 0
    assert rows(output) == rows(whole)
    assert {row["path"] for row in rows(output) if row["error"]} == broken


@pytest.mark.slow
def test_ray_runs_nothing_without_its_secret(cluster):
    import ray

    address = ray.get_runtime_context().gcs_address
    for token, code in ((os.environ["RAY_AUTH_TOKEN"], 0), ("0" * 64, 1)):
        other = subprocess.run(
            [sys.executable, "-c", f"import ray; ray.init({address!r}, log_to_driver=False)"],
            check=False, capture_output=True, text=True, env=os.environ | {"RAY_AUTH_TOKEN": token},
        )  # fmt: skip
        assert other.returncode == code, other.stderr
    assert "AuthenticationError" in other.stderr


SPILLED = """
import sys
from pathlib import Path
from vlm_prune.benchmarks.batch.config import MapConfig
from vlm_prune.benchmarks.batch.pipeline import local_ray, map_images
from vlm_prune.benchmarks.evaluation.records import Variant

pictures, model, output = sys.argv[1:]
with local_ray(2):
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address
    config = MapConfig(pictures, "red?", model, Variant("zoo", 16), max_new_tokens=1)
    print(map_images(config, Path(output), batch_size=2))
    print(get_memory_info_reply(get_state_from_address(None)).store_stats.spilled_bytes_total)
"""


@pytest.mark.slow
def test_decoding_waits_for_the_model(checkpoint, tmp_path):
    """Images of 360 MB go through 80 MB of shared memory, and none of them by way of the disk."""
    (tmp_path / "in").mkdir()
    for number in range(100):
        Image.new("RGB", (1200, 1000), (number, 0, 0)).save(tmp_path / "in" / f"{number:03d}.png")
    given = [tmp_path / "in", checkpoint, tmp_path / "out.parquet"]
    done = subprocess.run(
        [sys.executable, "-c", SPILLED, *map(str, given)], check=True, capture_output=True, text=True,
        env=os.environ | {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 * 2**20)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["(100, 0)", "0"]


def test_a_budget_above_the_model_is_refused_and_leaves_nothing(run, tmp_path, cluster):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    output = tmp_path / "out.parquet"
    code, _, err = run(*arguments(tmp_path, output, "--budget", "577"))
    assert code == 2 and "above the 576 tokens" in err and len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


WRONG = {
    "no input": (["--input", "/nowhere/in"], "no such input"),
    "no images": (["--input", "bare"], "no images"),
    "no manifest": (["--input", "in/a.png"], "neither a folder nor a manifest"),
    "no prompt": (["--prompt", ""], "no prompt; give --prompt"),
    "method": (["--method", "zo"], "did you mean 'zoo'"),
    "budget": (["--budget", "0"], "out of range"),
    "output below a file": (["--output", "in/a.png/out.parquet"], "not a folder"),
    "output is a folder": (["--output", "bare"], "is a folder"),
    "output is something else": (["--output", "in/a.png"], "no table of map"),
    "workers": (["--workers", "0"], "--workers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    extra, message = WRONG[name]
    given = {"--input": "in", "--prompt": "red?", "--output": "out.parquet"}
    given |= dict(zip(extra[::2], extra[1::2], strict=True))
    code, out, err = run("map", *(part for pair in given.items() for part in pair))
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1 and not out
    assert not list(tmp_path.rglob("out.parquet*"))


@pytest.mark.parametrize(
    "resources, device, workers, found",
    [
        ({"CPU": 8.0}, "auto", None, ("cpu", 1, {"num_cpus": 7})),
        ({"CPU": 8.0}, "cpu", 3, ("cpu", 3, {"num_cpus": 2})),
        ({"CPU": 2.0, "GPU": 4.0}, "auto", None, ("cuda", 4, {"num_gpus": 1})),
        ({"CPU": 8.0, "GPU": 4.0}, "cuda", 2, ("cuda", 2, {"num_gpus": 1})),
        ({"CPU": 8.0, "GPU": 4.0}, "cpu", None, ("cpu", 1, {"num_cpus": 7})),
        ({"CPU": 2.0}, "cpu", 2, "2 workers on cpu need"),
        ({"CPU": 8.0}, "cuda", None, "sees no GPU"),
        ({"CPU": 8.0, "GPU": 4.0}, "cuda", 5, "5 workers on cuda need"),
        ({"CPU": 8.0, "GPU": 4.0}, "cuda:1", None, "Ray hands out the GPUs"),
    ],
)
def test_where_models_run(resources, device, workers, found):
    if isinstance(found, str):
        with pytest.raises(InputError, match=found):
            placed(resources, device, workers)
    else:
        assert placed(resources, device, workers) == found


def test_without_ray_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, err = run("map", "--input", tmp_path, "--output", tmp_path / "out.parquet")
    assert code == 2 and "pip install 'vlm-prune[ray]'" in err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_names_paths_and_prompts(tmp_path, kind):
    file = tmp_path / f"list.{kind}"
    if kind == "csv":
        file.write_text("prompt,path\nred?,b.png\n,a.png\n7,../c.png\n")
    else:
        columns = {"path": ["b.png", "a.png", "../c.png"], "prompt": ["red?", None, "7"]}
        parquet.write_table(pa.table(columns), file)
    found = find_images(file, "blue?").to_pydict()
    assert found["path"] == ["b.png", "a.png", "../c.png"]  # its own order
    assert found["prompt"] == ["red?", "blue?", "7"]
    assert find_images(file, "blue?", 2).to_pydict()["row"] == [0, 1]
    with pytest.raises(InputError, match=r"row 2 .* has no prompt"):
        find_images(file, "")
    if kind == "csv":
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert find_images(file, "blue?").to_pydict() == found
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    for name in ("../c.png", str(tmp_path / "c.png")):
        with pytest.raises(InputError, match=r"leads out of .*--allow-outside"):
            open_below(input_root(tmp_path / "in"), name)
        assert open_below(input_root(tmp_path / "in", allow_outside=True), name).size == (8, 8)
    with pytest.raises(InputError, match="nothing is downloaded"):
        open_below(input_root(tmp_path / "in", allow_outside=True), "http://127.0.0.1:9/c.png")
    file.write_bytes(b"\xff\n\xfe")
    with pytest.raises(InputError):
        find_images(file, "blue?")


@pytest.mark.parametrize(
    "family",
    [
        "llava_onevision",
        "internvl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("smolvlm", "qwen3_vl")),
    ],
)
def test_videos_are_rows_where_the_model_takes_them(family, tmp_path, monkeypatch):
    """Decoded as `answer` reads them; models for images alone do not list them in a folder."""
    pytest.importorskip("av")
    pytest.importorskip("torchvision")
    tiny, folder, checkpoint = Tiny(family), tmp_path / "in", tmp_path / "model"
    tiny.model.save_pretrained(checkpoint)
    tiny.processor.save_pretrained(checkpoint)
    folder.mkdir()
    for name, frames in (("long.mp4", 8), ("other.mp4", 4), ("short.mp4", 3)):
        write_clip(folder / name, range(0, 250 * frames, 250))
    (folder / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    assert find_images(folder, "red?")["path"].to_pylist() == ["a.png"]
    found = find_images(folder, "red?", videos=True)
    names = ["a.png", "broken.mp4", "long.mp4", "other.mp4", "short.mp4"]
    assert found["path"].to_pylist() == names

    variant, limit = Variant("divprune", 5), {"max_new_tokens": 2}
    config = MapConfig(str(folder), "red?", str(checkpoint), variant, "cpu", frames=4, **limit)
    decoded = pa.concat_tables(decode(found, input_root(folder), frames=4))
    assert decoded["error"].to_pylist()[1].startswith("cannot read video")
    together, reply = [], PrunedVLM.replies
    monkeypatch.setattr(
        PrunedVLM, "replies",
        lambda *given, **options: together.append(len(given[1])) or reply(*given, **options),
    )  # fmt: skip
    answers = sorted(Answerer(config, "cpu")(decoded).to_pylist(), key=lambda row: row["row"])
    assert together == ([4] if family == "qwen3_vl" else [1, 2, 1])  # an image and clips of 4, 3
    vlm = PrunedVLM.from_pretrained(str(checkpoint), "divprune", 5, "cpu")
    for name, own in zip(names, answers, strict=True):
        assert bool(own["error"]) == (name == "broken.mp4")
        if not own["error"]:
            assert own["kept_tokens"] == 5 and own["answer"] == vlm.answer(
                folder / name, "red?", frames=4, **limit
            )


def test_a_video_of_a_manifest_is_an_error_of_its_row_with_vllm():
    clip = {"row": 0, "prompt": "red?", "error": None, "width": 8, "height": 8,
            "pixels": bytes(192), "times": [0.0], "duration": 1.0}  # fmt: skip
    assert "videos are not answered by vLLM" in engine_request(clip, {})[ERROR]
    image = engine_request(clip | {"times": None}, {"max_tokens": 3})
    assert not image[ERROR] and image["multimodal_data"]["image"][0].size == (8, 8)
    broken = engine_request(clip | {"error": "no image"}, {})
    assert broken[ERROR] == "no image" and "messages" not in broken


def test_a_row_is_counted_once_and_a_damaged_part_is_refused(tmp_path):
    output = tmp_path / "out.parquet"
    images = pa.table({"row": [0, 1, 2], "path": ["a", "b", "c"], "prompt": ["?"] * 3})

    def answers(*numbers):
        rows = [{"row": row, "answer": f"{row}"} for row in numbers]
        return pa.Table.from_pylist(rows, schema=ANSWERS)

    parts = Parts(output, {"prompt": "?"}, lambda: images)
    parts.write([answers(2), answers(0, 2)])
    with pytest.raises(InputError, match="another run writes"):
        Parts(output, {"prompt": "?"}, lambda: images)
    parts.release()

    parts = Parts(output, {"prompt": "?"}, lambda: pytest.fail("the images are noted"))
    assert parts.missing()["row"].to_pylist() == [1]
    parts.write([answers(0, 1)])
    parts.release()
    first, second = sorted(parts_of(output).glob("part-*.parquet"))
    assert [len(parquet.read_table(part)) for part in (first, second)] == [2, 1]
    content = first.read_bytes()
    first.write_bytes(content[:50])
    with pytest.raises(InputError, match="damaged"):
        Parts(output, {"prompt": "?"}, lambda: images)
    first.write_bytes(content)
    Parts(output, {"prompt": "?"}, lambda: images).join()
    assert [(row["path"], row["answer"]) for row in rows(output)] == [
        ("a", "0"), ("b", "1"), ("c", "2"),
    ]  # fmt: skip
