"""Videos for tests, made by PyAV: small, of any times, sizes and ways to be stored."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


av = pytest.importorskip("av", reason="needs PyAV: pip install 'san_hf[video]'")


def write_clip(
    path: Path,
    images: Sequence[Image.Image],
    ticks: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    **container,
) -> Path:
    """
    A video file.

    Args:
        path: its ending says the container.
        images: the frames, as ffv1 to the pixel.
        ticks: times of the frames in units of `time_base`; one after the other by default.
        codec, pix_fmt, options: FFmpeg's.
        rotation: of the display matrix, in degrees counter-clockwise.
        **container: of `av.open`.
    """
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=1 / time_base, options=options or {})
        stream.width, stream.height = images[0].size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = stream.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(images):
            pixels = av.VideoFrame.from_ndarray(np.asarray(image), {"RGB": "rgb24", "RGBA": "rgba"}[image.mode])
            frame = pixels.reformat(format=pix_fmt)
            frame.pts, frame.time_base = number if ticks is None else ticks[number], time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def read_clip(path: Path) -> list[tuple[float, np.ndarray]]:
    """Time and pixels of each frame, by PyAV alone."""
    with av.open(str(path)) as file:
        return [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)
        ]


def noise(count: int, size: tuple[int, int] = (48, 32), seed: int = 0) -> list[Image.Image]:
    """Coloured patches, another image each."""
    rng = np.random.default_rng(seed)
    patches = [Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(count)]
    return [patch.resize(size, Image.Resampling.BICUBIC) for patch in patches]
