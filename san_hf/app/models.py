"""The models and side adapters that an app was started with, by the names that the browser sees."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from san_hf.hub.load import load_model
from san_hf.inference.predictor import Predictor
from san_hf.loading import ModelError, check_processor
from san_hf.messages import one_line, printable
from san_hf.modeling import SANConfig, SANProcessor
from san_hf.paths import expand_path


@dataclass(frozen=True)
class _Choice:
    """A predictor, and which of its model's side adapters it is to use. Choices of one model share its lock."""

    predictor: Predictor
    side_adapter: str
    lock: threading.Lock = field(default_factory=threading.Lock)


class Models:
    """
    What can be chosen, by name: for each model, and each side adapter on the first model's CLIP, a predictor.

    A model answers one question at a time.
    """

    def __init__(self) -> None:
        self._choices: dict[str, _Choice] = {}

    @classmethod
    def load(
        cls,
        models: Sequence[str],
        side_adapters: Sequence[str] = (),
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Models":
        """
        Args:
            models: names, as [`san_hf.from_pretrained`] takes them; at least one.
            side_adapters: folders or repositories, trained on the CLIP of the first model.
            device: for all of them.
            dtype: for all of them.

        Raises:
            ModelError: there is no such model or side adapter, or it isn't complete or of another CLIP.
        """
        loaded = cls()
        for name in models:
            model, processor = load_model(name, dtype)
            # Transformers' decorator of `to` hides its signature.
            predictor = Predictor(model.to(device).eval(), processor)  # type: ignore[arg-type]
            loaded.add(_shown(name), predictor)
        for name in side_adapters:
            loaded.add_side_adapter(loaded.names[0], name)
        return loaded

    def add(self, name: str, predictor: Predictor) -> None:
        """Makes a model a choice: its predictor, by the name that the browser is to see."""
        self._check_new(name)
        self._choices[name] = _Choice(predictor, predictor.model.active_side_adapter)

    def add_side_adapter(self, base_name: str, location: str) -> None:
        """Makes a side adapter a choice: loads it onto the model of another choice."""
        base = self._choices[base_name]
        model, name = base.predictor.model, _shown(location)
        self._check_new(name)
        try:
            model.load_side_adapter(expand_path(location), name)
            processor = SANProcessor.from_pretrained(expand_path(location))
            check_processor(processor, SANConfig.from_pretrained(expand_path(location)), location)
        except (OSError, ValueError) as error:
            raise ModelError(f"The side adapter '{printable(location)}' can't be loaded: {one_line(error)}.") from error
        self._choices[name] = _Choice(Predictor(model, processor), name, base.lock)

    @property
    def names(self) -> list[str]:
        """What can be chosen; the first is the default."""
        return list(self._choices)

    @contextmanager
    def use(self, name: str) -> Iterator[Predictor]:
        """
        The predictor of a choice, for a block in which nobody else uses its model.

        Raises:
            ValueError: no such choice.
        """
        if (choice := self._choices.get(name)) is None:
            raise ValueError(f"There is no model {str(name)!r:.80} here, expected one of {', '.join(self.names)}.")
        with choice.lock:
            choice.predictor.model.set_side_adapter(choice.side_adapter)
            yield choice.predictor

    def _check_new(self, name: str) -> None:
        if name in self._choices:
            raise ModelError(f"Got '{printable(name)}' twice, expected models and side adapters of different names.")


def _shown(name: str) -> str:
    """What the browser sees of a model's name: of a folder no path."""
    path = expand_path(name)
    return os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else name
