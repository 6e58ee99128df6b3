"""Images and a vocabulary in, label maps out: the one path that commands, evaluation and training share.

It has two steps, as the method allows it: `encode` is all of the vision cost and knows no classes; `classify` is a
small matrix product and the post-processing. New class names for an encoded image cost no vision pass.
Shapes: Q queries, D CLIP's joint embedding width, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature

from san_hf.inference.vocabulary import LABEL_OPTIONS, Autocast, ClassNames, Vocabulary
from san_hf.inference.windows import Side, Windows, blend_part, cells_of
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.fast_linear_san import fast_linear
from san_hf.modeling.label_maps_san import LabelledPixels, MaskPrediction, label_pixels
from san_hf.rasters import Raster
from san_hf.vocabularies.files import is_vocabulary_file


if TYPE_CHECKING:
    from san_hf.export import ExportedVision

# Of the processor's shortest edge. At SAN's 640: 320, 480, 640, 800, 960 and 1120, each also mirrored; the longest
# edge may then be as long at all of them as the largest scale allows, 1.75 * 2560 = 4480.
AUGMENTATION_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Rows of a large image that are labelled at once: whole tiles of post-processing, so that cutting changes no rounding.
STRIP_ROWS = 320


@dataclass(frozen=True)
class PreparedImage:
    """
    The model's inputs for one image.

    Attributes:
        target_size: (height, width) of the image.
        views: the processor's output for each view, on the CPU; of several views every second one is mirrored.
    """

    target_size: tuple[int, int]
    views: list[BatchFeature]

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the padded views. Images of the same shape make a batch without any further padding, which would
        change what the model sees."""
        return tuple(tuple(view["pixel_values"].shape[-2:]) for view in self.views)


@dataclass(frozen=True)
class EncodedView:
    """
    Output of the vision pass for one view of an image, before any class is named.

    Attributes:
        mask_logits: (Q, h, w), over the whole padded input.
        mask_embeds: (Q, D), L2-normalised, in CLIP's joint embedding space.
        image_size: (height, width) of the image inside the padded input.
        patch_size: (height, width) of that input's patches.
        mirrored: whether the view was mirrored, left to right.
        weight: at least 0, of its scores in the average over the views.
    """

    mask_logits: torch.Tensor
    mask_embeds: torch.Tensor
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    mirrored: bool
    weight: float = 1.0


@dataclass(frozen=True)
class EncodedImage:
    """
    An image after the vision pass, on the model's device.

    Attributes:
        target_size: (height, width) of the image, and of its label maps.
        views: one, or all of test-time augmentation.
    """

    target_size: tuple[int, int]
    views: tuple[EncodedView, ...]


