"""SAN in Transformers' pipelines: images and class names in, segments out."""

import os
from collections.abc import Iterable, Sequence, Sized
from numbers import Real
from types import GeneratorType
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import Dataset
from transformers.image_utils import load_image
from transformers.pipelines.base import Pipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from .adapter_folder_san import active_lora
from .fast_linear_san import fast_linear
from .image_input_san import attempt, open_image
from .processing_san import SANProcessor
from .text_san import check_class_names, clean_text


TASK = "open-vocabulary-segmentation"
OTHER = "other"
# Vocabularies whose class embeddings are kept, the latest used ones: C * D numbers each.
KEPT_VOCABULARIES = 32


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """For `custom_pipelines` in config.json: where Transformers finds these pipelines in the checkpoint's code."""
    classes = {TASK: OpenVocabularySegmentationPipeline, "image-segmentation": SANImageSegmentationPipeline}
    return {
        task: {"impl": f"pipeline_san.{cls.__name__}", "pt": ["AutoModelForSemanticSegmentation"], "type": "image"}
        for task, cls in classes.items()
    }


class ImageFolder(Dataset):
    """
    Paths of the images in a folder and in all folders below it, those that are links included, each once; in order,
    without hidden ones.

    Raises:
        OSError: a folder can't be read.
        ValueError: there is no image.
    """

    def __init__(self, folder: str):
        PIL.Image.init()
        endings = {ending for ending, name in PIL.Image.registered_extensions().items() if name in PIL.Image.OPEN}
        root, seen = os.path.realpath(folder), set()
        self.paths: list[str] = []
        for parent, folders, files in os.walk(folder, onerror=_reraise, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen or root.startswith(os.path.join(real, "")):  # a link back
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            images = [name for name in files if os.path.splitext(name)[1].lower() in endings and name[0] != "."]
            self.paths += (path for name in images if os.path.isfile(path := os.path.join(parent, name)))
        self.paths.sort()
        if not self.paths:
            raise ValueError(f"Got the folder '{folder}', which holds no image.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        return self.paths[index]


class OpenVocabularySegmentationPipeline(Pipeline):
    r"""
    Segments images by class names in plain words: `pipeline("open-vocabulary-segmentation", model=...)`.

    Args:
        model ([`SANForSemanticSegmentation`]): the model.
        processor ([`SANProcessor`]):
            Its processor. `image_processor` and `tokenizer`, if they are given, take the place of the processor's.
        kwargs:
            Of [`Pipeline`], and all arguments of a call but the images: those given here are the defaults of the calls.

    Raises:
        ValueError: for a model or a processor that isn't SAN's, and for arguments that there aren't.
    """

    # Remote code has classes of its own.
    model: Any
    processor: Any
    image_processor: Any
    tokenizer: Any

    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False
    _load_tokenizer: Any = False

    def __init__(self, model, *args, **kwargs):
        self._class_embeds: dict[tuple, tuple[list[str], torch.Tensor]] = {}
        self._encoded_with: list[tuple] = []
        if not hasattr(model, "get_class_embeds"):
            raise ValueError(f"Got {type(model).__name__} as the model, expected SANForSemanticSegmentation.")
        super().__init__(model, *args, **kwargs)
        self.processor = self._complete_processor()

    def _complete_processor(self) -> SANProcessor:
        """The processor, with the image processor and the tokenizer that were given beside it."""
        processor = self.processor
        if not hasattr(processor, "prompt_templates"):
            what = "no processor" if processor is None else f"{type(processor).__name__} as the processor"
            raise ValueError(f"Got {what}, expected the checkpoint's SANProcessor.")
        self.image_processor = self.image_processor or processor.image_processor
        self.tokenizer = self.tokenizer or processor.tokenizer
        if not hasattr(self.image_processor, "resized_sizes"):
            raise ValueError(
                f"Got {type(self.image_processor).__name__} as the image processor, expected SANImageProcessor."
            )
        if self.image_processor is processor.image_processor and self.tokenizer is processor.tokenizer:
            return processor
        return type(processor)(self.image_processor, self.tokenizer, prompt_templates=processor.prompt_templates)

    # The parent's arguments are any.
    def __call__(self, images=None, **kwargs):  # type: ignore[override]
        r"""
        Segments images, each at its own size.

        Args:
            images:
                A path, URL, base64 text or PIL image, turned upright by its EXIF orientation; a list or tuple of these;
                a generator or another iterable, or a [`Dataset`] such as [`KeyDataset`]; or a folder, whose images
                and those below it follow in the order of their paths.
            candidate_labels (`list[str]`, *optional*):
                Class names. They are encoded once for all calls with the same names. Without, those that the model
                carries.
            expansion (`list[str]`, *optional*):
                Further class names, for pixels that are none of `candidate_labels`: they compete with these, and make
                no segments.
            threshold (`float`, *optional*):
                Pixels whose confidence is lower belong to no segment, 0..1: see
                [`SANImageProcessor.post_process_semantic_segmentation`].
            prompt_templates (`str` or `list[str]`, *optional*):
                Instead of the processor's, see [`SANProcessor`].
            side_adapter (`str`, *optional*):
                Name of the model's side adapter to use, if not the active one.
            return_label_map (`bool`, *optional*, defaults to `False`):
                Whether to return the label map of each image as well.
            timeout (`float`, *optional*):
                Seconds to wait for an image from the web.
            batch_size (`int`, *optional*, defaults to 1):
                Images that are read at a time. Those of one shape go through the model together; none is padded for
                another's sake, so that its company changes nothing.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that read images.

        Returns:
            For each image a list of segments, one for each class that is there, in the order of the class names:
            **label** (`str`), **score** (`float`, 0..1, the mean of its pixels' confidence) and **mask** (`PIL.Image`
            of the image's size, 255 inside and 0 elsewhere). For an image that list, for a list or tuple a list of
            them, and otherwise an iterator, which reads as it goes. With `return_label_map`, a dictionary for each
            image, with the names of Transformers' post-processing: **segmentation**, the label map, (H, W) int64;
            **segments_info**, those segments, each also with its label as **id** and **label_id**; **id2label**, the
            names of the labels, the last of which is "other" with an `expansion` or a `threshold`.

        Raises:
            ValueError: for names that are no vocabulary (none, blank, repeated, not in a list), an image that can't be
                read, a model without classes and no `candidate_labels`, or arguments that there aren't.
        """
        if images is None and (images := kwargs.pop("inputs", None)) is None:
            raise ValueError("Got no images, expected an image or several, and candidate_labels=[...].")
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            images = ImageFolder(os.fspath(images))
        elif isinstance(images, tuple):
            images = list(images)
        elif not isinstance(images, list | Dataset | GeneratorType) and not _is_one_image(images):
            images = (image for image in images)
        if isinstance(images, Sized) and not isinstance(images, str) and len(images) == 0:
            self._sanitize_parameters(**{k: v for k, v in kwargs.items() if k not in ("batch_size", "num_workers")})
            return [] if isinstance(images, list) else iter(())
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: Sequence[str] | None = None,
        expansion: Sequence[str] | None = None,
        threshold: float | None = None,
        prompt_templates: str | Sequence[str] | None = None,
        side_adapter: str | None = None,
        return_label_map: bool | None = None,
        timeout: float | None = None,
        **others: Any,
    ) -> tuple[dict, dict, dict]:
        others.pop("local_files_only", None)  # `pipeline` has used it, and leaves it here
        if others:
            known = ", ".join(sorted({*OWN_ARGUMENTS, "batch_size", "num_workers", "threshold", "timeout"}))
            raise ValueError(f"Got the unknown argument {sorted(others)[0]!r}, expected one of {known}.")
        if threshold is not None and (
            isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold <= 1
        ):
            raise ValueError(f"Got threshold={threshold!r}, expected a score between 0 and 1.")
        if candidate_labels is not None:
            candidate_labels = self._read_class_names(candidate_labels, "candidate_labels")
        if expansion is not None:
            expansion = self._read_class_names(expansion, "expansion")
        forward: dict[str, Any] = {
            "candidate_labels": candidate_labels,
            "expansion": expansion,
            "threshold": threshold,
            "prompt_templates": prompt_templates,
            "side_adapter": side_adapter,
        }
        parts: tuple[dict, ...] = ({"timeout": timeout}, forward, {"return_label_map": return_label_map})
        preprocess, forward, postprocess = (
            {name: value for name, value in part.items() if value is not None} for part in parts
        )
        return preprocess, forward, postprocess

    def _read_class_names(self, source: Any, what: str) -> list[str]:
        """The names in `candidate_labels` or `expansion`, which where the package is installed may have other forms."""
        return check_class_names(source, what)

    def preprocess(self, image, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        name = f"the image {os.fspath(image)!r:.200}" if isinstance(image, str | os.PathLike) else "an image"
        if isinstance(image, dict):
            raise ValueError(
                f"Got a row with the columns {list(image)} as an image: KeyDataset(dataset, 'image') of "
                "transformers.pipelines.pt_utils picks one column."
            )
        image = attempt(name, _open, image, timeout)
        inputs = attempt(name, lambda: self.image_processor(images=image, return_tensors="pt"))
        return {"item": {**inputs, "target_size": (image.height, image.width)}}

    def _forward(  # type: ignore[override]
        self,
        model_inputs: dict[str, Any],
        candidate_labels: list[str] | None = None,
        expansion: list[str] | None = None,
        threshold: float | None = None,
        prompt_templates: str | Sequence[str] | None = None,
        side_adapter: str | None = None,
    ) -> dict[str, Any]:
        item = model_inputs["item"]
        items = item if isinstance(item, list) else [item]
        names, class_embeds = self._vocabulary(candidate_labels, expansion, prompt_templates, side_adapter)
        if (expansion or threshold is not None) and any(clean_text(name) == OTHER for name in names):
            raise ValueError(
                f"Got a class of the name {OTHER!r}, which is what the expansion or the threshold calls all that is "
                "none of the classes: leave it out, or give it another name."
            )
        by_shape: dict[tuple, list[int]] = {}
        for index, inputs in enumerate(items):
            by_shape.setdefault(tuple(inputs["pixel_values"].shape), []).append(index)
        results: dict[int, dict[str, Any]] = {}
        for indices in by_shape.values():
            pixel_values, image_sizes = (
                torch.cat([items[index][key] for index in indices]) for key in ("pixel_values", "image_sizes")
            )
            options = {} if side_adapter is None else {"side_adapter": side_adapter}
            with fast_linear(self.model.device):
                outputs = self.model(
                    pixel_values=pixel_values.to(self.model.dtype),
                    image_sizes=image_sizes,
                    class_embeds=class_embeds,
                    **options,
                )
            maps = self.image_processor.post_process_semantic_segmentation(
                outputs,
                target_sizes=[items[index]["target_size"] for index in indices],
                return_confidence=True,
                num_labels=len(names),
                threshold=threshold,
            )
            shown = names if not expansion and threshold is None else [*names, OTHER]
            for index, result in zip(indices, maps):
                label_map = result.segmentation
                results[index] = {
                    "label_map": label_map,
                    "confidence": result.confidence,
                    "class_names": shown,
                    "num_labels": len(names),
                }
        in_order = [results[index] for index in range(len(items))]
        return {"results": in_order if isinstance(item, list) else in_order[0]}

    def postprocess(self, model_outputs: dict[str, Any], return_label_map: bool = False):  # type: ignore[override]
        result = model_outputs["results"]
        label_map, class_names, num_labels = (result[key] for key in ("label_map", "class_names", "num_labels"))
        labels = label_map.flatten()
        counts = labels.bincount(minlength=num_labels)
        sums = labels.bincount(result["confidence"].flatten().double(), minlength=num_labels)
        segments = {}
        for label in counts[:num_labels].nonzero()[:, 0].tolist():
            mask = PIL.Image.fromarray((label_map == label).numpy().astype(np.uint8) * 255)
            score = (sums[label] / counts[label]).item()
            segments[label] = {"label": class_names[label], "score": score, "mask": mask}
        if not return_label_map:
            return list(segments.values())
        return {
            "segmentation": label_map,
            "segments_info": [{"id": label, "label_id": label, **segment} for label, segment in segments.items()],
            "id2label": dict(enumerate(class_names)),
        }

    def _vocabulary(self, names, expansion, templates, side_adapter) -> tuple[list[str], torch.Tensor | None]:
        """The classes' names, and their embeddings together with those of the expansion; None for carried ones."""
        if names is None:
            if expansion is not None or templates is not None:
                raise ValueError(
                    "Got an expansion or prompt templates without candidate_labels, expected the class names they are "
                    "for: the classes that a model carries can't be changed."
                )
            model = self.model if side_adapter is None else self.model.get_side_adapter(side_adapter)
            if not model.config.vocabulary_size:
                raise ValueError(
                    "This model carries no class names of its own: say what to look for, candidate_labels=['sky', ...]."
                )
            return [model.config.id2label[label] for label in range(model.config.vocabulary_size)], None
        # Embeddings are those of the text tower as it is: it may have been trained, cast, moved or adapted meanwhile.
        parts = (self.model.text_model, self.model.text_projection)
        tower = [
            (parameter, None if parameter.is_inference() else parameter._version, parameter.dtype, parameter.device)
            for part in parts
            for parameter in part.parameters()
        ]
        if len(tower) != len(self._encoded_with) or any(
            now[0] is not before[0] or now[1:] != before[1:] for now, before in zip(tower, self._encoded_with)
        ):
            self._class_embeds.clear()
            self._encoded_with = tower
        key = (
            tuple(names),
            tuple(expansion or ()),
            templates if templates is None or isinstance(templates, str) else tuple(templates),
            active_lora(self.model),
        )
        if key not in self._class_embeds:
            tokens = self.processor(text=names, expansion=expansion, prompt_templates=templates, return_tensors="pt")
            with fast_linear(self.device):
                class_embeds = self.model.get_class_embeds(tokens["input_ids"].to(self.device))
            if len(self._class_embeds) == KEPT_VOCABULARIES:
                del self._class_embeds[next(iter(self._class_embeds))]
            self._class_embeds[key] = (names, class_embeds)
        self._class_embeds[key] = self._class_embeds.pop(key)  # the latest used is the last
        return self._class_embeds[key]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the model, with its code and that of this pipeline, and the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class SANImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    Transformers' own pipeline for the classes that a model carries. It drops arguments that it doesn't know; those of
    [`OpenVocabularySegmentationPipeline`] are refused.
    """

    def __new__(cls, model=None, *args, **kwargs):
        # It stands for the task, where the package is installed: other models get what they have without it.
        if model is not None and getattr(getattr(model, "config", None), "model_type", None) != "san":
            return ImageSegmentationPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def _sanitize_parameters(self, **kwargs):
        if dropped := sorted(OWN_ARGUMENTS.intersection(kwargs)):
            raise ValueError(
                f"The task 'image-segmentation' knows no {dropped[0]}, only the classes that the model carries: use "
                f"pipeline('{TASK}', model=...)(images, candidate_labels=[...])."
            )
        return super()._sanitize_parameters(**kwargs)


# Of OpenVocabularySegmentationPipeline and not of Transformers' own, which has a threshold for other kinds of models.
OWN_ARGUMENTS = {"candidate_labels", "expansion", "prompt_templates", "return_label_map", "side_adapter"}


def _reraise(error: OSError) -> None:
    raise error


def _is_one_image(image) -> bool:
    """Whether this is an image or what can't be any, rather than a row of them."""
    return isinstance(image, str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor | dict) or not isinstance(
        image, Iterable
    )


def _open(image, timeout: float | None) -> PIL.Image.Image:
    """An image in any form that pipelines take, upright."""
    image = os.fspath(image) if isinstance(image, os.PathLike) else image
    if isinstance(image, str):
        return open_image(image, timeout)
    return PIL.ImageOps.exif_transpose(image) if isinstance(image, PIL.Image.Image) else load_image(image, timeout)
