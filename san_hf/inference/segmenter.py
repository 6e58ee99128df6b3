"""Image files and class names in, segmentations out: what `san-hf segment` does, for use in Python."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from san_hf.colors import Color, parse_color
from san_hf.hub.load import load_model
from san_hf.hub.names import EMBEDDED_MODEL
from san_hf.images import load_image
from san_hf.inference.large import WHOLE_PIXELS, SegmentedFile, Strip, check_formats, label_type, write_strips
from san_hf.inference.predictor import Predictor, PreparedImage
from san_hf.inference.segmentation import Segmentation
from san_hf.inference.vocabulary import ClassNames, Vocabulary
from san_hf.inference.windows import windows_of
from san_hf.inference.writers import DEFAULT_FORMATS
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.label_maps_san import LabelledPixels
from san_hf.rasters import Georeference, Raster, RasterOptions, open_raster


@dataclass(frozen=True)
class LoadedImage:
    """
    An image that was read and made ready for the model.

    Attributes:
        image: upright, 8-bit RGB.
        prepared: the model's inputs; `None` where an image goes through it in windows.
        valid: (H, W) bool, which pixels of a map have data; `None` where all have.
        georeference: where the image lies on a map, if its file says so.
    """

    image: Image.Image
    prepared: PreparedImage | None
    valid: np.ndarray | None = None
    georeference: Georeference | None = None


AnyImage = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | LoadedImage | Raster


class Segmenter:
    """
    A model with a vocabulary, ready for images. The class names go through the text tower once.

    Threads may share one. Processes may not inherit one that has segmented: after a fork, OpenMP waits for threads that
    were not forked. Make it in each process, or start processes by "spawn", or set OMP_NUM_THREADS=1. Results may be
    saved into one folder by any number of threads, processes and containers.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        class_names: words for what to look for, a file or a benchmark's name, or a [`Vocabulary`] of this model or its
            file: see [`Predictor.vocabulary`]. `None` for the vocabulary that the model carries.
        augment: test-time augmentation, see [`Predictor`].
        colors: colours by class name, such as {"sky": "#87ceeb"}, for classes that are to have their own; other names
            in it are ignored, so that one mapping serves many vocabularies. They come before the vocabulary's own. See
            [`san_hf.colors.name_colors`].
        confidence: whether segmentations are to have the `confidence` of each pixel, and, unless in windows, the
            `scores` of classes.
        tile: side of the windows, in pixels, that larger images are segmented in, each at the processor's size: for
            satellite and microscope images, whose objects would vanish in the whole image made small. By default every
            image is one.
        overlap: pixels that neighbouring windows share at least, where their scores are blended; an eighth of `tile` by
            default.
        raster: how maps become RGB, which have many bands or 16 bits: see [`san_hf.rasters.RasterOptions`].
        **options: `synonyms`, `average_synonyms`, `expand`, `templates`, `threshold`, `other`: see
            [`Vocabulary.encode`].

    Attributes:
        predictor: the [`Predictor`].
        vocabulary: the [`Vocabulary`]; another one may be set at any time.
        colors: the given colours, by name.
        confidence, raster: as given.
        windows: those of `tile` and `overlap`, if any.

    Raises:
        ValueError: names that are no vocabulary (none, blank, repeated), no names and a model without a vocabulary, a
            colour that is none, or windows that can't be.
    """

    def __init__(
        self,
        model: SANForSemanticSegmentation,
        processor: SANProcessor,
        class_names: ClassNames | None = None,
        *,
        augment: bool = False,
        colors: Mapping[str, Color] | None = None,
        confidence: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
        raster: RasterOptions | None = None,
        **options: Any,
    ):
        self.windows = windows_of(tile, overlap)
        if self.windows is not None and augment:
            raise ValueError("tile and augment don't go together: leave one out.")
        self.colors = {name: parse_color(color, name) for name, color in (colors or {}).items()}
        self.confidence = confidence
        self.raster = raster
        self.predictor = Predictor(model, processor, augment=augment)
        self.vocabulary = self.predictor.vocabulary(class_names, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = EMBEDDED_MODEL,
        class_names: ClassNames | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        runtime: str | None = None,
        **options: Any,
    ) -> "Segmenter":
        """
        Loads a model by name, as [`san_hf.hub.from_pretrained`] does; the rest as above.

        Args:
            name_or_path: with a `runtime`, a folder that [`san_hf.export.export_model`] wrote, in the open form.
            class_names: see above.
            device: for the model; "cpu" with a `runtime`.
            dtype: to compute in; with a `runtime` float32, or with OpenVINO bfloat16.
            runtime: "onnx" or "openvino", to run an exported graph.
            **options: see above.

        Raises:
            ModelError: there is no such model, or it isn't a complete SAN.
            ExportError: it is no exported folder, or the runtime isn't installed, or can't do what is asked for.
            ValueError: names that are no vocabulary.
        """
        if runtime is not None:
            from san_hf.export import load_exported

            return cls(*load_exported(name_or_path, runtime, device, dtype), class_names, **options)
        model, processor = load_model(name_or_path, dtype)
        # Transformers' decorator of `to` hides its signature.
        return cls(model.to(device).eval(), processor, class_names, **options)  # type: ignore[arg-type]

    @property
    def class_names(self) -> list[str]:
        """Names of the labels; "other" is the last if there is one."""
        return list(self.vocabulary.class_names)

    def load(self, image: AnyImage) -> LoadedImage | Raster:
        """
        The part of the work before the model: reads an image and makes it ready. Other threads may do it while the
        model is at work on the images before.

        Args:
            image: see `__call__`.

        Returns:
            The image; of one that [`Segmenter.segment_file`] segments in strips, the open file.

        Raises:
            ImageError: the image can't be read.
        """
        if isinstance(image, LoadedImage | Raster):
            return image
        if isinstance(image, str | os.PathLike) and (raster := open_raster(image, self.raster, self._strips_above)):
            if self._strips_above is not None and raster.pixels > self._strips_above:
                return raster
            return self._whole(raster)
        return self._prepared(load_image(image))

    def _whole(self, raster: Raster) -> LoadedImage:
        with closing(raster):
            image, valid = raster.whole()
        return self._prepared(image, valid, raster.georeference)

    def _prepared(
        self, image: Image.Image, valid: np.ndarray | None = None, georeference: Georeference | None = None
    ) -> LoadedImage:
        prepared = None if self.windows is not None else self.predictor.prepare(image)
        return LoadedImage(image, prepared, valid, georeference)

    @property
    def _strips_above(self) -> int | None:
        """Number of pixels above which rasters are segmented in strips."""
        return None if self.windows is None else WHOLE_PIXELS

    # A string is a sequence of strings, too, and a sequence can be iterated over: the first that fits counts.
    @overload
    def __call__(self, images: AnyImage, batch_size: int = 1) -> Segmentation: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: Sequence[AnyImage], batch_size: int = 1
    ) -> list[Segmentation]: ...

    @overload
    def __call__(self, images: Iterable[AnyImage], batch_size: int = 1) -> Iterator[Segmentation]: ...

    def __call__(self, images, batch_size=1):
        """
        Segments images, each at its own size.

        Args:
            images: an image, a list or tuple of images, or an iterator of images. An image is a file that Pillow
                reads, turned upright by its EXIF orientation; a URL; or a PIL image, an array or a tensor, taken as it
                is: see [`san_hf.images.load_image`]. Maps in TIFF or JPEG 2000 files are read by rasterio, with their
                georeference: see [`san_hf.rasters.open_raster`]. Or what [`Segmenter.load`] made of one.
            batch_size: images of a list or iterator that are read at a time; those of one shape go through the model
                together.

        Returns:
            Of an image its segmentation, of a list a list, of an iterator an iterator, which reads as it goes.

        Raises:
            ImageError: an image can't be read.
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"Got batch_size={batch_size}, expected at least 1.")
        if isinstance(images, AnyImage):
            (segmentation,) = self._segment([images])
            return segmentation
        segmentations = self._segment_all(iter(images), batch_size)
        return list(segmentations) if isinstance(images, list | tuple) else segmentations

    def _segment_all(self, images: Iterator[AnyImage], batch_size: int) -> Iterator[Segmentation]:
        while batch := list(islice(images, batch_size)):
            yield from self._segment(batch)

    def _segment(self, batch: Sequence[AnyImage]) -> list[Segmentation]:
        opened = [self.load(image) for image in batch]
        loaded = [self._whole(image) if isinstance(image, Raster) else image for image in opened]
        dtype = label_dtype(self.vocabulary)
        if self.windows is None:
            encoded = self.predictor.encode([image.prepared or image.image for image in loaded])
            labelled = self.predictor.classify_pixels(
                encoded, self.vocabulary, return_confidence=self.confidence, dtype=dtype
            )
        else:
            labelled = [
                self.predictor.label_windows(image.image, self.windows, self.vocabulary, self.confidence, dtype)
                for image in loaded
            ]
        return [
            as_segmentation(
                image.image, pixels, self.vocabulary, self.colors, valid=image.valid, georeference=image.georeference
            )
            for image, pixels in zip(loaded, labelled)
        ]

    def segment_file(
        self,
        image: AnyImage,
        stem: str | os.PathLike,
        formats: Sequence[str] | None = None,
        /,
        *,
        progress: Callable[[int, int], None] | None = None,
        **facts: Any,
    ) -> SegmentedFile:
        """
        Segments an image into files, in bounded memory: with `tile`, a TIFF or JPEG 2000 file of more than
        `san_hf.inference.large.WHOLE_PIXELS` pixels is read, segmented and written strip by strip. Any other image is
        segmented as a whole.

        Args:
            image: see `__call__`.
            stem, formats, **facts: see [`Segmentation.save`]. Of an image in strips, "overlay" is a reduced picture.
            progress: is called with the number of rows that are done, and that of all.

        Returns:
            The classes with their pixels, and the files.

        Raises:
            ImageError: the image can't be read.
            ValueError: an unknown format, or one that isn't written in strips.
            OSError: a file can't be written.
        """
        if formats is None:
            formats = [*DEFAULT_FORMATS, *(["confidence"] if self.confidence else [])]
        loaded, vocabulary = self.load(image), self.vocabulary
        names, colors = list(vocabulary.class_names), {**vocabulary.colors, **self.colors}
        size = loaded if isinstance(loaded, Raster) else loaded.image
        segmented = SegmentedFile(size.width, size.height, names, vocabulary.has_other, colors, loaded.georeference)
        if isinstance(loaded, Raster):
            with closing(loaded):
                check_formats(formats, self.confidence)
                write_strips(self._strips(loaded), segmented, stem, formats, facts, progress)
        else:
            segmentation = self(loaded)
            segmented.pixels[:] = segmentation.pixels
            segmented.files += segmentation.save(stem, formats, **facts)
        return segmented

    def _strips(self, raster: Raster) -> Iterator[Strip]:
        """The segmented image from the top, in strips as windows make them."""
        if self.windows is None:
            raise ValueError("This image was loaded for windows, and there are none: expected tile.")
        dtype, labels_type = label_dtype(self.vocabulary), label_type(len(self.vocabulary.class_names))
        strips = self.predictor.label_strips(raster, self.windows, self.vocabulary, self.confidence, dtype)
        for rows, pixels in strips:
            colors, valid = raster.rows(rows)
            labels = mark_no_data(pixels.labels.numpy().astype(labels_type, copy=False), valid)
            yield Strip(labels, colors, None if pixels.confidence is None else pixels.confidence.numpy())


