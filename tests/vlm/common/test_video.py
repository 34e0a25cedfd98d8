"""Reading frames of video files that PyAV makes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from video_files import write_changing, write_clip

from vlm_prune.vlm.common import video
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.video import VideoClip, _Bytes, is_video, open_video

av = pytest.importorskip("av")


def shown(clip):
    """The numbers of the frames, read from their gray levels."""
    return [round((float(frame.mean()) - 10) / 20) for frame in clip.frames]


def test_frames_at_even_distances(tmp_path):
    path = write_clip(tmp_path / "a.mp4", range(0, 1000, 100))
    done = []
    clip = open_video(path, frames=5, advance=done.append)
    assert done == [1] * 5
    assert clip.frames.shape == (5, 48, 64, 3) and clip.frames.dtype == np.uint8
    assert shown(clip) == [1, 3, 5, 7, 9]
    assert clip.times == pytest.approx((0.1, 0.3, 0.5, 0.7, 0.9), abs=0.002)
    assert clip.duration == pytest.approx(1, abs=0.1)
    assert shown(open_video(path, fps=2)) == [2, 7]
    assert len(open_video(path, frames=64).frames) == 10
    assert len(open_video(path, frames=4, fps=100).frames) == 4
    assert open_video(clip) is clip


def test_a_variable_rate_gives_the_times_that_frames_are_shown_at(tmp_path):
    """Five frames in the first half second, and one for each second after it."""
    path = write_clip(tmp_path / "a.mkv", [0, 100, 200, 300, 400, 1000, 2000, 3000])  # 3.1 s
    clip = open_video(path, frames=8)
    assert shown(clip) == [1, 4, 5, 6]
    assert clip.duration == pytest.approx(3.1, abs=0.002)
    metadata = clip.metadata()
    assert metadata.timestamps == pytest.approx(clip.times, abs=0.002)
    assert metadata.timestamps == pytest.approx([0.1, 0.4, 1, 2], abs=0.002)


def test_long_gaps_are_skipped_and_give_the_same_frames(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", range(0, 11000, 1000))
    expected = open_video(path, frames=3)
    monkeypatch.setattr("vlm_prune.vlm.common.video.SEEK_SECONDS", 0.5)
    again = open_video(path, frames=3)
    assert again.times == expected.times and shown(again) == shown(expected) == [1, 5, 9]


class Reads:
    """What is read of a file."""

    def __init__(self, monkeypatch):
        self.bytes, own = 0, _Bytes.read

        def read(file, count):
            data = own(file, count)
            self.bytes += len(data)
            return data

        monkeypatch.setattr(_Bytes, "read", read)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_little_of_a_long_file_is_read_and_decoded(suffix, tmp_path, monkeypatch):
    """Noise of 40 seconds, with a key frame each second; four frames are kept."""
    path, draw = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.bit_rate, stream.gop_size = 8_000_000, 10
        for _ in range(400):
            frame = draw.integers(0, 256, (120, 160, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    reads, seen, following = Reads(monkeypatch), [], video._following
    monkeypatch.setattr(
        video, "_following", lambda *given: seen.append(following(*given)) or seen[-1]
    )
    clip = open_video(path, frames=4)
    assert clip.times == pytest.approx((5, 15, 25, 35), abs=0.002)
    assert clip.duration == pytest.approx(40, abs=0.002)
    assert len(seen) <= 12
    assert 0 < reads.bytes < path.stat().st_size / 2


def peak_bytes(call):
    """The most memory of this process during a call, beyond what it has before it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be set back here")

    def read(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    before = read("VmRSS:")
    call()
    return read("VmHWM:") - before


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path):
    """Eight frames of 0.9 MB; all of the longer file are 360 MB."""
    paths = [
        write_clip(tmp_path / f"{count}.{suffix}", range(0, 40 * count, 40), (640, 480))
        for count in (25, 400)
    ]
    open_video(paths[0], frames=8)
    short, long = (peak_bytes(lambda own=own: open_video(own, frames=8)) for own in paths)
    assert long < short + 40_000_000


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_is_behind_a_video_in_its_file_is_not_read(suffix, tmp_path, monkeypatch):
    """Zeros, as in a file that was made larger than it is."""
    monkeypatch.setattr(video, "MOST_BETWEEN", 2_000_000)
    path = write_clip(tmp_path / f"a.{suffix}", range(0, 1000, 100))
    with path.open("ab") as file:
        file.truncate(4_000_000_000)
    reads = Reads(monkeypatch)
    assert shown(open_video(path, frames=2)) == [2, 7]
    assert reads.bytes < 10_000_000


def test_a_large_file_without_frames_is_refused_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MOST_BETWEEN", 2_000_000)
    path = empty(tmp_path / "a.mkv")
    with path.open("ab") as file:
        file.truncate(4_000_000_000)
    reads = Reads(monkeypatch)
    with pytest.raises(InputError, match="; give (another|a whole video) file"):
        open_video(path)
    assert reads.bytes < 10_000_000


def test_frames_of_another_size_are_scaled_to_the_first_ones(tmp_path):
    clip = open_video(write_changing(tmp_path / "clip.mkv", [(64, 48), (32, 24)]), 10)
    assert clip.frames.shape == (10, 48, 64, 3)
    levels = clip.frames.mean((1, 2, 3))
    assert np.abs(levels - (20 * np.arange(10) + 10)).max() < 3


def test_one_frame_is_a_clip(tmp_path):
    clip = open_video(write_clip(tmp_path / "a.mp4", [0]), frames=8)
    assert len(clip.frames) == 1 and clip.times == (0.0,)
    assert clip.metadata().total_num_frames >= 1


def audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def empty(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def cut_short(path):
    whole = write_clip(path, range(0, 10000, 100)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (audio, {}, "has no video stream"),
        (empty, {}, "cannot read video|without frames|has no video stream"),
        (cut_short, {}, "cannot read video|has no video stream"),
        (lambda path: cut_short(path.with_suffix(".mkv")), {}, "is cut short: it says 10.0 seconds and"),
        (noise, {}, "cannot read video"),
        (lambda path: path, {}, "does not exist; give a video file"),
        (lambda path: path.mkdir() or path, {}, "is no regular file"),
        (lambda path: write_clip(path, [0]), {"frames": 0}, "frames 0 is out of range"),
        (lambda path: write_clip(path, [0]), {"fps": 0.0}, "fps 0.0 is out of range"),
        (lambda path: write_clip(path, [0, 100]), {"frames": 10**6}, "more than 4 GB; give fewer"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_in_one_line(make, options, message, tmp_path):
    with pytest.raises(InputError, match=message) as refusal:
        open_video(make(tmp_path / "a.mp4"), **options)
    assert "\n" not in str(refusal.value)


def test_without_a_decoder_the_extra_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [0])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'vlm-prune\[video\]'"):
        open_video(path)


def test_what_is_a_video():
    clip = VideoClip(np.arange(8, dtype=np.uint8)[:, None, None, None], tuple(range(8)), 8.0)
    assert clip.thinned(3).times == (1, 4, 6) and clip.thinned(8) is clip.thinned(9) is clip
    assert clip.thinned(1).frames.flatten().tolist() == [4]
    assert is_video("a.MP4") and is_video(VideoClip(np.zeros((1, 2, 2, 3), np.uint8), (0.0,), 1.0))
    assert not is_video("a.png") and not is_video(np.zeros((2, 2, 3), np.uint8))
