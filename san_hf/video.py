"""Moving pictures: frames out of video files and image sequences, and into video files. PyAV, of the extra `video`."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

from PIL import Image

from san_hf.extras import import_extra
from san_hf.images import load_image, to_rgb
from san_hf.messages import notify, one_line, printable
from san_hf.paths import list_images, paths_for


# Of a stored frame, counter-clockwise, to stand upright.
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
# PQ and HLG, by their numbers in ITU-T H.273.
HDR_TRANSFERS = {16, 18}
# Parts of one video can be joined as they are if no frame is stored before one that it is shown after: no B-frames.
# With its macroblock tree x264 encodes the same frames otherwise in one run of five (seen with AVX-512).
# Colours are converted by BT.709, which players expect of large frames and are told of all.
ENCODER, ENCODER_OPTIONS = (
    "libx264",
    {
        "crf": "18",
        "bf": "0",
        "mbtree": "0",
        "colorspace": "bt709",
        "color_primaries": "bt709",
        "color_trc": "bt709",
        "color_range": "tv",
    },
)
# Of what keeps times as they are and can be written from any time on.
PART_FORMAT = "nut"


class VideoError(ValueError):
    """A video that can't be read or written; the message says why, and what to do."""


@dataclass(frozen=True)
class Frame:
    """
    One frame, not yet converted.

    Attributes:
        number: in its video, from 0.
        name: of a file of its results: its number, or an image's name.
        time: seconds since the first frame; `None` in an image sequence without a rate.
        source: PyAV's frame, or an image file.
    """

    number: int
    name: str
    time: Fraction | None
    source: Any

    @property
    def image(self) -> Image.Image:
        """
        Upright, 8-bit RGB, transparent pixels laid on white; converted each time.

        Raises:
            ImageError: an image of a sequence can't be read.
        """
        if isinstance(self.source, Path):
            return load_image(self.source)
        opaque = not any(component.is_alpha for component in self.source.format.components)
        image = self.source.to_image() if opaque else Image.fromarray(self.source.to_ndarray(format="rgba"))
        turn = TURNS.get(self.source.rotation)
        return to_rgb(image if turn is None else image.transpose(turn))


class Frames(Protocol):
    """
    Frames in order: a [`VideoFile`] or an [`ImageSequence`].

    Attributes:
        files: what they are read from.
        count: of the frames, as the file says; 0 if it says nothing.
        rate: frames per second, on average; `None` without times.
        time_base: seconds; all times are multiples of it.
    """

    files: list[Path]
    count: int
    rate: Fraction | None
    time_base: Fraction

    def __iter__(self) -> Iterator[Frame]: ...


