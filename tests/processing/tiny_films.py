"""Small films of grey frames, in every container."""

import av
import numpy as np

SIZE = (64, 48)


def encode(container, stream, shades, size):
    for i, shade in enumerate(shades):
        frame = av.VideoFrame.from_ndarray(
            np.full((size[1], size[0], 3), shade, np.uint8), format="rgb24"
        )
        frame.pts = i
        container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
    container.mux(stream.encode())


def add(container, codec="libx264", size=SIZE, rate=10, flags=None):
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24", "png": "rgb24"}.get(
        codec, "yuv420p"
    )
    if flags is not None:
        stream.disposition = flags
    return stream


def film(path, codec="libx264", frames=20, rate=10, shade=lambda i: 5 * i, size=SIZE, **options):
    """A video of frames that grow brighter."""
    with av.open(
        str(path),
        "w",
        options={"movflags": "faststart"} if str(path).endswith(("mp4", "mov")) else {},
        **options,
    ) as container:
        encode(
            container, add(container, codec, size, rate), [shade(i) for i in range(frames)], size
        )
    return path
