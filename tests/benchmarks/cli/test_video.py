"""`vlm-prune ask` with a video file."""

import numpy as np
import pytest
from tiny_families import Tiny

av = pytest.importorskip("av")
pytest.importorskip("torchvision")


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


def test_a_video_is_answered(run, clip, tmp_path, capsys):
    tiny = Tiny("llava_onevision")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    capsys.readouterr()  # transformers shows how it writes
    asked = ["ask", clip, "What color?", "--model", tmp_path, "--method", "evs", "--frames", "4"]
    code, answer, err = run(*asked, "--budget", "0.5")
    assert code == 0 and not err, err
    other = run(*asked, "--budget", "1.0")[1]
    assert answer != other


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
        ((clip, "What?", "--frames", "0"), "frames 0 is out of range"),
        ((clip, "What?", "--fps", "0"), "fps 0.0 is out of range"),
        ((clip, "What?", "--budget", "0"), "budget 0 is out of range"),
    ]:
        code, printed, err = run("ask", *arguments, "--model", checkpoint)
        assert code == 2 and not printed
        assert message in err and len(err.strip().splitlines()) == 1, err
