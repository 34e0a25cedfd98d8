"""Small video files, made by PyAV."""

from fractions import Fraction

import numpy as np


def write_clip(path, times, size=(64, 48), codec="mpeg4", sound=False):
    """A video whose n-th frame has the gray level 20 n + 10, shown at `times` in milliseconds; the last
    one as long as the first.
    """
    import av

    times = list(times)
    lasts = times[1] - times[0] if len(times) > 1 else 100

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(1000, lasts))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            gray = np.full((*size[::-1], 3), (20 * number + 10) % 240, np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_changing(path, sizes, each=5):
    """A video that changes its size: a few frames of each one, the n-th of all of gray level 20 n + 10."""
    import av

    tenth = Fraction(1, 10)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
        for number in range(each * len(sizes)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = sizes[number // each]
            encoder.pix_fmt, encoder.time_base = "yuvj420p", tenth
            gray = np.full((encoder.height, encoder.width, 3), 20 * number + 10, np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = number, tenth
            for packet in encoder.encode(frame):
                packet.stream, packet.time_base = stream, tenth
                packet.pts = packet.dts = number
                container.mux(packet)
    return path
