"""Class names and their embeddings: what a model looks for."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from san_hf.data.class_names import read_class_names
from san_hf.files import json_text, write_file
from san_hf.json_files import parse_json
from san_hf.messages import one_line
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.text_san import check_class_names, clean_text
from san_hf.vocabularies import EXPANSIONS, load_vocabulary


FILE_FORMAT = "san_hf.vocabulary.1"
OTHER = "other"


class Autocast(Protocol):
    """Gives a context manager to run a model in, such as `accelerator.autocast`."""

    def __call__(self) -> AbstractContextManager: ...


class VocabularyError(ValueError):
    """A vocabulary's file that can't be used; the message says why, and what to do."""


@dataclass(frozen=True)
class Vocabulary:
    """
    Class names with their embeddings, which are computed once: for any number of images, and kept in one file.

    Attributes:
        class_names: names of the labels, in the caller's order; "other" is the last if there is one.
        class_embeds: (N, D) float, L2-normalised embeddings of all words: a row for each class or synonym, then the
            classes of the expansion.
        class_of_row: which class each row belongs to, ascending, if classes have synonyms; by default each row is a
            class of its own.
        num_labels: how many of the classes are the caller's; all others are one "other".
        has_other: whether the last label is "other": the vocabulary was expanded, or there is a threshold.
        threshold: pixels whose highest score (0 to about 1) is lower become "other".
        text_digest: SHA-256 of the text tower that computed the embeddings, see [`text_tower_digest`].
    """

    class_names: tuple[str, ...]
    class_embeds: torch.Tensor
    num_labels: int
    class_of_row: tuple[int, ...] | None = None
    has_other: bool = False
    threshold: float | None = None
    text_digest: str = ""

    @classmethod
    def encode(
        cls,
        model: SANForSemanticSegmentation,
        processor: SANProcessor,
        class_names: str | os.PathLike | Sequence[str] | Mapping,
        *,
        synonyms: bool | Mapping[str, Sequence[str]] = False,
        expand: str | Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
        threshold: float | None = None,
        autocast: Autocast = nullcontext,
    ) -> "Vocabulary":
        """
        Encodes class names with CLIP's text tower; each prompt goes through it once.

        Args:
            model: on its device.
            processor: the model's.
            class_names: in the order of the labels; or a file or a benchmark's name, see
                [`san_hf.data.class_names.read_class_names`].
            synonyms: further words for classes, `{"tv": ["television", "screen"]}`; or `True` if a name with commas
                or semicolons is a list of synonyms, "television, tv". A class's logit for a mask is that of its best
                word. By default a name is put into the prompts as it is, as in SAN's published results.
            expand: more class names, for pixels that are none of the caller's classes: "coco" (COCO-Stuff's 171
                classes), "coco-stuff" (its 91 stuff classes) or a list. Those that are not among the names already
                become one last label, "other".
            templates: prompt templates: "vild", "imagenet" or a list; the processor's by default.
            threshold: pixels whose highest score (0 to about 1) is lower become "other", too.
            autocast: gives a context manager to run the text tower in.

        Raises:
            ValueError: names that are no vocabulary (none, blank, repeated, without a word), an unknown expansion, or
                a threshold that is not a number.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"Got threshold={threshold}, expected a score between 0 and 1.")
        has_other = expand is not None or threshold is not None
        names = read_class_names(class_names)
        if has_other and any(clean_text(name) == OTHER for name in names):
            raise ValueError(
                f"Got a class of the name {OTHER!r}, which is what the expansion or the threshold calls all that is "
                "none of the classes: leave it out, or give it another name."
            )
        words = _words_of_classes(names, synonyms)
        unique = list(dict.fromkeys(word for group in words for word in group)) if synonyms else names
        every_word = unique
        if expand is not None:
            if isinstance(expand, str) and expand not in EXPANSIONS:
                raise ValueError(f"Can't expand by {expand!r}; there are {list(EXPANSIONS)}, or give a list of names.")
            more = load_vocabulary(EXPANSIONS[expand]) if isinstance(expand, str) else expand
            every_word = processor.expand(unique, more)
        tokens = processor(text=every_word, prompt_templates=templates).to(model.device)
        with torch.inference_mode(), autocast():
            class_embeds = model.get_class_embeds(**tokens)

        class_of_row = None
        if synonyms:
            # Two classes may share a word, which is encoded once.
            row_of = {word: row for row, word in enumerate(unique)}
            groups = [[row_of[word] for word in group] for group in words]
            groups += [[row] for row in range(len(unique), len(every_word))]
            class_of_row = tuple(index for index, group in enumerate(groups) for _ in group)
            class_embeds = class_embeds[[row for group in groups for row in group]]
        return cls(
            class_names=(*names, OTHER) if has_other else tuple(names),
            class_embeds=class_embeds,
            num_labels=len(names),
            class_of_row=class_of_row,
            has_other=has_other,
            threshold=threshold,
            text_digest=text_tower_digest(model),
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
        Writes one safetensors file, which [`Vocabulary.load`] reads.

        Raises:
            OSError: it can't be written.
        """
        facts = {
            "class_names": self.class_names,
            "num_labels": self.num_labels,
            "class_of_row": self.class_of_row,
            "has_other": self.has_other,
            "threshold": self.threshold,
            "text_digest": self.text_digest,
        }
        metadata = {"format": FILE_FORMAT, "vocabulary": json_text(facts)}
        write_file(path, save({"class_embeds": self.class_embeds.cpu().contiguous()}, metadata))

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
        if not Path(path).is_file():
            raise VocabularyError(f"There is no vocabulary '{path}'.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise VocabularyError(
                        f"'{path}' is no vocabulary that this version reads: its format is "
                        f"{metadata.get('format')!r}, expected {FILE_FORMAT!r}. Vocabulary.save writes it."
                    )
                facts = parse_json(metadata["vocabulary"], f"'{path}'")
                facts["class_names"] = tuple(check_class_names(facts["class_names"], "class_names"))
                facts["class_of_row"] = facts["class_of_row"] and tuple(facts["class_of_row"])
                vocabulary = cls(class_embeds=file.get_tensor("class_embeds"), **facts)
        except VocabularyError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise VocabularyError(f"'{path}' can't be read as a vocabulary: {one_line(error)}.") from error
        if vocabulary.text_digest != (expected := text_tower_digest(model)):
            raise VocabularyError(
                f"The embeddings in '{path}' are of another text tower ({vocabulary.text_digest[:12]}) than this "
                f"model's ({expected[:12]}), so they mean nothing to it. Encode the class names with this model."
            )
        return vocabulary.to(model.device)


def split_synonyms(name: str) -> list[str]:
    """ "television, tv; telly" -> ["television", "tv", "telly"]."""
    return [part.strip() for part in re.split(r"[,;]", name) if part.strip()]


def text_tower_digest(model: SANForSemanticSegmentation) -> str:
    """
    SHA-256, in hexadecimal digits, of the parameters that class embeddings depend on, rounded to bfloat16: it is the
    same in whatever precision the same weights were loaded.
    """
    digest = hashlib.sha256()
    for part in (model.text_model, model.text_projection):
        for name, parameter in part.named_parameters():
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name} {tuple(values.shape)} ".encode())
            digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()


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
