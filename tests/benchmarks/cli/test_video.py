"""`vlm-prune ask` with a video file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import Tiny

from vlm_prune.benchmarks.report.overlay import CAPTION, SMALL, contact_sheet
from vlm_prune.vlm.common.video import VideoClip

av = pytest.importorskip("av")
pytest.importorskip("torchvision")
OTHERS = ("llava_next_video", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            frame = draw.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(
    scope="module",
    params=["llava_onevision", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def of_videos(request, tmp_path_factory):
    """A random checkpoint of a family that takes videos."""
    folder, tiny = tmp_path_factory.mktemp(request.param), Tiny(request.param)
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


# 16 frames of 2 x 2 tokens and a newline, or of 3 x 3
@pytest.mark.parametrize(("family", "tokens"), [("llava_onevision", 65), ("internvl", 144)])
def test_tasks_about_videos_are_evaluated(run, tmp_path, family, tokens):
    tiny = Tiny(family)
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    code, out, err = run(
        "eval", "--model", tmp_path, "--method", "evs", "--budget", "2/frame", "--tasks",
        "appears,order,exist", "--limit", "6", "--batch-size", "4", "--output", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and "budget 2/frame" in out
    for row in rows:
        # images are whole
        if row["task"] == "exist":
            assert row["kept"][0] == [*range(row["image_tokens"][0])]
        else:
            assert (
                row["images"] == 1 and row["image_tokens"] == [tokens] and len(row["kept"][0]) == 32
            )


def test_fewer_frames_of_a_task_are_read(run, tmp_path):
    """Four of 16; a run with another number of frames is another one, and the report draws these."""
    tiny = Tiny("llava_onevision")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    command = [
        "eval",
        "--model",
        tmp_path,
        "--method",
        "evs",
        "--budget",
        "8",
        "--tasks",
        "appears",
    ]
    command += ["--limit", "1", "--output", tmp_path / "run"]
    assert run(*command, "--frames", "4")[0] == 0
    row = json.loads((tmp_path / "run/samples.jsonl").read_text())
    # 2 x 2 tokens of each and a newline
    assert row["image_tokens"] == [17] and row["video_grids"] == [[4, 2, 2]]
    assert run("report", tmp_path / "run")[0] == 0
    code, _, err = run(*command, "--frames", "8")
    assert code == 2 and "frames" in err
    assert run(*command, "--frames", "0")[0] == 2


def test_all_controls_are_compared_on_videos(run, tmp_path):
    """At two tokens of each of the 8 pairs of frames; smaller frames are 1 x 2 or 1 x 1."""
    tiny = Tiny("qwen2_5_vl")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    controls = "random,frames,pool,downsample"
    code, _, err = run(
        "compare", "--model", tmp_path, "--method", controls, "--budget", "2/frame", "--tasks",
        "appears", "--limit", "1", "--output", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0, err
    for name in controls.split(","):
        line = (tmp_path / f"runs/{name}-2-per-frame/samples.jsonl").read_text()
        row = json.loads(line)
        (kept,) = row["kept"]
        # smaller frames spare the tower work, and nothing else does
        spent = row["pruned_vision_flops"] or row["vision_flops"]
        assert (spent < row["vision_flops"] / 3) == (name == "downsample")
        spared = row["vision_flops"] - spent
        assert row["flops"]["baseline"] - row["flops"]["pruned"] > spared >= 0
        assert len(kept) in ((8, 16) if name == "downsample" else (16,))


def test_a_video_is_answered(run, of_videos, clip, tmp_path, capsys):
    capsys.readouterr()  # transformers shows how it writes
    sheet = tmp_path / "sheet.png"
    command = ["ask", clip, "What color?", "--model", of_videos, "--method", "evs", "--frames", "4"]
    code, answer, err = run(*command, "--budget", "0.5")
    assert code == 0 and not err, err
    other = run(*command, "--budget", "1.0", "--sheet", sheet)[1]
    assert answer != other
    # Qwen's models encode two frames as one
    rows = (
        1 if json.loads((of_videos / "config.json").read_text())["model_type"][:4] == "qwen" else 2
    )
    assert Image.open(sheet).size == (2 * SMALL, rows * (SMALL * 3 // 4 + CAPTION))


def test_a_contact_sheet_shows_which_tokens_of_each_frame_are_kept():
    """Three frames of 2 x 2 tokens, of which the model encodes two as one, and one that is alone."""
    frames = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (10, 20, 30, 40, 50)])
    clip = VideoClip(frames, (0.0, 1.0, 2.0, 3.0, 4.0), 5.0)
    sheet = contact_sheet(clip, torch.tensor([0, 6, 11, 12]), (3, 2, 2))
    assert sheet.size == (2 * SMALL, 2 * (SMALL + CAPTION))
    for frame, (level, own) in enumerate([(10, 0), (30, 2), (50, 3)]):
        left, top = frame % 2 * SMALL, frame // 2 * (SMALL + CAPTION) + CAPTION
        for token in range(4):
            middle = [SMALL // 4 + SMALL // 2 * at for at in (token % 2, token // 2)]
            color = sheet.getpixel((left + middle[0], top + middle[1]))
            assert color[0] == (level if token == own else level // 5 + 190)


def test_what_cannot_be_done_is_one_line(run, clip, checkpoint, images, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    images[0].save(tmp_path / "a.png")
    for arguments, message in [
        ((clip, "What?"), "llava models take no videos here; give their frames as images"),
        (
            (tmp_path / "a.png", "What?", "--method", "evs"),
            "EVS needs videos, which llava models lack; give one",
        ),
        ((tmp_path / "a.mp4", "What?"), "cannot read video"),
        ((tmp_path / "b.mp4", "What?"), "does not exist; give a video file"),
        (
            (tmp_path / "a.png", "What?", "--sheet", tmp_path / "s.png"),
            "draws the frames of a video",
        ),
        ((clip, "What?", "--frames", "0"), "frames 0 is out of range"),
        ((clip, "What?", "--fps", "0"), "fps 0.0 is out of range"),
        ((clip, "What?", "--budget", "0"), "budget 0 is out of range"),
        ((clip, "What?", "--budget", "0/frame"), "budget 0/frame is out of range"),
        ((clip, "What?", "--budget", "8/image"), "or tokens per frame of a video (8/frame)"),
    ]:
        code, printed, err = run("ask", *arguments, "--model", checkpoint)
        assert code == 2 and not printed
        assert message in err and len(err.strip().splitlines()) == 1, err
