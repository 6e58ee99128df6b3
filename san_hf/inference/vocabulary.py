"""Class names and their embeddings: what a model looks for."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from san_hf.colors import Color, parse_color
from san_hf.data.class_names import is_class_list, read_class_names
from san_hf.inference.embeddings_cache import encode_class_names, text_tower_digest
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.prompts_san import split_templates
from san_hf.modeling.text_san import check_class_names, clean_text
from san_hf.paths import expand_path
from san_hf.vocabularies import EXPANSIONS, load_vocabulary
from san_hf.vocabularies.files import (
    FILE_ENDING,
    VocabularyError,
    is_vocabulary_file,
    read_vocabulary,
    write_vocabulary,
)


OTHER = "other"
# Options that need no text tower, see `Vocabulary.with_options`.
LABEL_OPTIONS = ("threshold", "other", "colors")


class Autocast(Protocol):
    """Gives a context manager to run a model in, such as `accelerator.autocast`."""

    def __call__(self) -> AbstractContextManager: ...


@dataclass(frozen=True)
class Vocabulary:
    """
    Class names with their embeddings, which are computed once: for any number of images, and kept in one file.

    Attributes:
        class_names: names of the labels, in the caller's order; "other" is the last if there is one.
        class_embeds: (N, D) float, L2-normalised embeddings of all words: a row for each class or synonym, then the
            classes of the expansion. Of averaged synonyms, one row for each class.
        class_of_row: which class each row belongs to, ascending, if classes have synonyms; by default each row is a
            class of its own.
        num_labels: how many of the classes are the caller's; all others are one "other".
        has_other: whether the last label is "other": the vocabulary was expanded, or there is a threshold.
        threshold: pixels whose confidence, 0..1, is lower become "other": see [`Predictor.classify_pixels`].
        text_digest: SHA-256 of the text tower that computed the embeddings, see [`text_tower_digest`].
        words: of each class, the caller's and then the expansion's, what was encoded for it; none of a vocabulary that
            a model carries.
        templates: the prompt templates that the words were put into; none of a vocabulary that a model carries.
        colors: RGB, 0..255, by class name, for classes that are to have their own: see [`san_hf.colors.name_colors`].
    """

    class_names: tuple[str, ...]
    class_embeds: torch.Tensor
    num_labels: int
    class_of_row: tuple[int, ...] | None = None
    has_other: bool = False
    threshold: float | None = None
    text_digest: str = ""
    words: tuple[tuple[str, ...], ...] = ()
    templates: tuple[str, ...] = ()
    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def encode(
        cls,
        model: SANForSemanticSegmentation,
        processor: SANProcessor,
        class_names: str | os.PathLike | Sequence[str] | Mapping,
        *,
        synonyms: bool | Mapping[str, Sequence[str]] = False,
        average_synonyms: bool = False,
        expand: str | Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
        autocast: Autocast = nullcontext,
        **options: Any,
    ) -> "Vocabulary":
        """
        Encodes class names with CLIP's text tower. Those that were encoded before, in this process or another one, are
        not encoded again: see [`san_hf.inference.embeddings_cache.encode_class_names`].

        Args:
            model: on its device.
            processor: the model's.
            class_names: in the order of the labels; or a file or a benchmark's name, see
                [`san_hf.data.class_names.read_class_names`].
            synonyms: further words for classes, `{"tv": ["television", "screen"]}`; or `True` if a name with commas
                or semicolons is a list of synonyms, "television, tv". A class's logit for a mask is that of its best
                word. By default a name is put into the prompts as it is, as in SAN's published results.
            average_synonyms: a class's embedding is the mean of its words' instead.
            expand: more class names, for pixels that are none of the caller's classes: "coco" (COCO-Stuff's 171
                classes), "coco-stuff" (its 91 stuff classes), or a list, a file or a benchmark's name, as for
                `class_names`: a background of one's own is ["wall", "floor"]. Those that are not among the names
                already become one last label, "other".
            templates: prompt templates: "vild", "imagenet" or a list; the processor's by default.
            autocast: gives a context manager to run the text tower in.
            **options: `threshold`, `other` and `colors`, see [`Vocabulary.with_options`].

        Raises:
            ValueError: names that are no vocabulary (none, blank, repeated, without a word), an unknown expansion, a
                threshold that is not a number of 0..1, a colour that is none, or options without what they are for.
        """
        threshold, other, colors = (options.pop(name, None) for name in LABEL_OPTIONS)
        if options:
            raise TypeError(f"Vocabulary.encode has no option {min(options)!r}.")
        _check_threshold(threshold)
        if average_synonyms and not synonyms:
            raise ValueError("Got average_synonyms without synonyms, expected both or neither.")
        colors = _parse_colors(colors)
        has_other = expand is not None or threshold is not None
        names = read_class_names(class_names)
        label_names = _label_names(names, has_other, other)
        pairs = split_templates(processor.prompt_templates if templates is None else templates)
        words = _words_of_classes(names, synonyms)
        unique = list(dict.fromkeys(word for group in words for word in group)) if synonyms else names
        every_word = unique
        if expand is not None:
            every_word = processor.expand(unique, read_expansion(expand))
        class_embeds, text_digest = encode_class_names(model, processor, every_word, templates, autocast)

        class_of_row = None
        groups = [[row] for row in range(len(every_word))]
        if synonyms:
            # Two classes may share a word, which is encoded once.
            row_of = {word: row for row, word in enumerate(unique)}
            groups = [[row_of[word] for word in group] for group in words]
            groups += [[row] for row in range(len(unique), len(every_word))]
            class_of_row = tuple(index for index, group in enumerate(groups) for _ in group)
            class_embeds = class_embeds[[row for group in groups for row in group]]
        if average_synonyms:
            by_class = class_embeds.float().split([len(group) for group in groups])
            means = torch.stack([rows.mean(0) for rows in by_class])
            class_embeds, class_of_row = F.normalize(means, dim=-1).to(class_embeds.dtype), None
        return cls(
            class_names=label_names,
            class_embeds=class_embeds,
            num_labels=len(names),
            class_of_row=class_of_row,
            has_other=has_other,
            threshold=threshold,
            text_digest=text_digest,
            words=tuple(tuple(every_word[row] for row in group) for group in groups),
            templates=tuple("{}".join(pair) for pair in pairs),
            colors=colors,
        )

    @classmethod
    def of_model(cls, model: SANForSemanticSegmentation) -> "Vocabulary":
        """
        The vocabulary that a model carries, see [`SANForSemanticSegmentation.set_vocabulary`].

        Raises:
            ValueError: it carries none.
        """
        if not model.config.vocabulary_size or model.class_embeds is None:
            raise ValueError("This model carries no class names of its own: name what to look for.")
        id2label: Mapping = model.config.id2label or {}
        names = tuple(id2label[label] for label in range(model.config.vocabulary_size))
        return cls(names, model.class_embeds, len(names), text_digest=text_tower_digest(model))

    def with_options(
        self,
        *,
        threshold: float | None = None,
        other: str | None = None,
        colors: Mapping[str, Color] | None = None,
    ) -> "Vocabulary":
        """
        The same with options that need no text tower. What isn't given stays.

        Args:
            threshold: pixels whose confidence, 0..1, is lower become "other", the last label, which the first
                threshold adds: see [`Predictor.classify_pixels`].
            other: what to call the last label, that of the expansion and the threshold, such as "background". It is no
                class that is looked for; those among the class names are, whatever their name.
            colors: colours by class name, in addition: see [`san_hf.colors.name_colors`].

        Raises:
            ValueError: a threshold that is no number of 0..1, a name for a label that isn't there or that is a
                class's, or a colour that is none.
        """
        _check_threshold(threshold)
        threshold = self.threshold if threshold is None else threshold
        has_other = self.has_other or threshold is not None
        names = self.class_names[: self.num_labels]
        called = self.class_names[-1] if self.has_other and other is None else other
        return replace(
            self,
            class_names=_label_names(names, has_other, called),
            has_other=has_other,
            threshold=threshold,
            colors={**self.colors, **_parse_colors(colors)},
        )

    def to(self, device: str | torch.device) -> "Vocabulary":
        """The same on another device."""
        return replace(self, class_embeds=self.class_embeds.to(device))

    def merge_synonyms(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Logits of classes from logits of words: of each class those of its best word.

        Args:
            logits: (..., N + 1), the last for no object.

        Returns:
            (..., number of classes + 1): the caller's classes, then those of the expansion, no object last.
        """
        if self.class_of_row is None:
            return logits
        no_object = self.class_of_row[-1] + 1
        classes = torch.tensor([*self.class_of_row, no_object], device=logits.device)
        best = logits.new_full((*logits.shape[:-1], no_object + 1), -torch.inf)
        return best.scatter_reduce(-1, classes.expand_as(logits), logits, "amax")

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes one safetensors file, which [`Vocabulary.load`] reads, and all that takes class names by a file.

        Args:
            path: the file; its name ends in ".safetensors".

        Raises:
            ValueError: another ending.
            OSError: it can't be written.
        """
        if not is_vocabulary_file(path):
            raise ValueError(f"Got the file '{os.fspath(path)}', expected a name that ends in {FILE_ENDING}.")
        write_vocabulary(path, self.facts(), self.class_embeds)

    def facts(self) -> dict[str, Any]:
        """All but the embeddings, as JSON has it."""
        return {
            "class_names": self.class_names,
            "num_labels": self.num_labels,
            "class_of_row": self.class_of_row,
            "has_other": self.has_other,
            "threshold": self.threshold,
            "text_digest": self.text_digest,
            "words": self.words,
            "templates": self.templates,
            "colors": dict(self.colors),
        }

    @classmethod
    def load(cls, path: str | os.PathLike, model: SANForSemanticSegmentation) -> "Vocabulary":
        """
        Reads what [`Vocabulary.save`] wrote, onto the model's device.

        Args:
            path: the file.
            model: whose text tower computed the embeddings.

        Raises:
            VocabularyError: no such file, or another kind of file; or embeddings of another text tower.
        """
        path = expand_path(path)
        facts, class_embeds = read_vocabulary(path)
        vocabulary = cls(class_embeds=class_embeds, **facts)
        vocabulary.check_model(model, f"in '{path}'")
        return vocabulary.to(model.device)

    def check_model(self, model: SANForSemanticSegmentation, where: str = "of this vocabulary") -> None:
        """
        Args:
            model: whose text tower must have computed the embeddings.
            where: whose embeddings they are, for the message.

        Raises:
            VocabularyError: another one did.
        """
        if self.text_digest and self.text_digest != (expected := text_tower_digest(model)):
            raise VocabularyError(
                f"The embeddings {where} are of another text tower ({self.text_digest[:12]}) than this "
                f"model's ({expected[:12]}), so they mean nothing to it. Encode the class names with this model."
            )


def read_expansion(source: str | os.PathLike | Sequence[str]) -> list[str]:
    """
    Class names to expand a vocabulary by, see [`Vocabulary.encode`].

    Raises:
        ValueError: an unknown name, a file that can't be read, or names that are no vocabulary.
    """
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name in EXPANSIONS:
            return load_vocabulary(EXPANSIONS[name])
        if not is_class_list(name):
            raise ValueError(
                f"Can't expand by {name!r:.80}; there are {list(EXPANSIONS)}, or give a list of names, a file of them "
                "or a benchmark's name."
            )
    return read_class_names(source)


# What may be given as class names.
ClassNames = str | os.PathLike | Sequence[str] | Mapping | Vocabulary


def split_synonyms(name: str) -> list[str]:
    """ "television, tv; telly" -> ["television", "tv", "telly"]."""
    return [part.strip() for part in re.split(r"[,;]", name) if part.strip()]


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not (
        isinstance(threshold, Real) and not isinstance(threshold, bool) and 0 <= threshold <= 1
    ):
        raise ValueError(f"Got threshold={threshold!r:.80}, expected a confidence between 0 and 1.")


def _parse_colors(colors: Mapping[str, Color] | None) -> dict[str, tuple[int, int, int]]:
    return {name: parse_color(color, name) for name, color in (colors or {}).items()}


def _label_names(names: Sequence[str], has_other: bool, other: str | None) -> tuple[str, ...]:
    """The names of the labels, with that of the last one if there is an "other"."""
    if not has_other:
        if other is not None:
            raise ValueError(
                f"Got other={other!r:.80} without an expansion or a threshold, by which pixels would get that label."
            )
        return tuple(names)
    (called,) = check_class_names([OTHER if other is None else other], "other")
    if any(clean_text(name) == clean_text(called) for name in names):
        raise ValueError(
            f"Got a class of the name {called!r:.80}, which is what the expansion or the threshold calls all that is "
            "none of the classes: leave it out, give it another name, or call that label otherwise by `other`."
        )
    return (*names, called)


def _words_of_classes(class_names: list[str], synonyms: bool | Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The words of each class, as the tokenizer sees them; none without synonyms."""
    if not synonyms:
        return []
    if isinstance(synonyms, Mapping):
        more = {
            clean_text(name): check_class_names(words, f"synonyms of {name!r}") if words else []
            for name, words in synonyms.items()
        }
        known = {clean_text(name) for name in class_names}
        if unknown := sorted(name for name in synonyms if clean_text(name) not in known):
            raise ValueError(f"Got synonyms for {unknown[0]!r}, which is none of the class names.")
        groups = [[name, *more.get(clean_text(name), ())] for name in class_names]
    else:
        groups = [split_synonyms(name) for name in class_names]
    groups = [list(dict.fromkeys(word for word in map(clean_text, group) if word)) for group in groups]
    if [] in groups:
        label = groups.index([])
        raise ValueError(
            f"Class {label}, {class_names[label]!r}, has no word: expected at least one between its commas and "
            "semicolons, or no synonyms."
        )
    return groups
