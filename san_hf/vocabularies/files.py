"""The file of a vocabulary: class names, the words and templates behind them, colours, and their embeddings."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_hf.files import json_text, write_file
from san_hf.json_files import parse_json
from san_hf.messages import one_line


if TYPE_CHECKING:
    import torch

FILE_ENDING = ".safetensors"
FILE_FORMAT = "san_hf.vocabulary.2"
# The first format has no words, templates or colours.
_FORMATS = ("san_hf.vocabulary.1", FILE_FORMAT)
# Embeddings of 30,000 classes of the largest CLIP; 171 classes of a B/16 are 350 kB.
_LARGEST_FILE = 1 << 27
_TENSOR = "class_embeds"


class VocabularyError(ValueError):
    """A vocabulary's file that can't be used; the message says why, and what to do."""


def is_vocabulary_file(source: object) -> bool:
    """Whether what was given as class names is the path of such a file, by its ending."""
    return isinstance(source, str | os.PathLike) and os.fspath(source).lower().endswith(FILE_ENDING)


def write_vocabulary(path: str | os.PathLike, facts: Mapping[str, Any], class_embeds: "torch.Tensor") -> None:
    """
    Args:
        path: the file; one that exists is replaced.
        facts: attributes of [`san_hf.Vocabulary`] but its embeddings, as JSON has them.
        class_embeds: (N, D) float.

    Raises:
        OSError: it can't be written.
    """
    from safetensors.torch import save

    metadata = {"format": FILE_FORMAT, "vocabulary": json_text(facts)}
    write_file(path, save({_TENSOR: class_embeds.cpu().contiguous()}, metadata))


def read_vocabulary(path: str | os.PathLike) -> "tuple[dict[str, Any], torch.Tensor]":
    """
    What [`write_vocabulary`] wrote, on the CPU; the facts are arguments of [`san_hf.Vocabulary`].

    Raises:
        VocabularyError: no such file, or another kind of file.
    """
    with _opened(path, "pt") as (file, facts):
        class_embeds = file.get_tensor(_TENSOR)
        if not class_embeds.is_floating_point() or not class_embeds.isfinite().all():
            raise ValueError(f"its embeddings, {class_embeds.dtype}, are not finite floating-point numbers")
        return facts, class_embeds


def read_vocabulary_names(path: str | os.PathLike) -> list[str]:
    """
    The class names of such a file in the order of their labels, without its "other".

    Raises:
        VocabularyError: no such file, or another kind of file.
    """
    with _opened(path, "np") as (_, facts):
        return list(facts["class_names"][: facts["num_labels"]])


@contextmanager
def _opened(path: str | os.PathLike, framework: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The opened file and its facts, which fit its embeddings."""
    from safetensors import SafetensorError, safe_open

    try:
        if not Path(path).is_file():
            raise VocabularyError(f"There is no vocabulary '{os.fspath(path)}'.")
        if (size := os.path.getsize(path)) > _LARGEST_FILE:
            raise VocabularyError(
                f"'{os.fspath(path)}' is no vocabulary: it has {size:,} bytes, expected at most {_LARGEST_FILE:,}."
            )
        with safe_open(path, framework=framework) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in _FORMATS:
                raise VocabularyError(
                    f"'{os.fspath(path)}' is no vocabulary that this version reads: its format is "
                    f"{metadata.get('format')!r:.80}, expected {FILE_FORMAT!r}. Vocabulary.save writes it."
                )
            shape = file.get_slice(_TENSOR).get_shape()
            if len(shape) != 2 or 0 in shape:
                raise ValueError(f"its embeddings are {tuple(shape)}, expected a row for each class")
            yield file, _checked(parse_json(metadata["vocabulary"], "its description"), rows=shape[0])
    except VocabularyError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error).rstrip(".")
        raise VocabularyError(f"'{os.fspath(path)}' can't be read as a vocabulary: {reason}.") from error


def _checked(facts: Any, rows: int) -> dict[str, Any]:
    """
    Facts as a vocabulary has them.

    Raises:
        KeyError, TypeError, ValueError: they are incomplete, or don't fit one another or the embeddings.
    """
    from san_hf.colors import parse_color
    from san_hf.modeling.prompts_san import split_templates
    from san_hf.modeling.text_san import check_class_names

    if not isinstance(facts, dict):
        raise ValueError(f"it holds {facts!r:.80}, expected a mapping")
    facts = {"words": [], "templates": [], "colors": {}} | facts
    known = {"class_names", "num_labels", "class_of_row", "has_other", "threshold", "text_digest"}
    if unknown := sorted(facts.keys() - known - {"words", "templates", "colors"}):
        raise ValueError(f"it has the unknown entry {unknown[0]!r:.80}")
    names, number, has_other, threshold = (
        facts[name] for name in ("class_names", "num_labels", "has_other", "threshold")
    )
    names = check_class_names(names, "class_names")
    if type(has_other) is not bool or type(number) is not int or not 1 <= number == len(names) - has_other:
        raise ValueError(f"num_labels is {number!r:.80} and has_other {has_other!r:.80} for {len(names)} class names")
    if threshold is not None and not (has_other and type(threshold) in (int, float) and 0 <= threshold <= 1):
        raise ValueError(f"threshold is {threshold!r:.80}, expected a number between 0 and 1, and a last label, other")
    classes = facts["class_of_row"]
    if classes is not None:
        steps = [after - before for before, after in zip([0, *classes], classes)]
        if len(classes) != rows or classes[0] != 0 or not {*steps} <= {0, 1} or {*map(type, classes)} != {int}:
            raise ValueError(f"class_of_row doesn't say of {rows} rows which class they belong to, in ascending order")
    num_classes = rows if classes is None else classes[-1] + 1
    if num_classes < number or (num_classes > number and not has_other):
        raise ValueError(f"it has embeddings of {num_classes} classes for {number} class names")
    words = facts["words"]
    if words and len(words) != num_classes:
        raise ValueError(f"it has words of {len(words)} classes, expected them of {num_classes}")
    if not re.fullmatch("[0-9a-f]{64}", facts["text_digest"]):
        raise ValueError(f"text_digest is {facts['text_digest']!r:.80}, expected a SHA-256")
    if not isinstance(facts["colors"], dict):
        raise ValueError(f"colors is {facts['colors']!r:.80}, expected a mapping from class names")
    if facts["templates"]:
        split_templates(list(facts["templates"]))
    return facts | {
        "class_names": tuple(names),
        "class_of_row": None if classes is None else tuple(classes),
        "words": tuple(tuple(check_class_names(group, "words")) for group in words),
        "templates": tuple(facts["templates"]),
        "colors": {name: parse_color(color, name) for name, color in facts["colors"].items()},
    }
