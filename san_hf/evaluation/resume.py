"""State of an evaluation: what one process has counted so far, in a file to go on from."""

import io
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.evaluation.pictures import KeptExamples
from san_hf.files import write_file
from san_hf.locks import InUseError, locked
from san_hf.messages import one_line
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.torch_files import load_torch_file


CHECKSUM_SIZE = 8  # hexadecimal digits at the end of a state's file


class EvaluationError(ValueError):
    """An evaluation that can't be made or continued; the message says why, and what to do."""


class EvaluationState:
    """
    Resumable state of one process: counts, kept examples and broken examples after `done` images.

    Attributes:
        done: how many of the process's images were seen.
        metrics: counts of pixels.
        kept: examples to draw, and the worst images.
        broken: index of each example that was left out, and what is wrong with it.
        predictions_size: how many bytes of the process's predictions belong to the state, and their checksum.
        examples: fingerprint of the images and label maps that were seen.
    """

    FACTS = ("done", "broken", "predictions_size", "predictions_checksum", "examples")

    def __init__(self, metrics: ConfusionMatrixMetrics, kept: KeptExamples):
        self.metrics, self.kept = metrics, kept
        self.done = 0
        self.broken: list[tuple[int, str]] = []
        self.predictions_size = self.predictions_checksum = 0
        self.examples: str | None = None

    def state_dict(self) -> dict[str, Any]:
        metrics = {key: v.cpu() if torch.is_tensor(v) else v for key, v in self.metrics.state_dict().items()}
        facts = {key: getattr(self, key) for key in self.FACTS}
        return facts | {"metrics": metrics, "kept": self.kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics.load_state_dict(state["metrics"])
        self.kept.load_state_dict(state["kept"])
        for key in self.FACTS:
            setattr(self, key, state[key])


class StateFile:
    """
    The file with a process's state.

    Args:
        path: of the file.
        settings: all that the state depends on, by what to call it in errors.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def save(self, state: EvaluationState) -> None:
        content = io.BytesIO()
        # torch.save into a file would turn a full disk's error into one of its own.
        torch.save({"settings": self.settings, "state": state.state_dict()}, content)
        write_file(self.path, content.getvalue() + _checksum(content.getvalue()))

    def load(self, state: EvaluationState) -> None:
        """
        Goes on from the file, if there is one.

        Raises:
            EvaluationError: the file can't be read, is damaged, or is of other settings.
        """
        if not self.path.exists():
            return
        try:
            content = self.path.read_bytes()
            if _checksum(content[:-CHECKSUM_SIZE]) != content[-CHECKSUM_SIZE:]:
                raise ValueError("its checksum isn't that of what was written")
            saved = load_torch_file(io.BytesIO(content[:-CHECKSUM_SIZE]))
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"'{self.path}' is damaged: {one_line(error)}. Evaluate from the start, without resuming."
            ) from error
        settings = saved["settings"]
        for name, value in self.settings.items():
            if settings.get(name) != value:
                was, now = (f"{setting!s:.100}" for setting in (settings.get(name), value))
                difference = f"; it was {was} and is {now} now" if was != now else ""
                raise EvaluationError(
                    f"'{self.path.parent}' is of another evaluation: the {name} differs{difference}. Use the same "
                    "options, or evaluate from the start, without resuming."
                )
        state.load_state_dict(saved["state"])


def _checksum(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)


def model_checksum(model: SANForSemanticSegmentation, processor: SANProcessor) -> str:
    """Changes with any weight and with the processor's settings."""
    checksum = zlib.crc32(repr(sorted(processor.to_dict().items(), key=str)).encode())
    for tensor in model.state_dict().values():
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a process's share of it
        values = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def evaluation_lock(folder: Path) -> AbstractContextManager[None]:
    """One evaluation at a time writes to a folder, which exists; see [`locked`]."""
    return locked(folder / ".lock", f"An evaluation in '{folder}'")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """
    Raises:
        EvaluationError: for an `OSError` in the block.
    """
    try:
        yield
    except InUseError:
        raise
    except OSError as error:
        raise EvaluationError(
            f"Can't write to '{folder}': {one_line(error)}. The state that was saved before is kept: resume from it "
            "when the cause is removed."
        ) from error
