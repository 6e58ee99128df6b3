"""What the app knows of each visitor: the picture as it was encoded, the words, and the last result."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from san_hf.app.limits import Limits, read_expansion_names, read_names
from san_hf.app.models import Models
from san_hf.colors import name_colors
from san_hf.images import ImageError, load_image, pixel_limit
from san_hf.inference.embeddings_cache import cache_folder, encode_class_names
from san_hf.inference.predictor import EncodedImage
from san_hf.inference.segmentation import Segmentation
from san_hf.inference.segmenter import as_segmentation, label_dtype
from san_hf.inference.vocabulary import Vocabulary
from san_hf.messages import one_line
from san_hf.modeling.text_san import clean_text


# Between so many words, and not within them, a question can be cancelled.
WORDS_AT_A_TIME = 64


@dataclass(frozen=True)
class Question:
    """
    What a visitor asks of a picture, as it comes from the browser.

    Attributes:
        tags, preset: class names, see [`read_names`]; of neither, those that the model carries.
        expansion: see [`read_expansion_names`].
        threshold: 0..1; 0 for none.
        model: one of [`Models.names`].

    Raises:
        ValueError: values of other types.
    """

    tags: tuple[str, ...] = ()
    preset: str | None = None
    expansion: str | None = None
    threshold: float = 0.0
    model: str = ""

    def __post_init__(self):
        texts = [*self.tags, self.preset or "", self.expansion or "", self.model]
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.threshold, int | float):
            raise ValueError("Got a question of another form than this page's: reload the page.")


@dataclass
class Session:
    """
    A visitor's picture and the answers to questions about it. Each of the three steps is done again only if what it
    depends on has changed: encoding for another picture or model, the words for others, the labels always.

    Attributes:
        limits: of the picture and the words.
        image: the picture, upright RGB.
        segmentation: the last answer, with confidence.
        vision_passes: how often this picture was encoded: once for each time that its model is chosen.
        seconds: of each step when it was last done: "picture", "words" and "labels".
    """

    limits: Limits = field(default_factory=Limits)
    image: Image.Image | None = None
    segmentation: Segmentation | None = None
    vision_passes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _digest: bytes = b""
    _answered: Question | None = None
    _encoded: tuple[str, EncodedImage] | None = None
    _vocabulary: tuple[tuple, Vocabulary] | None = None
    _colors: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def show(self, file: str | os.PathLike | None) -> None:
        """
        Takes a picture; the one that is there already stays, with its encoding.

        Args:
            file: it may be deleted afterwards; `None` to forget the picture.

        Raises:
            ImageError: it can't be read, or has more pixels than the limit; then there is no picture.
        """
        if file is None:
            self._forget()
            return
        digest = hashlib.sha256(Path(file).read_bytes()).digest()
        if digest != self._digest:
            self._forget()
            check_size(file, self.limits.pixels)
            try:
                self.image, self._digest = load_image(file), digest
            except ImageError as error:
                raise ImageError(f"The picture can't be used: {one_line(error)}.") from error

    def answer(self, models: Models, question: Question) -> Iterator[str]:
        """
        Segments the picture; before each of the steps it yields what comes now. Left at any of these, it goes on from
        there the next time. The question that was answered last has no steps.

        Raises:
            ValueError: no picture, no words, or too many or too long ones; no such model.
        """
        if self.image is None:
            raise ValueError("There is no picture yet: upload, paste or take one.")
        if self.segmentation is not None and question == self._answered:
            return
        names = read_names(question.tags, question.preset, self.limits)
        expansion = read_expansion_names(question.expansion, self.limits)
        if len(names) + len(expansion) > self.limits.names:
            raise ValueError(
                f"Got {len(names) + len(expansion):,} class names with the expansion's, expected at most "
                f"{self.limits.names:,}."
            )
        with models.use(question.model) as predictor:
            if not names and not predictor.model.config.vocabulary_size:
                raise ValueError('Name what to look for, for example "sky, house, grass", or choose a preset.')
        if self._encoded is None or self._encoded[0] != question.model:
            yield "Encoding the picture ..."
            with models.use(question.model) as predictor, self._timed("picture"):
                (encoded,) = predictor.encode([self.image])
                self._encoded = question.model, encoded
                self.vision_passes += 1
        key = question.model, tuple(names), tuple(expansion)
        if self._vocabulary is None or self._vocabulary[0] != key:
            yield "Encoding the words ..."
            started = time.perf_counter()
            yield from self._encode_in_parts(models, question.model, [*names, *expansion])
            with models.use(question.model) as predictor:
                vocabulary = predictor.vocabulary(names or None, **({"expand": expansion} if expansion else {}))
                self._vocabulary = key, vocabulary
            self.seconds["words"] = time.perf_counter() - started
        yield "Labelling the pixels ..."
        vocabulary = self._vocabulary[1]
        if question.threshold:
            vocabulary = vocabulary.with_options(threshold=float(question.threshold))
        with models.use(question.model) as predictor, self._timed("labels"):
            encoded, colors = self._encoded[1], self._colors_of(vocabulary)
            (pixels,) = predictor.classify_pixels([encoded], vocabulary, dtype=label_dtype(vocabulary))
            self.segmentation = as_segmentation(self.image, pixels, vocabulary, colors)
        self._answered = question

    def _encode_in_parts(self, models: Models, model: str, words: list[str]) -> Iterator[str]:
        """Many words a part at a time; they are kept, so that the vocabulary finds them encoded."""
        words = list({clean_text(word): word for word in words}.values())
        if cache_folder() is None or len(words) <= WORDS_AT_A_TIME:
            return
        for start in range(0, len(words), WORDS_AT_A_TIME):
            with models.use(model) as predictor:
                encode_class_names(predictor.model, predictor.processor, words[start : start + WORDS_AT_A_TIME])
            yield f"Encoding the words: {min(start + WORDS_AT_A_TIME, len(words))} of {len(words)} ..."

    def _colors_of(self, vocabulary: Vocabulary) -> dict[str, tuple[int, int, int]]:
        """Names keep the colours that they had, and new ones get none of those."""
        names = vocabulary.class_names[: vocabulary.num_labels]
        if len(self._colors) > 2 * self.limits.names:
            self._colors = {name: color for name, color in self._colors.items() if name in names}
        known = list({**dict.fromkeys(names), **self._colors})
        for name, color in zip(known, name_colors(known, self._colors)):
            self._colors[name] = int(color[0]), int(color[1]), int(color[2])
        return {name: self._colors[name] for name in names}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds[step] = time.perf_counter() - started

    def _forget(self) -> None:
        """The picture and all that is of it; the words and the colours stay."""
        self.image = self.segmentation = self._encoded = None
        self._digest, self.vision_passes = b"", 0


class Sessions:
    """
    The sessions of all visitors, by a key that the browser has. Beyond their limit, the one that was used least
    recently is forgotten; its visitor's next question encodes the picture again.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, key: str | None) -> Session:
        """
        The session of a visitor, a new one for a new key.

        Raises:
            ValueError: no key: all who come without one would share a session.
        """
        if not key:
            raise ValueError("Got a question without a visitor's key: expected one that was asked from the page.")
        with self._lock:
            session = self._sessions.setdefault(key, Session(self.limits))
            self._sessions.move_to_end(key)
            while len(self._sessions) > self.limits.sessions:
                self._sessions.popitem(last=False)
            return session

    def forget(self, key: str) -> None:
        """Deletes a visitor's session."""
        with self._lock:
            self._sessions.pop(key, None)


def check_size(file: str | os.PathLike, most_pixels: int) -> None:
    """
    Refuses a picture with too many pixels, before it is decoded.

    Raises:
        ImageError: it has more, or is no picture.
    """
    try:
        with pixel_limit(), Image.open(file) as opened:
            width, height = opened.size
    except ImageError:
        raise
    except Exception as error:  # broken files make Pillow's readers fail in many ways
        raise ImageError("The file is no picture, or of a format that can't be read here.") from error
    if width * height > most_pixels:
        raise ImageError(
            f"The picture has {width} x {height} = {width * height:,} pixels, expected at most {most_pixels:,}: scale "
            "it down first."
        )