def label_dtype(vocabulary: Vocabulary) -> torch.dtype:
    """
    The smallest that holds all labels, for [`Predictor.classify_pixels`]: torch has next to no operators for unsigned
    16-bit integers.
    """
    count = len(vocabulary.class_names)
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def as_segmentation(
    image: Image.Image,
    pixels: LabelledPixels,
    vocabulary: Vocabulary,
    colors: Mapping[str, Color],
    *,
    valid: np.ndarray | None = None,
    georeference: Georeference | None = None,
) -> Segmentation:
    """
    The result that goes with an image.

    Args:
        image: upright, 8-bit RGB.
        pixels: its labels and, if it was asked for, confidence: see [`Predictor.classify_pixels`]. With a confidence,
            what the scores of classes are computed from is kept, on the CPU.
        vocabulary: whose labels they are.
        colors: by class name; they come before the vocabulary's own.
        valid: (H, W) bool, which pixels have data; `None` where all have.
        georeference: where the image lies on a map.
    """
    names = list(vocabulary.class_names)
    labels = pixels.labels.cpu().numpy().astype(np.uint8 if len(names) <= 2**8 else np.uint16, copy=False)
    if valid is not None:
        labels = mark_no_data(labels.astype(label_type(len(names)), copy=False), valid)
    return Segmentation(
        image,
        labels,
        names,
        vocabulary.has_other,
        {**vocabulary.colors, **colors},
        None if pixels.confidence is None else pixels.confidence.cpu().numpy(),
        () if pixels.confidence is None else tuple(view.on_cpu() for view in pixels.views),
        georeference,
    )


def mark_no_data(labels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Labels (H, W) of a type with room for one more, which get its highest value where `valid`, (H, W), is False."""
    return labels if valid is None else np.where(valid, labels, np.iinfo(labels.dtype).max)
