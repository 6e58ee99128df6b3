"""What `san-hf segment` has done in an output folder: a line for each image, so that the same command can go on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from san_hf.files import json_text, new_file
from san_hf.json_files import parse_json
from san_hf.messages import printable


_NAME = ".segment"


class JournalError(ValueError):
    """A run can't go on with what is in its output folder; the message says why."""


def parse_shard(text: str | None) -> tuple[int, int]:
    """
    "2/4" as (2, 4), the second of four parts; `None` as (1, 1).

    Raises:
        ValueError: no two numbers of that kind.
    """
    number, slash, count = (text or "1/1").partition("/")
    if slash and number.isascii() and number.isdigit() and count.isascii() and count.isdigit():
        if 1 <= int(number) <= int(count):
            return int(number), int(count)
    raise ValueError(f"Got --shard {text!r:.40}, expected NUMBER/COUNT, such as 1/4 to 4/4 for four machines.")


class Journal:
    """
    The images that were segmented, with what their labels depend on. A file of the output folder for each shard; a
    line for each image, written when its files are complete.

    Args:
        output: the folder.
        shard: number and count.
        settings: of the run, plain values of JSON, by what users call them.
    """

    def __init__(self, output: Path, shard: tuple[int, int], settings: Mapping[str, Any]):
        number, count = shard
        self.output = output
        self.path = output / (f"{_NAME}-{number}-of-{count}.jsonl" if count > 1 else f"{_NAME}.jsonl")
        self.settings = parse_json(json_text(settings), "the settings")
        self._file: BinaryIO | None = None

    def resume(self) -> dict[str, Any]:
        """
        The facts of each image that was segmented, by output name, for [`is_done`]; empty where no run has begun.
        Those of all shards, so that a run may go on in another number of them.

        Raises:
            JournalError: that run had other settings, or its journal can't be read.
        """
        journals = {path: self._read(path) for path in self._journals()}
        same = [done for then, done in journals.values() if then == self.settings]
        if journals and not same:
            then, _ = journals.get(self.path) or next(iter(journals.values()))
            changed = [name for name in {**then, **self.settings} if then.get(name) != self.settings.get(name)]
            differences = "; ".join(
                f"{name} was {_short(then.get(name))} and is {_short(self.settings.get(name))}" for name in changed
            )
            raise JournalError(
                f"'{printable(self.output)}' was begun with other settings: {differences}. Resume with those, or use "
                "another --output."
            )
        return {output: image for done in same for output, image in done.items()}

    def begun(self) -> bool:
        """Whether a run has begun in this folder."""
        return bool(self._journals())

    def _journals(self) -> list[Path]:
        return sorted(self.output.glob(f"{_NAME}*.jsonl"))

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of a journal, and the facts of its images."""
        try:
            # A kill may have cut the last line off.
            lines = path.read_bytes().split(b"\n")[:-1]
            header, *entries = [parse_json(line, "a line") for line in lines]
            return dict(header["settings"]), {entry["output"]: entry["image"] for entry in entries}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"'{printable(path)}', which says what was done, can't be read: {error}. Use --overwrite to begin "
                "anew, or another --output."
            ) from error

    def open(self, keep: bool) -> "Journal":
        """Begins to write; `keep` goes on with what is there. To be used with `with`."""
        if not (keep and self.path.exists()):
            with new_file(self.path) as file:
                file.write(json_text({"settings": self.settings}).encode("utf-8") + b"\n")
        self._file = open(self.path, "r+b")
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)
        return self

    def add(self, image: str | Path, stem: Path) -> None:
        """Notes that an image's files are complete."""
        if self._file is None:
            raise RuntimeError("The journal isn't open.")
        entry = {"output": self._name(stem), "image": image_facts(image)}
        self._file.write(json_text(entry).encode("utf-8") + b"\n")
        self._file.flush()

    def is_done(self, done: Mapping[str, Any], image: str | Path, stem: Path, files: Sequence[Path]) -> bool:
        """Whether all files of an image are there, and the image is the one they were made of."""
        facts = done.get(self._name(stem))
        return facts is not None and facts == image_facts(image) and all(file.is_file() for file in files)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _name(self, stem: Path) -> str:
        return printable(stem.relative_to(self.output))


def image_facts(image: str | Path) -> dict[str, Any] | None:
    """What tells an image file from another one of its name; `None` for a file that isn't there."""
    try:
        status = os.stat(image)
    except OSError:
        return None
    return {"file": printable(os.path.abspath(image)), "size": status.st_size, "modified": status.st_mtime_ns}


def model_facts(model: str) -> Any:
    """A model's name; of a folder also its files with their sizes and times, which change when it is trained on."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".safetensors", ".json"))
    return [model, *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _short(value: Any) -> str:
    text = "not given" if value is None else json_text(value)
    return text if len(text) <= 80 else text[:77] + "..."