class Predictor:
    """
    A model and its processor, from images and a vocabulary to label maps.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        augment: test-time augmentation: the scores of views at `AUGMENTATION_SCALES`, each also mirrored, are averaged.
        autocast: gives a context manager to run the model in, such as `accelerator.autocast`.
        runtime: an exported graph of this model that does the vision pass: [`san_hf.export.ExportedVision`].

    Raises:
        ExportError: the graph is of another model.
    """

    def __init__(
        self,
        model: SANForSemanticSegmentation,
        processor: SANProcessor,
        *,
        augment: bool = False,
        autocast: Autocast = nullcontext,
        runtime: "ExportedVision | None" = None,
    ):
        self.model, self.processor, self.augment, self.autocast = model, processor, augment, autocast
        if runtime is not None:
            runtime.check_model(model)
        self.runtime = runtime
        self._carried: tuple[torch.Tensor | None, Vocabulary] | None = None

    def vocabulary(self, class_names: ClassNames | None = None, **options: Any) -> Vocabulary:
        """
        A vocabulary for this model.

        Args:
            class_names: names to encode, or a file or a benchmark's name: see [`Vocabulary.encode`]. Or a
                [`Vocabulary`] of this model, or the file that [`Vocabulary.save`] wrote of one, which aren't encoded
                again. `None` for the vocabulary that the model carries.
            **options: of [`Vocabulary.encode`]; of those that were encoded before, only `threshold`, `other` and
                `colors`, see [`Vocabulary.with_options`].

        Raises:
            ValueError: see [`Vocabulary.encode`] and [`Vocabulary.of_model`].
            VocabularyError: embeddings of another text tower, or a file that can't be read.
        """
        if isinstance(class_names, Vocabulary):
            class_names.check_model(self.model)
            vocabulary = class_names.to(self.model.device)
        elif is_vocabulary_file(class_names):
            vocabulary = Vocabulary.load(class_names, self.model)  # type: ignore[arg-type]  # a path
        elif class_names is not None:
            return Vocabulary.encode(self.model, self.processor, class_names, autocast=self.autocast, **options)
        else:
            if self._carried is None or self._carried[0] is not self.model.class_embeds:
                self._carried = self.model.class_embeds, Vocabulary.of_model(self.model)
            vocabulary = self._carried[1]
        changes = {name: options.pop(name, None) for name in LABEL_OPTIONS}
        if given := [name for name, value in options.items() if value]:
            raise ValueError(
                "Only class names that are given can be expanded or changed, not those of a vocabulary or those that "
                f"a model carries: got {', '.join(given)}."
            )
        return vocabulary if all(value is None for value in changes.values()) else vocabulary.with_options(**changes)

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

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image | PreparedImage]) -> list[EncodedImage]:
        """
        The vision pass, once for each view of each image. Images of the same shape share it; others are never padded
        for another's sake, so that the company of an image does not change its prediction.

        Args:
            images: see [`Predictor.prepare`], which is called on those that aren't prepared.

        Returns:
            In the order of the images.
        """
        prepared = [image if isinstance(image, PreparedImage) else self.prepare(image) for image in images]
        by_shape: dict[tuple, list[int]] = {}
        for index, image in enumerate(prepared):
            by_shape.setdefault(image.shape, []).append(index)
        encoded: dict[int, EncodedImage] = {}
        for indices in by_shape.values():
            views = [
                self._encode_views(inputs, mirrored=number % 2 == 1)
                for number, inputs in enumerate(zip(*(prepared[index].views for index in indices)))
            ]
            for index, views_of_image in zip(indices, zip(*views)):
                encoded[index] = EncodedImage(prepared[index].target_size, views_of_image)
        return [encoded[index] for index in range(len(prepared))]

    def classify(self, encoded: Sequence[EncodedImage], vocabulary: Vocabulary | None = None) -> list[torch.Tensor]:
        """
        Label maps of encoded images. It needs no vision pass and no text pass.

        Args:
            encoded: of [`Predictor.encode`].
            vocabulary: of this model; the one that it carries by default.

        Returns:
            For each image its label map, of the image's size: (H, W) int64 indices of `vocabulary.class_names`, on the
            model's device.

        Raises:
            ValueError: the model's outputs are not finite, or it carries no vocabulary and none is given.
        """
        return [pixels.labels for pixels in self.classify_pixels(encoded, vocabulary, return_confidence=False)]

    @torch.inference_mode()
    def classify_pixels(
        self,
        encoded: Sequence[EncodedImage],
        vocabulary: Vocabulary | None = None,
        return_confidence: bool = True,
        dtype: torch.dtype = torch.int64,
    ) -> list[LabelledPixels]:
        """
        As [`Predictor.classify`], with a confidence for each pixel: `labels`, (H, W) int64 or another `dtype` that
        holds them, and `confidence`, (H, W) float32, or `None` without `return_confidence`, which is faster.

        SAN's score of a class at a pixel is a sum over queries, of the class's probability for a query times the
        query's mask, and so has no upper bound. The confidence is the highest score, divided by the sum of the scores
        of all classes where that sum is more than 1: 0..1, 1 where all queries that cover the pixel are sure of one
        class, 0 where none covers it. It is what a vocabulary's threshold is compared with. A pixel that becomes
        "other" keeps the confidence of the class that it would have had.
        """
        vocabulary = self.vocabulary() if vocabulary is None else vocabulary
        classifier = self.model.build_classifier(class_embeds=vocabulary.class_embeds)
        labelled, unchecked = [], []
        for image in encoded:
            predictions = self._predict_masks(image, vocabulary, classifier)
            labelled.append(
                label_pixels(
                    predictions,
                    vocabulary.num_labels,
                    vocabulary.threshold,
                    return_confidence=return_confidence,
                    dtype=dtype,
                )
            )
            unchecked += predictions if self.model.device.type != "cpu" else []
        # Only now, as it waits for an accelerator to finish.
        for prediction in unchecked:
            prediction.check()
        return labelled

    def label_windows(
        self,
        image: Image.Image | Raster,
        windows: Windows,
        vocabulary: Vocabulary | None = None,
        return_confidence: bool = False,
        dtype: torch.dtype = torch.int64,
        batch_size: int = 1,
    ) -> LabelledPixels:
        """
        A large image in windows that go through the model one by one, each at the processor's size. Where they overlap,
        their scores are blended before a class is chosen, so that no seam shows.

        Args:
            image, windows, batch_size: see [`Predictor.label_strips`].
            vocabulary, return_confidence, dtype: see [`Predictor.classify_pixels`].

        Returns:
            As [`Predictor.classify_pixels`] of one image, on the CPU.

        Raises:
            ValueError: test-time augmentation, or as [`Predictor.classify`].
        """
        labels = torch.empty(image.height, image.width, dtype=dtype)
        confidence = torch.empty(image.height, image.width) if return_confidence else None
        strips = self.label_strips(image, windows, vocabulary, return_confidence, dtype, batch_size)
        for rows, pixels in strips:
            labels[rows] = pixels.labels
            if confidence is not None and pixels.confidence is not None:
                confidence[rows] = pixels.confidence
        return LabelledPixels(labels, confidence)

    @torch.inference_mode()
    def label_strips(
        self,
        image: Image.Image | Raster,
        windows: Windows,
        vocabulary: Vocabulary | None = None,
        return_confidence: bool = False,
        dtype: torch.dtype = torch.int64,
        batch_size: int = 1,
    ) -> Iterator[tuple[slice, LabelledPixels]]:
        """
        As [`Predictor.label_windows`], strip by strip, for images of any height: what is encoded of two rows of windows
        is held at any time, and one strip.

        Args:
            image: upright, 8-bit RGB; or a raster, of which a row of windows is read at a time, each once.
            windows: their size and overlap, in pixels of the image.
            vocabulary, return_confidence, dtype: see [`Predictor.classify_pixels`].
            batch_size: windows that go through the model together.

        Yields:
            From the top, rows of the image and their pixels, on the CPU. Windows of a raster that have no data don't go
            through the model: what they cover has the label 0.
        """
        if self.augment:
            raise ValueError("Windows and test-time augmentation don't go together: expected augment=False.")
        vocabulary = self.vocabulary() if vocabulary is None else vocabulary
        classifier = self.model.build_classifier(class_embeds=vocabulary.class_embeds)
        rows, columns = windows.along(image.height), windows.along(image.width)

        def predict_row(row: Side) -> dict[int, MaskPrediction]:
            boxes = {
                number: (side.place.start, row.place.start, side.place.stop, row.place.stop)
                for number, side in enumerate(columns)
            }
            if isinstance(image, Raster):
                boxes = {number: box for number, box in boxes.items() if image.has_data(box)}
            places = list(boxes.values())
            batches = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
            encoded = [window for batch in batches for window in self.encode([image.crop(box) for box in batch])]
            predictions = (self._predict_masks(window, vocabulary, classifier)[0] for window in encoded)
            return dict(zip(boxes, predictions))

        held: dict[int, dict[int, MaskPrediction]] = {}
        for row_cell in cells_of(rows, STRIP_ROWS):
            held = {
                number: held[number] if number in held else predict_row(rows[number]) for number in row_cell.windows
            }
            height = row_cell.place.stop - row_cell.place.start
            labels = torch.zeros(height, image.width, dtype=dtype)
            confidence = torch.zeros(height, image.width) if return_confidence else None
            for column_cell in cells_of(columns):
                # All of a window without data is without, whatever other windows see of it.
                if any(number not in predictions for predictions in held.values() for number in column_cell.windows):
                    continue
                views = [
                    blend_part(predictions[number], rows[row_number], row_cell, columns[number], column_cell)
                    for row_number, predictions in held.items()
                    for number in column_cell.windows
                ]
                pixels = label_pixels(
                    views,
                    vocabulary.num_labels,
                    vocabulary.threshold,
                    return_confidence=return_confidence,
                    dtype=dtype,
                )
                labels[:, column_cell.place] = pixels.labels.cpu()
                if confidence is not None and pixels.confidence is not None:
                    confidence[:, column_cell.place] = pixels.confidence.cpu()
            if self.model.device.type != "cpu":
                for prediction in chain.from_iterable(predictions.values() for predictions in held.values()):
                    prediction.check()
            yield row_cell.place, LabelledPixels(labels, confidence)

    def _predict_masks(
        self, image: EncodedImage, vocabulary: Vocabulary, classifier: torch.Tensor
    ) -> list[MaskPrediction]:
        """Of each view of an image."""
        predictions = []
        mean_weight = sum(view.weight for view in image.views) / len(image.views)
        for view in image.views:
            with self.autocast():
                logits = self.model.class_logits(view.mask_embeds, classifier)
            prediction = MaskPrediction.from_logits(
                view.mask_logits,
                vocabulary.merge_synonyms(logits),
                view.patch_size,
                view.image_size,
                image.target_size,
                view.mirrored,
            )
            if view.weight != mean_weight:
                # Scores are linear in the probabilities, and averaged over the views later.
                weighted = prediction.probabilities * (view.weight / mean_weight)
                prediction = replace(prediction, probabilities=weighted)
            predictions.append(prediction)
        return predictions

    def __call__(
        self, images: Sequence[Image.Image | PreparedImage], vocabulary: Vocabulary | None = None
    ) -> list[torch.Tensor]:
        """[`Predictor.encode`], then [`Predictor.classify`]."""
        return self.classify(self.encode(images), vocabulary)

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

    def _encode_views(self, inputs: Sequence[BatchFeature], mirrored: bool) -> list[EncodedView]:
        """The same view of several images of one shape."""
        pixel_values = torch.cat([view["pixel_values"] for view in inputs])
        image_sizes = torch.cat([view["image_sizes"] for view in inputs])
        with fast_linear(self.model.device), self.autocast():
            encode_images = self.model.encode_images if self.runtime is None else self.runtime
            outputs = encode_images(pixel_values.to(self.model.device, self.model.dtype))
        return [
            EncodedView(
                mask_logits=mask_logits,
                mask_embeds=mask_embeds,
                image_size=tuple(image_size),
                patch_size=tuple(patch_size),
                mirrored=mirrored,
            )
            for mask_logits, mask_embeds, patch_size, image_size in zip(
                # Optional only as every field of an output is.
                outputs.masks_queries_logits,  # type: ignore[arg-type]
                outputs.mask_embeds,  # type: ignore[arg-type]
                outputs.patch_sizes.tolist(),  # type: ignore[union-attr]
                image_sizes.tolist(),
            )
        ]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a block; which parts of the model are in training mode is afterwards as it was before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
