"""State of an evaluation: what one process has counted so far, in a file to go on from."""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.evaluation.pictures import KeptExamples
from san_hf.files import write_file
from san_hf.messages import one_line
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor


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
        predictions_size: how many bytes of the process's predictions belong to the state.
    """

    def __init__(self, metrics: ConfusionMatrixMetrics, kept: KeptExamples):
        self.metrics, self.kept = metrics, kept
        self.done = 0
        self.broken: list[tuple[int, str]] = []
        self.predictions_size = 0

    def state_dict(self) -> dict[str, Any]:
        metrics = {key: v.cpu() if torch.is_tensor(v) else v for key, v in self.metrics.state_dict().items()}
        facts = {key: getattr(self, key) for key in ("done", "broken", "predictions_size")}
        return facts | {"metrics": metrics, "kept": self.kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics.load_state_dict(state["metrics"])
        self.kept.load_state_dict(state["kept"])
        for key in ("done", "broken", "predictions_size"):
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
        write_file(self.path, content.getvalue())

    def load(self, state: EvaluationState) -> None:
        """
        Goes on from the file, if there is one.

        Raises:
            EvaluationError: the file can't be read, or is of other settings.
        """
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings = saved["settings"]
        # Broken files make torch fail in ways of its own.
        except Exception as error:
            raise EvaluationError(
                f"'{self.path}' can't be read: {one_line(error)}. Evaluate from the start, without resuming."
            ) from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                was, now = (f"{setting!s:.100}" for setting in (settings.get(name), value))
                difference = f"; it was {was} and is {now} now" if was != now else ""
                raise EvaluationError(
                    f"'{self.path.parent}' is of another evaluation: the {name} differs{difference}. Use the same "
                    "options, or evaluate from the start, without resuming."
                )
        state.load_state_dict(saved["state"])


def model_checksum(model: SANForSemanticSegmentation, processor: SANProcessor) -> str:
    """Changes with any weight and with the processor's settings."""
    checksum = zlib.crc32(repr(sorted(processor.to_dict().items(), key=str)).encode())
    for tensor in model.state_dict().values():
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a process's share of it
        values = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """
    Raises:
        EvaluationError: for an `OSError` in the block.
    """
    try:
        yield
    except OSError as error:
        raise EvaluationError(
            f"Can't write to '{folder}': {one_line(error)}. The state that was saved before is kept: resume from it "
            "when the cause is removed."
        ) from error
