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