class VideoFile:
    """
    The frames of a video file's first video stream. Each iteration reads it from the start. Times are the file's own,
    whatever its frame rate does; where it has none, the average rate's.

    Args:
        path: of a local file; whatever it refers to is local, too.

    Raises:
        VideoError: no such file, none that FFmpeg reads, or one without video.
        MissingPackageError: without the extra `video` (PyAV).
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.files = Path(path), [Path(path)]
        if not self.path.is_file():
            reason = "it is no regular file" if self.path.exists() else "there is no such file"
            raise VideoError(f"{printable(self.path)}: {reason}.")
        with self._open() as container:
            stream = self._stream(container)
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self.time_base = stream.time_base or 1 / self.rate
            self._listed = stream.frames
            self.count = self._listed or round(Fraction(container.duration or 0, 1_000_000) * self.rate)

    def __iter__(self) -> Iterator[Frame]:
        """
        Raises:
            VideoError: a frame can't be decoded, or the file is cut off.
        """
        av, number, first, time = _av(), 0, None, Fraction(-1)
        with self._open() as container:
            stream = self._stream(container)
            stream.thread_type = "AUTO"
            try:
                for frame in container.decode(stream):
                    if frame.pts is None:
                        time = number / self.rate
                    else:
                        first = frame.pts if first is None else first
                        # Encoders refuse times that don't rise.
                        time = max((frame.pts - first) * self.time_base, time + self.time_base)
                    if number == 0 and frame.color_trc in HDR_TRANSFERS:
                        notify(
                            f"{printable(self.path)} is in high dynamic range: its colours are taken as they are, and "
                            "look pale. Convert it to BT.709 first if that matters."
                        )
                    yield Frame(number, f"{number:06d}", time, frame)
                    number += 1
            except av.FFmpegError as error:
                raise VideoError(
                    f"{printable(self.path)}: what follows its first {number} frames can't be decoded: "
                    f"{one_line(error)}."
                ) from error
        # Edit lists may leave a few of them out.
        if number < 0.9 * self._listed:
            raise VideoError(
                f"{printable(self.path)} says that it has {self._listed} frames, of which {number} could be read: it "
                "seems to be cut off."
            )

    def _open(self) -> Any:
        av = _av()
        try:
            # A name with a colon is no protocol, and a playlist's addresses are not fetched.
            return av.open(f"file:{os.path.abspath(self.path)}", options={"protocol_whitelist": "file"})
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{printable(self.path)} can't be read as a video: {one_line(error)}.") from error

    def _stream(self, container: Any) -> Any:
        # An album's cover is a video stream, too, of one image.
        cover = _av().stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise VideoError(f"{printable(self.path)} has no video stream.")
        return streams[0]


class ImageSequence:
    """
    Image files as the frames of a video.

    Args:
        files: in order.
        rate: frames per second; `None` for frames without times.

    Raises:
        VideoError: no files, or a rate that is none.
    """

    def __init__(self, files: Sequence[Path], rate: Fraction | None = None):
        if not files:
            raise VideoError("Got no images, expected at least one.")
        if rate is not None and not 0 < rate <= 1000:
            raise VideoError(f"Got {float(rate):g} frames per second, expected more than 0 and at most 1000.")
        self.files, self.rate, self.count = list(files), rate, len(files)
        self.time_base = Fraction(1) if rate is None else 1 / rate

    def __iter__(self) -> Iterator[Frame]:
        names = paths_for(((file.stem,) for file in self.files), Path())
        for number, (file, name) in enumerate(zip(self.files, names)):
            yield Frame(number, name.name, None if self.rate is None else number / self.rate, file)


def open_frames(
    source: str | os.PathLike, rate: Fraction | None = None, exclude: str | os.PathLike | None = None
) -> VideoFile | ImageSequence:
    """
    The frames of a video file, or those of an image sequence.

    Args:
        source: a video file; or a folder or a pattern such as "shots/*.png", whose images are the frames, in natural
            order: 2.png before 10.png.
        rate: of an image sequence, frames per second.
        exclude: a folder inside that is passed over.

    Raises:
        VideoError: it can't be read, or a rate is given for a video file.
        MissingPackageError: a video file, without the extra `video` (PyAV).
    """
    if os.path.isdir(source):
        files = list_images(source, exclude=exclude).files
        if not files:
            raise VideoError(f"There is no image in the folder '{printable(source)}'.")
        return ImageSequence(sorted(files, key=natural_order), rate)
    if not os.path.exists(source) and glob.has_magic(os.fspath(source)):
        files = [Path(file) for file in glob.glob(os.fspath(source), recursive=True) if os.path.isfile(file)]
        if not files:
            raise VideoError(f"Nothing matches the pattern '{printable(source)}'.")
        return ImageSequence(sorted(files, key=natural_order), rate)
    if rate is not None:
        raise VideoError("A video file has a frame rate of its own; only image sequences are given one.")
    return VideoFile(source)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """A key to sort by: numbers in a path by their value."""
    words = re.split(r"(\d+)", str(path))
    return [(int(word), word) if word.isdecimal() else (0, word) for word in words]


class VideoWriter:
    """
    Writes one video, H.264 in 4:2:0; for `with`. Of sides that are odd the last row or column is repeated once.

    Args:
        file: binary; of "mp4" one that can be sought in.
        time_base: seconds, of which all times are multiples.
        rate: frames per second, on average.
        format: FFmpeg's name of the container.

    Raises:
        VideoError: PyAV was built without the encoder.
        MissingPackageError: without the extra `video` (PyAV).
    """

    def __init__(self, file: BinaryIO, time_base: Fraction, rate: Fraction, format: str = "mp4"):
        self._av = _av()
        if ENCODER not in self._av.codecs_available:
            raise VideoError(f"This build of PyAV has no {ENCODER}, which videos are written by: install PyPI's.")
        self._time_base, self._rate = time_base, rate
        self._container = self._av.open(file, "w", format=format)
        self._stream: Any = None

    def write(self, image: Image.Image, time: Fraction) -> None:
        """
        Adds a frame.

        Args:
            image: 8-bit RGB, of the first one's size.
            time: seconds, later than that of the frame before.

        Raises:
            VideoError: an image of another size.
        """
        image = _even(image)
        if self._stream is None:
            self._stream = self._container.add_stream(ENCODER, rate=self._rate, options=ENCODER_OPTIONS)
            self._stream.width, self._stream.height = image.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._stream.time_base = self._time_base
        elif image.size != (self._stream.width, self._stream.height):
            raise VideoError(
                f"A frame is {image.width} x {image.height}, those before are {self._stream.width} x "
                f"{self._stream.height}: a video's frames must be of one size. Label frames need not."
            )
        frame = self._av.VideoFrame.from_image(image).reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = round(time / self._time_base), self._time_base
        self._mux(self._stream.encode(frame))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._stream is not None:
            self._mux(self._stream.encode(None))
        self._container.close()

    def _mux(self, packets: Sequence[Any]) -> None:
        for packet in packets:
            # Players leave out a last frame that lasts no time.
            packet.duration = packet.duration or max(1, round(1 / (self._rate * packet.time_base)))
            self._container.mux(packet)


def join_videos(parts: Sequence[Path], file: BinaryIO) -> None:
    """
    Puts parts of one video behind each other, in MP4, without encoding them again.

    Args:
        parts: of a [`VideoWriter`] with `PART_FORMAT` each; times rise over them.
        file: binary, to write to.
    """
    av = _av()
    with av.open(file, "w", format="mp4") as joined:
        stream, before = None, 0
        for part in parts:
            with av.open(f"file:{os.path.abspath(part)}") as container:
                source = container.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is not None:  # the last one is empty
                        packet.stream = stream
                        packet.duration = packet.duration or max(1, packet.dts - before)
                        before = packet.dts
                        joined.mux(packet)


def pyav_version() -> str:
    """
    The version of PyAV, and so of FFmpeg and its encoders.

    Raises:
        MissingPackageError: without the extra `video` (PyAV).
    """
    return _av().__version__


def _av() -> ModuleType:
    return import_extra("av", "video", "Reading or writing videos")


def _even(image: Image.Image) -> Image.Image:
    """With even sides."""
    size = image.width + image.width % 2, image.height + image.height % 2
    if size == image.size:
        return image
    larger = image.resize(size, Image.Resampling.NEAREST, box=(0, 0, *image.size))
    larger.paste(image)
    return larger
