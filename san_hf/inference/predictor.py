"""Images in, label maps out, with what benchmarks ask for: synonyms, larger vocabularies, test-time augmentation."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature

from san_hf.inference.segmenter import EXPANSIONS
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.post_processing_san import MaskPrediction, label_map_and_scores
from san_hf.vocabularies import load_vocabulary


# Of the processor's shortest edge. At SAN's 640: 320, 480, 640, 800, 960 and 1120, each also mirrored; the longest
# edge may then be as long at all of them as the largest scale allows, 1.75 * 2560 = 4480.
AUGMENTATION_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class PreparedImage:
    """
    What the model takes for one image.

    Attributes:
        target_size: (height, width) of the image.
        views: the processor's output for each view, on the CPU; every second one of several is mirrored.
    """

    target_size: tuple[int, int]
    views: list[BatchFeature]

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the padded views. Images of the same shape make a batch without any further padding, which would
        change what the model sees."""
        return tuple(tuple(view["pixel_values"].shape[-2:]) for view in self.views)


def split_synonyms(name: str) -> list[str]:
    """ "television, tv; telly" -> ["television", "tv", "telly"]."""
    return [part.strip() for part in re.split(r"[,;]", name) if part.strip()]


class SemanticPredictor:
    """
    A model with the classes of a benchmark. Their names go through the text tower once.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        class_names: C names, in the order of the labels.
        expand: "coco" or "coco-stuff" to let pixels also go to COCO-Stuff's 171 classes or its 91 kinds of stuff, if
            they aren't among the names already. Such pixels get the label C.
        synonyms: whether a name with commas or semicolons is a list of synonyms: "television, tv". The score of a
            class for a mask is then that of its best synonym. Otherwise, as in SAN's published figures, the name is
            put into the prompts as it is.
        templates: the prompts that names are put into, "vild", "imagenet" or a list; the processor's by default.
        augment: whether to average the scores of views at `AUGMENTATION_SCALES`, each also mirrored.
        autocast: a context manager to run the model in, such as `accelerator.autocast()`.

    Raises:
        ValueError: names that are no vocabulary: blank or repeated ones, or ones without a word.
    """

    def __init__(
        self,
        model: SANForSemanticSegmentation,
        processor: SANProcessor,
        class_names: Sequence[str],
        *,
        expand: str | None = None,
        synonyms: bool = False,
        templates: str | Sequence[str] | None = None,
        augment: bool = False,
        autocast=nullcontext,
    ):
        self.model, self.processor, self.augment, self.autocast = model, processor, augment, autocast
        self.num_labels = len(class_names)
        # Two classes may share a synonym, which the text tower then sees once; capitals it doesn't see.
        groups = [[part.lower() for part in split_synonyms(name)] for name in class_names] if synonyms else []
        if [] in groups:
            label = groups.index([])
            raise ValueError(
                f"Class {label}, {class_names[label]!r}, has no word: expected at least one between its commas and "
                "semicolons, or no synonyms."
            )
        names = list(dict.fromkeys(part for group in groups for part in group)) if synonyms else list(class_names)
        every_name = names
        if expand is not None:
            if expand not in EXPANSIONS:
                raise ValueError(f"Can't expand by {expand!r}; there are {list(EXPANSIONS)}.")
            every_name = processor.expand(names, load_vocabulary(EXPANSIONS[expand]))
        self.synonyms = None
        if synonyms:
            position = {name: index for index, name in enumerate(names)}
            # The expansion's names and, last, no object are on their own.
            rows = [[position[name] for name in group] for group in groups]
            rows += [[index] for index in range(len(names), len(every_name) + 1)]
            classes = [label for label, row in enumerate(rows) for _ in row]
            self.synonyms = [index for row in rows for index in row], classes
        tokens = processor(text=every_name, prompt_templates=templates).to(model.device)
        with torch.inference_mode(), autocast():
            self.class_embeds = model.get_class_embeds(**tokens)

    def prepare(self, image: Image.Image) -> PreparedImage:
        """
        The part of the work before the model, on the CPU; may be called by several threads.

        Args:
            image: upright, 8-bit RGB.
        """
        views = []
        for size in self._view_sizes():
            views.append(self.processor(images=image, size=size))
            if self.augment:
                views.append(self.processor(images=ImageOps.mirror(image), size=size))
        return PreparedImage((image.height, image.width), views)

    def _view_sizes(self) -> list[dict[str, int]]:
        size = {name: edge for name, edge in dict(self.processor.image_processor.size).items() if edge}
        if not self.augment:
            return [size]
        return [
            {
                name: round(edge * (max(AUGMENTATION_SCALES) if name == "longest_edge" else scale))
                for name, edge in size.items()
            }
            for scale in AUGMENTATION_SCALES
        ]

    @torch.inference_mode()
    def __call__(self, batch: Sequence[PreparedImage]) -> list[torch.Tensor]:
        """
        Args:
            batch: images whose `shape` is the same.

        Returns:
            For each its label map at its own size: (H, W) int64 with values 0..C - 1, or C for a class of the
            expansion, on the model's device.

        Raises:
            ValueError: the model's outputs are not finite.
        """
        views = [self._forward(views) for views in zip(*(image.views for image in batch))]
        sizes = [image.target_size for image in batch]
        if len(views) == 1:
            return self.processor.post_process_semantic_segmentation(
                views[0][1], target_sizes=sizes, num_labels=self.num_labels
            )
        return [self._average(views, index, size) for index, size in enumerate(sizes)]

    def _forward(self, inputs: Sequence[BatchFeature]):
        """The padded size, and the model's outputs with one class logit per class."""
        pixel_values = torch.cat([view["pixel_values"] for view in inputs])
        image_sizes = torch.cat([view["image_sizes"] for view in inputs])
        with self.autocast():
            outputs = self.model(
                pixel_values=pixel_values.to(self.model.device, self.model.dtype),
                image_sizes=image_sizes,
                class_embeds=self.class_embeds,
            )
        if self.synonyms is not None:
            names, classes = torch.tensor(self.synonyms, device=self.model.device)
            logits = outputs.class_queries_logits[..., names]
            best = logits.new_full((*logits.shape[:2], int(classes[-1]) + 1), -torch.inf)
            outputs.class_queries_logits = best.scatter_reduce(2, classes.expand_as(logits), logits, "amax")
        return tuple(pixel_values.shape[-2:]), outputs

    def _average(self, views: list, index: int, target_size: tuple[int, int]) -> torch.Tensor:
        """The label map by the average of all views' scores."""
        predictions = [
            MaskPrediction.from_logits(
                outputs.masks_queries_logits[index],
                outputs.class_queries_logits[index],
                padded_size,
                tuple(outputs.image_sizes[index].tolist()),
                target_size,
                mirrored=number % 2 == 1,
            )
            for number, (padded_size, outputs) in enumerate(views)
        ]
        return label_map_and_scores(predictions, num_labels=self.num_labels)[0]
