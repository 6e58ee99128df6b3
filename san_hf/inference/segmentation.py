"""A segmented image."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from san_hf.colors import OTHER_COLOR, Color, name_colors
from san_hf.inference import exchange
from san_hf.inference.scores import compute_scores, compute_scores_at
from san_hf.inference.writers import DEFAULT_FORMATS, write_formats
from san_hf.rasters import Georeference
from san_hf.visualization import UNLABELLED_COLOR, colorize, count_labels, draw_overlay


if TYPE_CHECKING:
    import pandas
    import shapely
    import supervision

    from san_hf.modeling.label_maps_san import MaskPrediction

# The longer side of what a notebook shows.
NOTEBOOK_SIZE = 1024


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """
    A segmented image; as the value of a notebook's cell it shows its overlay. Two are equal if their images, label
    maps, class names, colours and confidences are, whether or not they have the predictions that scores need.

    Attributes:
        image: the image, upright, 8-bit RGB.
        label_map: (H, W) uint8, or uint16 beyond 256 labels, of the image's size; indices of `class_names`. Where a map
            has no data, the highest value of the type, 255 or 65535, which is no class's.
        class_names: the caller's, in the caller's order; "other" is the last if there is one.
        expanded: whether the last label is "other": all classes that the vocabulary was expanded by, and pixels below
            its threshold.
        given_colors: colours by name, for classes that are to have their own: see [`san_hf.colors.name_colors`].
        confidence: (H, W) float32, 0..1, of each pixel, if it was asked for: see [`Predictor.classify_pixels`].
        predictions: what `scores` are computed from, for each view of the image, if a confidence was asked for: masks
            at the model's size and classes of queries, a ViT-B/16's 2 MB for a photograph; none of windows.
        georeference: where the image lies on a map, if its file says so.
    """

    image: Image.Image
    label_map: np.ndarray
    class_names: Sequence[str]
    expanded: bool = False
    given_colors: Mapping[str, Color] = field(default_factory=dict)
    confidence: np.ndarray | None = None
    predictions: "Sequence[MaskPrediction]" = ()
    georeference: Georeference | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segmentation):
            return NotImplemented
        return (
            list(self.class_names) == list(other.class_names)
            and self.expanded == other.expanded
            and np.array_equal(self.label_map, other.label_map)
            and np.array_equal(self.colors, other.colors)
            and _equal(self.confidence, other.confidence)
            and self.georeference == other.georeference
            and self.image.mode == other.image.mode
            and np.array_equal(np.asarray(self.image), np.asarray(other.image))
        )

    def __hash__(self) -> int:
        # What equal ones have in common: a label map may be of another integer type.
        return hash((tuple(self.class_names), self.expanded, self.label_map.shape, self.pixels.tobytes()))

    def __repr__(self) -> str:
        present = sorted((entry for entry in self.legend() if entry["pixels"]), key=lambda entry: -entry["pixels"])
        shares = ", ".join(f"{entry['name']} {entry['share']:.1%}" for entry in present[:8])
        more = f", and {len(present) - 8} more" if len(present) > 8 else ""
        return f"Segmentation({self.width} x {self.height}: {shares}{more})"

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        picture, file = self.overlay(), io.BytesIO()
        picture.thumbnail((NOTEBOOK_SIZE, NOTEBOOK_SIZE))
        picture.save(file, format="png")
        return file.getvalue()

    @property
    def width(self) -> int:
        """Of the image, in pixels."""
        return self.image.width

    @property
    def height(self) -> int:
        """Of the image, in pixels."""
        return self.image.height

    @cached_property
    def colors(self) -> np.ndarray:
        """Colour of each label, (C, 3) uint8 RGB: by its name, see [`san_hf.colors.name_colors`]; grey for "other"."""
        return colors_of(self.class_names, self.expanded, self.given_colors)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Number of pixels of each label, (C,) int64."""
        count = len(self.class_names)
        return count_labels(self.label_map, max(count, int(self.label_map.max(initial=0)) + 1))[:count]

    def legend(self) -> list[dict[str, Any]]:
        """
        Every class in label order: its label, name, number and share (0..1) of the pixels that have data, and colour
        ("#rrggbb").
        """
        return legend_of(self.class_names, self.pixels, self.colors)

    def overlay(self) -> Image.Image:
        """The image under its label map, with names and a legend: see [`draw_overlay`]."""
        label_map, colors = self._drawn()
        names = [*self.class_names, *["no data"] * (len(colors) - len(self.class_names))]
        return draw_overlay(self.image, label_map, names, colors)

    def mask(self) -> Image.Image:
        """The label map in colours, of the image's size."""
        return colorize(*self._drawn())

    def masks(self) -> dict[str, np.ndarray]:
        """The pixels of each class that is present, by its name: (H, W) boolean. "other" is none of them."""
        return {self.class_names[label]: self.label_map == label for label in exchange.labels_present(self)}

    def scores(
        self, classes: str | int | Sequence[str | int], box: tuple[int, int, int, int] | None = None
    ) -> np.ndarray:
        """
        How sure the model is of some classes at each pixel, computed when asked for. A class's score is a confidence:
        the highest one of a pixel is its `confidence`, and all of them, those of the expansion included, add up to 1
        where the model's queries cover the pixel fully, and to less elsewhere: see [`Predictor.classify_pixels`].
        The label is the class of the highest score, unless it is below the vocabulary's threshold.

        The score of "other" is that of the best class of the expansion; without one, as there is a threshold only, 0.

        Args:
            classes: a name or label, or several. All at once take 4 * C * H * W bytes.
            box: (left, top, right, bottom) in pixels, right and bottom not included, for the scores in a part of the
                image; by default in all of it.

        Returns:
            Of one class (H, W) float32, 0..1, of several (n, H, W); of a box, as high and wide as it is.

        Raises:
            ValueError: no such class or box; or scores weren't kept, see `predictions`.
        """
        return compute_scores(self, classes, box)

    def scores_at(self, x: int, y: int) -> dict[str, float]:
        """
        The scores of all classes at one pixel by their names, the highest first: see [`Segmentation.scores`].

        Raises:
            ValueError: a pixel outside the image; or scores weren't kept, see `predictions`.
        """
        return compute_scores_at(self, x, y)

    def polygons(self, tolerance: float = 0.0) -> "dict[str, shapely.MultiPolygon]":
        """
        The outlines of each class that is present, by its name, with their holes.

        Args:
            tolerance: in pixels; corners are left out as long as no outline moves by more (Douglas and Peucker).

        Returns:
            shapely's geometries, in pixels: x to the right and y down, a pixel's edges at integers. With tolerance 0
            they are exactly the label map's regions.

        Raises:
            ValueError: a negative tolerance.
            MissingPackageError: without the extra `polygons` (rasterio, shapely).
        """
        return exchange.trace_polygons(self, tolerance)

    def to_coco(
        self, *, file_name: str = "", image_id: int = 1, polygons: bool = False, tolerance: float = 0.0
    ) -> dict[str, Any]:
        """
        A data set of this image in COCO's format: an annotation for each class that is present.

        Args:
            file_name: of the image, for its entry.
            image_id: of the image.
            polygons: polygons instead of run-length codes. COCO's have no holes: those that do are cut. Needs the extra
                `polygons`.
            tolerance: of the polygons, see [`Segmentation.polygons`].

        Returns:
            "images", "annotations" and "categories". A category's id is its label + 1, as 0 is the background there;
            "score" is the mean confidence, if there is one.
        """
        return exchange.to_coco(self, file_name=file_name, image_id=image_id, polygons=polygons, tolerance=tolerance)

    def to_geojson(
        self, *, tolerance: float = 0.0, transform: Sequence[float] | None = None, crs: str | None = None
    ) -> dict[str, Any]:
        """
        A GeoJSON collection: for each class that is present a feature, a MultiPolygon with the legend's entries as
        properties. Needs the extra `polygons`.

        Of an image that has a `georeference`, the coordinates are longitude and latitude of WGS 84, as RFC 7946 wants
        them; where its system isn't known, that system's; of others, pixels.

        Args:
            tolerance: see [`Segmentation.polygons`].
            transform: (a, b, c, d, e, f), instead of the image's own: what makes coordinates of a map out of pixels,
                x = a column + b row + c and y = d column + e row + f, as rasterio's `dataset.transform[:6]`. They are
                written as they come out. `georeference.transform` thus keeps the coordinates of the image's system.
            crs: name of the coordinates' system, such as "urn:ogc:def:crs:EPSG::32632", for a member "crs", which
                GeoJSON had before RFC 7946 and most programs read.
        """
        return exchange.to_geojson(self, tolerance=tolerance, transform=transform, crs=crs)

    def to_supervision(self) -> "supervision.Detections":
        """
        supervision's detections: one for each class that is present, with mask, box, label as `class_id`, mean
        confidence if there is one, and `data["class_name"]`. Needs the extra `supervision`.
        """
        return exchange.to_supervision(self)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each class: the legend's entries, and `score`, the mean confidence, if there is one."""
        return exchange.to_dataframe(self)

    def save(self, stem: str | os.PathLike, formats: Sequence[str] | None = None, **facts: Any) -> list[Path]:
        """
        Writes files whose names start with `stem`, for each format those of `san_hf.inference.writers.WRITERS`.

        Args:
            stem: path without extension. Files that are there already are replaced, each at once when it is complete.
            formats: out of `san_hf.inference.writers.FORMATS`; by default overlay, mask, json and png-labels, and
                confidence if there is one.
            **facts: further entries of the JSON file.

        Returns:
            The files.

        Raises:
            ValueError: an unknown format, or "confidence" without one.
            MissingPackageError: "geojson" without the extra `polygons`.
            OSError: a file can't be written.
        """
        if formats is None:
            formats = [*DEFAULT_FORMATS, *(["confidence"] if self.confidence is not None else [])]
        return write_formats(self, stem, formats, facts)

    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """The label map and the colours for drawings: with one more class if there are pixels without data."""
        count = len(self.class_names)
        if self.label_map.max(initial=0) < count:
            return self.label_map, self.colors
        return np.minimum(self.label_map, count), np.concatenate([self.colors, [UNLABELLED_COLOR]])


def colors_of(class_names: Sequence[str], expanded: bool, given: Mapping[str, Color]) -> np.ndarray:
    """See [`Segmentation.colors`]."""
    other = {class_names[-1]: OTHER_COLOR} if expanded else {}
    return name_colors(class_names, {**other, **given})


def legend_of(class_names: Sequence[str], pixels: np.ndarray, colors: np.ndarray) -> list[dict[str, Any]]:
    """See [`Segmentation.legend`]."""
    total = max(int(pixels.sum()), 1)
    return [
        {
            "label": label,
            "name": name,
            "pixels": int(count),
            "share": float(count / total),
            "color": "#{:02x}{:02x}{:02x}".format(*color),
        }
        for label, (name, count, color) in enumerate(zip(class_names, pixels, colors))
    ]


def _equal(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)
