"""Frames of video files, at times of their own; no more of a file is held than the frames kept."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.images import MAX_PIXELS, ImageSource, open_image

SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv",
    ".ts", ".webm", ".wmv",
)  # fmt: skip
MAX_BYTES = 4_000_000_000
FRAMES = 32  # of a video file, unless given
SEEK_SECONDS = 10.0  # gaps that are skipped in files without an index
HEAD = 32  # packets among which the first frame is: frames are stored up to 16 places early
MOST_BETWEEN = 128_000_000  # bytes without a packet, after which a file is taken to have ended


def no_bar(frames: int) -> AbstractContextManager[Callable[[int], None]]:
    """Returns what stands for a progress bar over frames where there is none."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class VideoClip:
    """Frames of a video.

    Args:
        frames: (T, height, width, 3) of uint8.
        times: when each is shown, in seconds from the first one of the video.
        duration: of the whole video, in seconds.
    """

    frames: NDArray[np.uint8]
    times: tuple[float, ...]
    duration: float

    def thinned(self, frames: int) -> "VideoClip":
        """Returns as many of these frames at most: those in the middle of equal spans, as of a file."""
        total = len(self.frames)
        if frames >= total:
            return self
        chosen = [(2 * n + 1) * total // (2 * frames) for n in range(frames)]
        times = tuple(self.times[at] for at in chosen)
        return VideoClip(self.frames[chosen], times, self.duration)

    def metadata(self) -> Any:
        """Returns what processors are told of these frames: their numbers in a video
        of a thousand frames a second.

        So times are right even where the file's rate varies.
        """
        from transformers.video_utils import VideoMetadata

        indices = [round(1000 * time) for time in self.times]
        height, width = self.frames.shape[1:3]
        total = max(round(1000 * self.duration), indices[-1] + 1)
        return VideoMetadata(
            total, fps=1000.0, width=width, height=height, duration=self.duration,
            frames_indices=indices,
        )  # fmt: skip


def is_video(source: Any) -> bool:
    """Returns whether a source is a `VideoClip`, or a path that ends as video files do."""
    if isinstance(source, VideoClip):
        return True
    return isinstance(source, str | Path) and Path(source).suffix.lower() in SUFFIXES


def check_rate(frames: int, fps: float | None) -> None:
    """Raises `InputError` unless a video can be read in `frames` frames,
    or in `fps` of them for each second.
    """
    if frames < 1:
        raise InputError(f"frames {frames} is out of range; give 1 or more")
    if fps is not None and not 0 < fps < float("inf"):
        raise InputError(f"fps {fps} is out of range; give more than 0")


def open_video(
    source: str | Path | VideoClip,
    frames: int = FRAMES,
    fps: float | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> VideoClip:
    """Reads frames of a video file, upright and in RGB.

    The video is cut into as many equal spans as there are frames, and of each the frame is kept
    that is shown in its middle; one that is shown in the middle of several is kept once. Frames of
    another size than the first are scaled to it.

    Args:
        source: a file, or a clip, which is returned as it is.
        frames: how many, at most.
        fps: frames for each second instead, `frames` at most.
        advance: called with the number of frames that were read since the last call.

    Raises:
        InputError: if there is no decoder, the file is missing, broken or cut short, or has no
            video.
    """
    if isinstance(source, VideoClip):
        return source
    check_rate(frames, fps)
    path = Path(source)
    if not path.is_file():
        missing = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"{path} {missing}; give a video file")
    with _opened(path) as video:
        start, duration = _span(video)
        wanted = frames if fps is None else min(frames, max(1, int(float(duration) * fps)))
        _check_size(path, wanted, video.stream)
        targets = [(2 * n + 1) * duration / (2 * wanted) for n in range(wanted)]
        kept, times = _shown(video, start, targets, advance)
    return VideoClip(np.stack(kept), tuple(times), float(duration))


def open_visual(
    source: ImageSource | VideoClip,
    frames: int = FRAMES,
    fps: float | None = None,
    bar: Callable[[int], AbstractContextManager[Callable[[int], None]]] = no_bar,
) -> Image.Image | VideoClip:
    """Returns a video's frames where `source` is one, else an image in RGB.

    Args:
        source: a file, a Pillow image, an array or a clip.
        frames: of a video file, at most.
        fps: frames for each second of a video file instead, `frames` at most.
        bar: shows how far reading that many frames has come; gives what to call with further ones.

    Raises:
        InputError: if it is no sound image or video.
    """
    if isinstance(source, VideoClip):
        return source
    if isinstance(source, str | Path) and is_video(source):
        with bar(frames) as advance:
            return open_video(source, frames, fps, advance)
    return open_image(source)


class _Bytes:
    """A file that ends where FFmpeg has read `MOST_BETWEEN` bytes since `between` was last set to 0.

    FFmpeg looks for a packet in a damaged or empty file up to its end, byte by byte.
    """

    def __init__(self, path: Path) -> None:
        self.file, self.between, self.name = path.open("rb"), 0, str(path)
        self.seek, self.tell = self.file.seek, self.file.tell

    def read(self, count: int) -> bytes:
        self.between += count
        return self.file.read(count) if self.between <= MOST_BETWEEN else b""


@dataclass
class _OpenVideo:
    """A video file that is read.

    Args:
        path: of the file, for messages.
        data: of it.
        container: of PyAV.
        stream: of frames, of the container.
    """

    path: Path
    data: _Bytes
    container: Any
    stream: Any

    def seek(self, at: int) -> None:
        """Moves to the key frame before time stamp `at`, in ticks of the stream."""
        self.data.between = 0
        self.container.seek(at, stream=self.stream)


@contextmanager
def _opened(path: Path) -> Iterator[_OpenVideo]:
    try:
        import av
    except ImportError:
        raise InputError("videos need a decoder: pip install 'vlm-prune[video]'") from None
    try:
        data = _Bytes(path)
        with data.file, av.open(data) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream; give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield _OpenVideo(path, data, container, stream)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read video {path}: {reason}; give a whole video file") from error


def _span(video: _OpenVideo) -> tuple[int, Fraction]:
    """Returns the time stamp of the first frame, and the seconds from
    there to the end of the last one.

    Stamps are read and nothing is decoded: those of the first packets and, where the file says how
    long it is, those from the last key frame on. Where these end early, or it does not say, all are.

    Raises:
        InputError: if there is no frame, or less than the file says.
    """
    path, container, stream = video.path, video.container, video.stream
    own = Fraction(max(0, stream.duration or 0)) * stream.time_base
    whole = Fraction(max(0, container.duration or 0), 10**6)
    stated = own or whole
    length = int(stated / stream.time_base)
    first, end = _stamps(video, HEAD, length)
    if first is None:
        raise InputError(f"{path} has a video stream without frames; give another file")
    if stated and end < first + length:
        end = max(end, _end_from(first + length, video))
    duration = (end - first) * stream.time_base
    if not stated or _is_short(duration, stated):
        video.seek(first)
        duration = (_stamps(video)[1] - first) * stream.time_base
    # the length of a file of several streams may be that of another one
    due = own or (whole if len(container.streams) == 1 else Fraction(0))
    if _is_short(duration, due):
        raise InputError(
            f"{path} is cut short: it says {float(due):.1f} seconds and holds {float(duration):.1f}; "
            "give the whole file"
        )
    video.seek(first)
    return first, duration


def _is_short(duration: Fraction, stated: Fraction) -> bool:
    """Returns whether seconds that were found are less than those stated, but for rounding."""
    return duration < Fraction(9, 10) * stated - 1


def _stamps(video: _OpenVideo, packets: int | None = None, last: int = 0) -> tuple[int | None, int]:
    """Returns when the first frame is shown, None where there is none, and when the last one ends, in
    ticks of the stream.

    Args:
        video: is read from where it is.
        packets: how many at most; all unless given.
        last: a time at which reading ends, if it is above 0.
    """
    stream, usual = video.stream, 1
    if stream.average_rate:
        usual = max(1, round(1 / (stream.average_rate * stream.time_base)))
    first, end, count = None, 0, 0
    for packet in video.container.demux(stream):
        if packet.pts is None:
            continue
        video.data.between, count = 0, count + 1
        until = packet.pts + (packet.duration or usual)
        first = packet.pts if first is None else min(first, packet.pts)
        end = max(end, until) if count > 1 else until
        if count == packets or (last and end >= last):
            break
    return first, end


def _end_from(last: int, video: _OpenVideo) -> int:
    """Returns when the last frame ends, reading from the key frame before `last`; 0 where there is
    none.
    """
    import av

    try:
        video.seek(last)
        return _stamps(video, last=last)[1]
    except av.FFmpegError:
        return 0


def _check_size(path: Path, frames: int, stream: Any) -> None:
    """Refuses frames that would not fit in memory.

    Args:
        path: of the file, for messages.
        frames: how many will be held.
        stream: of PyAV.
    """
    width, height = stream.width, stream.height
    if width * height > MAX_PIXELS:
        raise InputError(f"{path} has frames of {width} x {height}, above 89 million pixels")
    if 3 * frames * width * height > MAX_BYTES:
        raise InputError(
            f"{frames} frames of {width} x {height} of {path} are more than 4 GB; give fewer frames"
        )


def _skips(stream: Any, at: int, due: Fraction) -> bool:
    """Returns whether seeking leads from the frame at `at` to a later key frame that is not behind
    `due`, as the index says; in a file without one, whether `SEEK_SECONDS` lie between them.
    """
    entries: Any = getattr(stream, "index_entries", ())
    if len(entries) and entries[len(entries) - 1].timestamp >= due:
        found = entries.search_timestamp(int(due))
        return found >= 0 and bool(entries[found].timestamp > at)
    return float((due - at) * stream.time_base) > SEEK_SECONDS


def _following(video: _OpenVideo, frames: Iterator[Any]) -> Any:
    """Returns the next frame with a time stamp, None behind the last one."""
    video.data.between = 0
    return next((frame for frame in frames if frame.pts is not None), None)


def _shown(
    video: _OpenVideo,
    start: int,
    targets: list[Fraction],
    advance: Callable[[int], None],
) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """Returns the frames that are shown at `targets`, each once, and when they begin, in seconds.

    Args:
        video: before the first frame.
        start: time stamp of the first frame.
        targets: seconds, ascending.
        advance: called with 1 for each of them.
    """
    kept: list[NDArray[np.uint8]] = []
    times: list[float] = []
    stream, size = video.stream, (0, 0)
    frames, current, following = video.container.decode(stream), None, None
    for target in targets:
        due = start + target / stream.time_base
        at = start if current is None else current.pts
        if _skips(stream, at, due):
            # frames between are neither kept nor needed to decode others; some files' key frames are
            # shown later than where seeking finds them
            for place in (int(due), at):
                video.seek(place)
                frames = video.container.decode(stream)
                following = _following(video, frames)
                if following is not None and following.pts <= due:
                    break
        while following is None or following.pts <= due:
            if following is not None:
                current = following
            following = _following(video, frames)
            if following is None:
                break
            current = following if current is None else current
        if current is None:
            raise InputError(f"{video.path} has a video stream without frames; give another file")
        second = float((current.pts - start) * stream.time_base)
        if not times or second > times[-1]:
            # a stream may change its size: all frames get that of the first
            size = size if kept else (current.width, current.height)
            image = current.to_ndarray(format="rgb24", width=size[0], height=size[1])
            turns = round(getattr(current, "rotation", 0) / 90) % 4
            kept.append(np.rot90(image, turns) if turns else image)
            times.append(second)
        advance(1)
    return kept, times
