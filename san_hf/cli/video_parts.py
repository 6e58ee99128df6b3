"""What `san-hf video` writes: part by part, so that a run that was stopped goes on, and joined when all are there."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_hf.ahead import run_ahead
from san_hf.cli.segment_journal import Journal
from san_hf.files import json_text, new_file, remove_files, write_file
from san_hf.locks import locked
from san_hf.messages import printable


if TYPE_CHECKING:
    from PIL import Image

    from san_hf.inference import Segmentation
    from san_hf.video import Frame, Frames

# Frames of a part: what is lost by a kill at most, and how often a video has a key frame, to seek to.
PART_FRAMES = 64


class VideoParts:
    """
    The results of one video in an output folder, and the parts of them while they are made, in a folder of their own.

    Args:
        frames: the video's.
        stem: path that the results' names begin with.
        formats: "overlay", "mask", "png-labels" and "json". Overlays and masks are videos, or images where frames have
            no times.
        settings: all that the results depend on, see [`Journal`].
    """

    def __init__(self, frames: "Frames", stem: Path, formats: list[str], settings: Mapping[str, Any]):
        self.frames, self.stem = frames, stem
        pictures = [name for name in formats if name in ("overlay", "mask")]
        timed = frames.rate is not None
        self.videos = {name: Path(f"{stem}.{name}.mp4") for name in pictures if timed}
        self.folders = {name: Path(f"{stem}.{name}") for name in pictures if not timed}
        if "png-labels" in formats:
            self.folders["labels"] = Path(f"{stem}.labels")
        self.legend = Path(f"{stem}.json") if {"json", "png-labels"} & {*formats} else None
        self.table = Path(f"{stem}.frames.jsonl") if "json" in formats else None
        self.work = stem.with_name(f".{stem.name}.video")
        self.journal = Journal(self.work, (1, 1), settings)
        self._drawings = Drawings()

    @property
    def files(self) -> list[Path]:
        """Those of the results that are files."""
        return [*self.videos.values(), *filter(None, (self.legend, self.table))]

    def existing(self) -> list[Path]:
        """What an earlier run has left or finished."""
        begun = [self.work] if self.journal.begun() else []
        return [path for path in (*self.files, *self.folders.values()) if path.exists()] + begun

    @contextmanager
    def open(self, resume: bool) -> Iterator[int | None]:
        """
        Looks what an earlier run has done, for `with`; no other process may write these results meanwhile.

        Args:
            resume: whether to go on with it.

        Yields:
            The number of parts that are complete; `None` if all results are.

        Raises:
            JournalError: the run to resume had other settings.
            InUseError: another process writes these results.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.work / ".lock", f"Segmenting into '{printable(self.stem)}'"):
                done = self.journal.resume() if resume else {}
                finished = self.journal.is_done(done, self.frames.files[0], self._finished, self.files)
                # Of a finished run the journal has a line for each part, and one for all.
                finished = finished and self._count(done, with_videos=False) == len(done) - 1
                yield None if finished else self._count(done, with_videos=True)
        finally:
            with suppress(OSError):  # not empty
                self.work.rmdir()

    @contextmanager
    def begin(self, resume: bool) -> Iterator[None]:
        """Makes ready to write, for `with`; without `resume`, what an earlier run has left is removed."""
        for folder in self.folders.values():
            if not resume:
                remove_files(folder, ["*.png"])
            folder.mkdir(exist_ok=True)
        if not resume:
            for path in (*self.work.glob("[0-9]*"), *self.files):
                path.unlink(missing_ok=True)
        with self.journal.open(keep=resume):
            yield

    def write(self, number: int, segmented: "Iterable[tuple[Frame, Segmentation]]") -> None:
        """
        Writes the files of one part; those of its videos and its table appear when it is whole.

        Args:
            number: of the part, from 0.
            segmented: its frames.
        """
        from san_hf.video import PART_FORMAT, VideoWriter

        writers: dict[str, VideoWriter] = {}
        with ExitStack() as stack:
            table = stack.enter_context(new_file(self._part(number, "jsonl")))
            if self.frames.rate is not None:
                for name in self.videos:
                    file = stack.enter_context(new_file(self._part(number, name)))
                    writer = VideoWriter(file, self.frames.time_base, self.frames.rate, PART_FORMAT)
                    writers[name] = stack.enter_context(writer)

            def add(item: "tuple[Frame, Segmentation]") -> None:
                frame, segmentation = item
                for name, writer in writers.items():
                    if frame.time is not None:
                        writer.write(self._drawings.draw(name, segmentation), frame.time)
                for name, folder in self.folders.items():
                    with new_file(folder / f"{frame.name}.png") as file:
                        self._drawings.draw(name, segmentation).save(file, format="png")
                table.write(json_text(_facts(frame, segmentation)).encode("utf-8") + b"\n")

            for _, written in run_ahead(add, segmented, 1):
                written.result()

    def note(self, number: int) -> None:
        """Notes that a part is whole."""
        self.journal.add(self.frames.files[0], self._part(number, "jsonl"))

    def join(
        self, parts: int, legend: list[dict[str, Any]], facts: Mapping[str, Any]
    ) -> tuple[int, list[dict[str, Any]]]:
        """
        Makes the results of their parts.

        Args:
            parts: their number.
            legend: all classes, see [`Segmentation.legend`].
            facts: further entries of the legend's file.

        Returns:
            The number of frames, and the legend with the pixels of all of them.
        """
        from san_hf.video import join_videos

        for name, path in self.videos.items():
            with new_file(path) as file:
                join_videos([self._part(number, name) for number in range(parts)], file)
        frames, total, pixels = 0, 0, dict.fromkeys((entry["name"] for entry in legend), 0)
        with new_file(self.table) if self.table is not None else nullcontext() as file:
            for number in range(parts):
                for frame in self._frames(number):
                    frames += 1
                    total += frame["width"] * frame["height"]
                    for name, own in frame["pixels"].items():
                        pixels[name] += own
                if file is not None:
                    file.write(self._part(number, "jsonl").read_bytes())
        legend = [
            {**entry, "pixels": pixels[entry["name"]], "share": pixels[entry["name"]] / total} for entry in legend
        ]
        if self.legend is not None:
            write_file(self.legend, json_text({**facts, "frames": frames, "classes": legend}, indent=2) + "\n")
        return frames, legend

    def finish(self, parts: int) -> None:
        """Notes that all results are there, and removes the videos' parts."""
        self.journal.add(self.frames.files[0], self._finished)
        for name in self.videos:
            for number in range(parts):
                self._part(number, name).unlink(missing_ok=True)

    @property
    def _finished(self) -> Path:
        return self.work / "all"

    def _part(self, number: int, kind: str) -> Path:
        return self.work / f"{number:06d}.{kind}"

    def _frames(self, number: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._part(number, "jsonl").read_bytes().splitlines()]

    def _count(self, done: Mapping[str, Any], with_videos: bool) -> int:
        """Number of parts, from the first on, that are whole and whose files are there."""
        for number in count():
            table = self._part(number, "jsonl")
            videos = [self._part(number, name) for name in self.videos] if with_videos else []
            if not self.journal.is_done(done, self.frames.files[0], table, [table, *videos]):
                return number
            names = [frame["name"] for frame in self._frames(number)]
            if not all((folder / f"{name}.png").is_file() for folder in self.folders.values() for name in names):
                return number
        return 0


class Drawings:
    """What is drawn of a frame, with what all frames of a size have in common drawn once."""

    def __init__(self) -> None:
        self._overlays: dict[tuple[int, int], Any] = {}

    def draw(self, name: str, segmentation: "Segmentation") -> "Image.Image":
        """
        Args:
            name: "overlay", "mask" or "labels".
            segmentation: of a frame.
        """
        from PIL import Image

        from san_hf.visualization import FrameOverlays

        if name == "labels":
            return Image.fromarray(segmentation.label_map)
        if name == "mask":
            return segmentation.mask()
        size = segmentation.image.size
        if size not in self._overlays:
            self._overlays = {size: FrameOverlays(size, segmentation.class_names, segmentation.colors)}
        return self._overlays[size].draw(segmentation.image, segmentation.label_map)


def _facts(frame: "Frame", segmentation: "Segmentation") -> dict[str, Any]:
    """What the table has of a frame."""
    counts = {name: int(count) for name, count in zip(segmentation.class_names, segmentation.pixels) if count}
    return {
        "frame": frame.number,
        "name": frame.name,
        "time": None if frame.time is None else float(frame.time),
        "width": segmentation.width,
        "height": segmentation.height,
        "pixels": counts,
    }
