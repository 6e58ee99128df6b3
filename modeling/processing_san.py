"""Processor of SAN: an image and class names in plain words, made into what the model takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .image_input_san import check_ignore_index
from .prompts_san import split_templates
from .text_san import check_class_names, clean_text, may_be_misread


logger = logging.get_logger(__name__)


class SANProcessorKwargs(ProcessingKwargs, total=False):
    # The parent reads it off the class, as its other subclasses have it; a TypedDict may only declare fields.
    _defaults = {  # type: ignore[misc]
        # To the longest prompt: CLIP's text tower is causal, so that padding changes nothing but the time it takes.
        "text_kwargs": {"padding": True, "truncation": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class SANProcessor(ProcessorMixin):
    r"""
    Wraps a [`SANImageProcessor`] and a CLIP tokenizer.

    Args:
        image_processor (`SANImageProcessor`):
            For images and label maps.
        tokenizer (`CLIPTokenizer`):
            CLIP's tokenizer; its `model_max_length` limits prompts.
        prompt_templates (`str` or `list[str]`, *optional*, defaults to `"vild"`):
            `"vild"` (14 templates), `"imagenet"` (80), or your own, each with one `{}` where the class name goes.
        chat_template:
            Not used; part of every processor.

    Raises:
        ValueError: for templates that are none of these.
    """

    valid_processor_kwargs = SANProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        prompt_templates: str | Sequence[str] = "vild",
        chat_template=None,
    ):
        split_templates(prompt_templates)  # refuses what is none, before anything is saved with it
        self.prompt_templates = prompt_templates if isinstance(prompt_templates, str) else list(prompt_templates)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: Sequence[str] | None = None,
        segmentation_maps: ImageInput | None = None,
        expansion: Sequence[str] | None = None,
        prompt_templates: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Prepares images, class names, or both.

        Args:
            images:
                An image or a list of images, see [`SANImageProcessor`].
            text (`list[str]`):
                Class names in plain words. Their order is the order of the labels. Prompts are made plain as in the
                original, see [`clean_text`]: typographic quotes, HTML's escapes, full-width letters, capitals, spaces.
            segmentation_maps:
                A label map per image, with labels 0..`len(text)` - 1 (if there is `text`) or the ignore index.
            expansion (`list[str]`, *optional*):
                Further class names, for pixels that are none of `text`. Those that are not in `text` already follow
                after it, see [`~SANProcessor.expand`]. Pass `num_labels=len(text)` to
                [`~SANProcessor.post_process_semantic_segmentation`] to have them all as one "other" label.
            prompt_templates (`str` or `list[str]`, *optional*, defaults to `self.prompt_templates`):
                For this call only.
            kwargs:
                Of the image processor (such as `size`) and the tokenizer (such as `padding`).

        Returns:
            `BatchFeature` with what [`SANImageProcessor`] returns, if there are images, and with, if there is text,
            for C classes, T templates, and L tokens in the longest prompt (the tokenizer's limit at most),
            - **input_ids**: (C, T, L) int64;
            - **attention_mask**: (C, T, L) int64, 1 for tokens and 0 for padding.

        Raises:
            ValueError: for names that are no vocabulary (none, blank, repeated, not strings, in a set), labels beyond
                them, and whatever the image processor refuses. Names are repeated if the tokenizer doesn't tell them
                apart: if they differ by capitals, spaces or the kind of quotes only, or where they are cut.
        """
        if images is None and text is None:
            raise ValueError("Got neither images nor text, expected at least one of them.")
        if images is None and segmentation_maps is not None:
            raise ValueError("Got segmentation maps without images, expected an image for each.")
        _check_order(images, text)
        if text is None and expansion is not None:
            raise ValueError("Got an expansion without text, expected the class names it is to be added to.")
        merged = self._merge_kwargs(
            SANProcessorKwargs,  # type: ignore[arg-type]  # annotated as an instance, meant as the class
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)

        data: dict[str, Any] = {}
        if text is not None:
            names = check_class_names(text, "text")
            if segmentation_maps is not None:
                options = merged["images_kwargs"]
                ignore_index, meant = (
                    options.get(name, getattr(self.image_processor, name))
                    for name in ("ignore_index", "ignore_index_is_class")
                )
                if not meant:
                    check_ignore_index(ignore_index, len(names), "ignore_index")
            every_name = names if expansion is None else self.expand(names, expansion)
            data |= self._tokenize(every_name, prompt_templates, merged["text_kwargs"])
        if images is not None:
            image_inputs = self.image_processor(images, segmentation_maps, **merged["images_kwargs"])
            if text is not None and segmentation_maps is not None:
                _check_labels(image_inputs["labels"], names, ignore_index)
            data |= image_inputs
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def expand(text: Sequence[str], expansion: Sequence[str]) -> list[str]:
        """`text`, followed by the names of `expansion` that it does not have, whatever the capitals and spaces."""
        names, more = check_class_names(text, "text"), check_class_names(expansion, "expansion")
        own = {clean_text(name) for name in names}
        return names + [name for name in more if clean_text(name) not in own]

    def _tokenize(self, names: list[str], prompt_templates, text_kwargs: dict) -> dict[str, np.ndarray]:
        templates = split_templates(self.prompt_templates if prompt_templates is None else prompt_templates)
        plain: list[str] = []
        for name in names:
            prompts = [before + name + after for before, after in templates]
            plain += map(clean_text, prompts)
            for token in self.tokenizer.all_special_tokens:
                if any(token in prompt for prompt in (*prompts, *plain[-len(prompts) :])):
                    raise ValueError(f"Got the class name {name!r} with the tokenizer's own {token!r}: leave that out.")
            if any(map(may_be_misread, prompts)):
                logger.warning(
                    f"The class name {name!r:.200} may hold letters that were read in a wrong encoding, which the "
                    "original mends: check it, or install ftfy, which mends it here, too."
                )
        tokens = self.tokenizer(plain, return_tensors="np", **text_kwargs)

        limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        if text_kwargs.get("truncation"):
            # Only a prompt that fills the limit can have lost something to it
            full = np.flatnonzero(tokens["attention_mask"].sum(-1) >= limit)
            whole = self.tokenizer([plain[i] for i in full], verbose=False)["input_ids"] if len(full) else []
            for index in dict.fromkeys(i // len(templates) for i, ids in zip(full, whole) if len(ids) > limit):
                logger.warning(
                    f"The class name {names[index]!r:.200} makes a prompt of more than {limit} tokens, which is cut "
                    "there: expected a few words."
                )
        shape = (len(names), len(templates), -1)
        _check_apart(tokens["input_ids"].reshape(len(names), -1), names)
        return {key: tokens[key].reshape(shape) for key in ("input_ids", "attention_mask")}

    def post_process_semantic_segmentation(self, *args, **kwargs):
        """Label maps from the model's outputs: see [`SANImageProcessor.post_process_semantic_segmentation`]."""
        return self.image_processor.post_process_semantic_segmentation(*args, **kwargs)


def _check_apart(token_ids: np.ndarray, names: list[str]):
    """Names of the same tokens would have the same logits, and the second never get a pixel."""
    first: dict[bytes, int] = {}
    for index, row in enumerate(token_ids):
        if (other := first.setdefault(row.tobytes(), index)) != index:
            raise ValueError(
                f"Got the class names {names[other]!r:.80} and {names[index]!r:.80}, which have the same tokens: leave "
                "one out, or say what sets them apart in the first few words."
            )


def _check_order(images, text) -> None:
    """Refuses names and images in each other's place, which the readers of either would refuse in other words."""
    is_image = isinstance(text, PIL.Image.Image) or getattr(text, "ndim", 0) > 1
    if isinstance(text, list | tuple) and text:
        is_image = isinstance(text[0], PIL.Image.Image) or getattr(text[0], "ndim", 0) > 1
    named = [images] if isinstance(images, str) else images
    is_names = isinstance(named, list | tuple) and bool(named) and all(isinstance(name, str) for name in named)
    if is_image and (images is None or is_names):
        raise ValueError("Got an image as text: the image comes first, as processor(images=image, text=['sky', ...]).")
    if is_image:
        raise ValueError(
            "Got an image or a label map as text, expected class names: label maps go to segmentation_maps, as "
            "processor(images=image, text=['sky', ...], segmentation_maps=label_map)."
        )


def _check_labels(label_maps, names: list[str], ignore_index: int):
    for index, label_map in enumerate(label_maps):
        labels = np.asarray(label_map)
        wrong = np.unique(labels[(labels != ignore_index) & (labels >= len(names))]).tolist()
        if wrong:
            raise ValueError(
                f"Segmentation map {index} has the labels {wrong[:10]}, expected 0..{len(names) - 1} for {len(names)} "
                f"class names, or {ignore_index} to ignore a pixel."
            )


SANProcessor.register_for_auto_class()
