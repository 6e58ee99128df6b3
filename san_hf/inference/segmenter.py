"""From image files and class names to label maps: what `san-hf segment` does, for use in Python."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from san_hf.conversion import RELEASES
from san_hf.hub import from_pretrained
from san_hf.images import ImageError
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.visualization import OTHER_COLOR, class_colors, colorize, draw_overlay
from san_hf.vocabularies import load_vocabulary


# What a vocabulary can be expanded by, for the argmax to have somewhere else to go.
EXPANSIONS = {"coco": "coco-stuff", "coco-stuff": "coco-stuff-only"}
EMBEDDED_MODEL = "picture-book"
FORMATS = ("overlay", "mask", "json", "png-labels")


class ModelError(ValueError):
    """A model that can't be loaded; the message says why, and what to do."""


@dataclass(frozen=True)
class Segmentation:
    """
    A segmented image.

    Attributes:
        image: the picture, upright, 8-bit RGB.
        label_map: (H, W) uint8, or uint16 beyond 256 labels, of the picture's size; an index of `class_names`.
        class_names: the caller's, in the caller's order, and last "other" if the vocabulary was expanded.
        expanded: whether the last label stands for all classes that the vocabulary was expanded by.
    """

    image: Image.Image
    label_map: np.ndarray
    class_names: list[str]
    expanded: bool = False

    @cached_property
    def colors(self) -> np.ndarray:
        """Colour of each label, (C, 3) uint8 RGB; grey for "other"."""
        colors = class_colors(len(self.class_names))
        if self.expanded:
            colors[-1] = OTHER_COLOR
        return colors

    @cached_property
    def pixels(self) -> np.ndarray:
        """Number of pixels of each label, (C,) int64."""
        return np.bincount(self.label_map.ravel(), minlength=len(self.class_names))

    def legend(self) -> list[dict[str, Any]]:
        """Every class in label order: its label, name, number and share (0..1) of pixels, and colour ("#rrggbb")."""
        return [
            {
                "label": label,
                "name": name,
                "pixels": int(count),
                "share": float(count / self.label_map.size),
                "color": "#{:02x}{:02x}{:02x}".format(*color),
            }
            for label, (name, count, color) in enumerate(zip(self.class_names, self.pixels, self.colors))
        ]

    def overlay(self) -> Image.Image:
        """The picture under its label map, with names and a legend: see [`draw_overlay`]."""
        return draw_overlay(self.image, self.label_map, self.class_names, self.colors)

    def mask(self) -> Image.Image:
        """The label map in colours, of the picture's size."""
        return colorize(self.label_map, self.colors)

    def save(self, stem: str | os.PathLike, formats: Sequence[str] = FORMATS, **facts: Any) -> list[Path]:
        """
        Writes files whose names start with `stem`: `.overlay.png`, `.mask.png`, `.json` (the legend and the size), and
        for "png-labels" `.labels.png` (one label per pixel, 8-bit or 16-bit grey) with its legend in `.json`.

        Args:
            stem: path without extension. Files that are there already are replaced, each at once when it is complete.
            formats: out of `FORMATS`.
            **facts: further entries of the JSON file.

        Returns:
            The files.
        """
        written = []
        for path in output_files(stem, formats):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{os.getpid()}.part")
            try:
                if path.name.endswith(".json"):
                    size = {"width": self.image.width, "height": self.image.height}
                    text = json.dumps(facts | size | {"classes": self.legend()}, indent=2, ensure_ascii=False)
                    partial.write_text(text + "\n", encoding="utf-8")
                elif path.name.endswith(".labels.png"):
                    Image.fromarray(self.label_map).save(partial, format="png")
                else:
                    (self.overlay() if path.name.endswith(".overlay.png") else self.mask()).save(partial, format="png")
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            written.append(path)
        return written


def output_files(stem: str | os.PathLike, formats: Sequence[str]) -> list[Path]:
    """
    The files that [`Segmentation.save`] writes.

    Raises:
        ValueError: an unknown format.
    """
    endings = {"overlay": [".overlay.png"], "mask": [".mask.png"], "json": [".json"]}
    endings["png-labels"] = [".labels.png", ".json"]
    unknown = [name for name in formats if name not in endings]
    if unknown:
        raise ValueError(f"Unknown formats {unknown}; there are {list(endings)}.")
    wanted = dict.fromkeys(ending for name in formats for ending in endings[name])
    return [Path(f"{os.fspath(stem)}{ending}") for ending in wanted]


class Segmenter:
    """
    A model with a vocabulary, ready for images. The class names go through the text tower once.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        class_names: words for what to look for. `None` for the vocabulary that the model carries.
        expand: "coco" or "coco-stuff" to let pixels also go to COCO-Stuff's 171 classes or its 91 kinds of stuff.
            Those that aren't in `class_names` become one last label, "other".
        templates: the prompts that names are put into, "vild", "imagenet" or a list of one's own; the processor's by
            default.

    Raises:
        ValueError: names that are no vocabulary (none, blank, repeated), no names and a model without a vocabulary.
    """

    def __init__(
        self,
        model: SANForSemanticSegmentation,
        processor: SANProcessor,
        class_names: Sequence[str] | None = None,
        *,
        expand: str | None = None,
        templates: str | Sequence[str] | None = None,
    ):
        self.model, self.processor = model, processor
        self.class_embeds = self.num_own = None
        if class_names is None:
            if expand is not None:
                raise ValueError("Only class names that are given can be expanded, not those that a model carries.")
            if not model.config.vocabulary_size:
                raise ValueError("This model carries no class names of its own: name what to look for.")
            self.class_names = [model.config.id2label[label] for label in range(model.config.vocabulary_size)]
            return
        expansion = None
        if expand is not None:
            if expand not in EXPANSIONS:
                raise ValueError(f"Can't expand by {expand!r}; there are {list(EXPANSIONS)}.")
            expansion = load_vocabulary(EXPANSIONS[expand])
        tokens = processor(text=class_names, expansion=expansion, prompt_templates=templates).to(model.device)
        self.class_names = [name.strip() for name in class_names]
        if expand is not None:
            self.num_own = len(self.class_names)
            self.class_names.append("other")
        with torch.inference_mode():
            self.class_embeds = model.get_class_embeds(**tokens)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = EMBEDDED_MODEL,
        class_names: Sequence[str] | None = None,
        *,
        expand: str | None = None,
        templates: str | Sequence[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Segmenter":
        """
        Loads a model by name, as [`san_hf.hub.from_pretrained`] does; the rest as above.

        Raises:
            ModelError: there is no such model, or it isn't a complete SAN.
            ValueError: names that are no vocabulary.
        """
        model, processor = load_model(name_or_path, dtype)
        return cls(model.to(device).eval(), processor, class_names, expand=expand, templates=templates)

    @torch.inference_mode()
    def __call__(self, image: str | os.PathLike | Image.Image) -> Segmentation:
        """
        Segments one image, at its own size.

        Args:
            image: a file that Pillow reads, turned upright by its EXIF orientation, or a PIL image, taken as it is.

        Raises:
            ImageError: the file can't be read.
        """
        image = self.load_image(image)
        inputs = self.processor(images=image).to(self.model.device)
        outputs = self.model(
            pixel_values=inputs["pixel_values"].to(self.model.dtype),
            image_sizes=inputs["image_sizes"],
            class_embeds=self.class_embeds,
        )
        (label_map,) = self.processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(image.height, image.width)], num_labels=self.num_own
        )
        dtype = np.uint8 if len(self.class_names) <= 256 else np.uint16
        return Segmentation(image, label_map.cpu().numpy().astype(dtype), self.class_names, self.num_own is not None)

    def load_image(self, image: str | os.PathLike | Image.Image) -> Image.Image:
        """
        An image as the model takes it: upright, 8-bit RGB, laid on white where transparent.

        Raises:
            ImageError: the file can't be read.
        """
        if not isinstance(image, Image.Image) and not os.path.isfile(image):
            raise ImageError("there is no such file")
        try:
            with warnings.catch_warnings():
                # Beyond its limit Pillow first warns, and refuses at twice of it.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                pixels = self.processor.image_processor.process_image(image, do_convert_rgb=True, do_rescale=True)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ImageError(
                f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against files made to fill the "
                "memory: scale it down first"
            ) from error
        except UnidentifiedImageError as error:
            reason = "not an image, or of a format Pillow can't read" if os.path.getsize(image) else "the file is empty"
            raise ImageError(reason) from error
        # A broken file makes Pillow's readers fail in many ways: OSError, SyntaxError, struct.error, IndexError, ...
        except Exception as error:
            raise ImageError(f"can't be read: {error or type(error).__name__}") from error
        return Image.fromarray(np.moveaxis(np.asarray(pixels), 0, -1))


def load_model(
    name_or_path: str | os.PathLike, dtype: torch.dtype, **kwargs: Any
) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """
    [`san_hf.hub.from_pretrained`], which also takes the **kwargs, with one kind of error whatever the reason.

    Raises:
        ModelError: there is no such model, or it isn't a complete SAN.
    """
    name = os.fspath(name_or_path)
    if os.path.isfile(name):
        raise ModelError(
            f"The model '{name}' is a file, expected a folder. A checkpoint of the original SAN becomes one by "
            f"`san-hf convert {name} FOLDER`."
        )
    try:
        return from_pretrained(name, dtype=dtype, **kwargs)
    # Broken files make torch, safetensors and tokenizers fail in ways of their own.
    except Exception as error:
        names = (EMBEDDED_MODEL, *RELEASES)
        looked_for = f"There is no folder here of that name, and it is none of {', '.join(names)}. On the Hub: "
        prefix = "" if os.path.isdir(name) or name in names else looked_for
        raise ModelError(f"The model '{name}' can't be loaded. {prefix}{str(error).strip()}") from error
