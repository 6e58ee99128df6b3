"""Visualisations of label maps: class maps, overlays with names and a legend, and comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from san_hf.colors import OTHER_COLOR, Color, class_colors, name_colors
from san_hf.images import to_rgb
from san_hf.legend import LegendEntry, drawn_name, fitted, legend_canvas, text_font


__all__ = [
    "OTHER_COLOR",
    "Comparison",
    "FrameOverlays",
    "class_colors",
    "colorize",
    "count_labels",
    "draw_comparisons",
    "draw_overlay",
    "name_colors",
]

# An overlay is enlarged by a whole factor until its longer side is about this many pixels, so that names can be read.
READABLE_SIZE = 640
# Regions are analysed at this size at most: where a name goes needs no more.
PLACEMENT_SIZE = 512
# An outline runs inside of parts of regions that are at least this many times as wide, and not beside parts of less
# than a quarter of that: finer masks would be hidden.
OUTLINED_WIDTH = 16
# What is as large as the image is made in bands of so many rows: the intermediate arrays would take several times the
# memory of a large photograph. Fewer rows would cost more time for what is looked at beyond them.
ROWS_AT_ONCE = 384
# Classes that a video's legend has room for: it stands below each frame.
MAX_FRAME_LEGEND = 32
# In comparisons: what has no label, what is wrong, and the longer side of each image.
UNLABELLED_COLOR = (24, 24, 24)
ERROR_COLOR = (230, 30, 30)
COMPARISON_SIZE = 320


def colorize(label_map: np.ndarray, colors: np.ndarray) -> Image.Image:
    """
    A label map in colours.

    Args:
        label_map: (H, W) integers in 0..len(colors) - 1.
        colors: (C, 3) uint8 RGB.

    Raises:
        ValueError: a label without a colour.
    """
    label_map, colors = _checked(label_map, len(colors)), np.asarray(colors, dtype=np.uint8)
    drawing = Image.new("RGB", label_map.shape[::-1])
    for rows in _bands(label_map):
        drawing.paste(Image.fromarray(np.take(colors, label_map[rows], axis=0)), (0, rows.start))
    return drawing


def count_labels(label_map: np.ndarray, count: int) -> np.ndarray:
    """
    Number of pixels of each label, (count,) int64.

    Args:
        label_map: (H, W) integers in 0..count - 1.
        count: of the labels.
    """
    return sum(
        (np.bincount(label_map[rows].ravel(), minlength=count) for rows in _bands(label_map)), np.zeros(count, int)
    )


def draw_overlay(
    image: Image.Image,
    label_map: np.ndarray,
    class_names: Sequence[str],
    colors: np.ndarray | None = None,
    opacity: float = 0.5,
) -> Image.Image:
    """
    The image under its label map: regions tinted and outlined, each class named once inside its largest region, and
    a legend with the share of pixels below, or beside tall, narrow images. Small images are enlarged by a whole factor.

    A name that no font can write is replaced by its label's number, "#3": [`san_hf.legend.numbered_names`] lists them.

    Args:
        image: of the label map's size, in any mode: see [`san_hf.images.to_rgb`].
        label_map: (H, W) integers in 0..len(class_names) - 1.
        class_names: one for each label.
        colors: (len(class_names), 3) uint8 RGB; [`san_hf.colors.name_colors`] by default.
        opacity: of the tint, 0..1.

    Raises:
        ValueError: sizes that don't fit, or a label without a name.
    """
    label_map = np.asarray(label_map)
    colors = name_colors(class_names) if colors is None else colors
    if label_map.shape != (image.height, image.width):
        raise ValueError(
            f"The label map is {label_map.shape}, the image {(image.height, image.width)} (height, width): they must "
            "be of the same size. post_process_semantic_segmentation takes it as target_sizes."
        )
    if len(colors) != len(class_names):
        raise ValueError(f"Got {len(colors)} colours for {len(class_names)} class names.")

    factor = max(1, round(READABLE_SIZE / max(image.size)))
    # Few bytes a pixel, which is what comparing them costs.
    label_map = _checked(label_map, len(colors)).astype(np.min_scalar_type(len(colors)), copy=False)
    image, size = to_rgb(image), (image.width * factor, image.height * factor)
    if factor > 1:
        label_map = label_map.repeat(factor, axis=0).repeat(factor, axis=1)
        image = image.resize(size, Image.Resampling.BICUBIC)
    font_size = _font_size(size)
    stroke = max(2, font_size // 8)
    counts = count_labels(label_map, len(class_names))
    names = {label: drawn_name(label, class_names[label]) for label in np.flatnonzero(counts).tolist()}
    largest_first = sorted(names, key=lambda label: -counts[label])
    entries = [
        LegendEntry(colors[label], names[label], f"{counts[label] / label_map.size:.1%}") for label in largest_first
    ]
    drawing = legend_canvas(size, entries, font_size)
    _tint(drawing, image, label_map, colors, opacity)
    draw = ImageDraw.Draw(drawing)
    for label, position in _placements(label_map, names, font_size, stroke).items():
        draw.text(
            position,
            names[label],
            fill=(255, 255, 255),
            font=text_font(names[label], font_size),
            anchor="mm",
            stroke_width=stroke,
            stroke_fill=(0, 0, 0),
        )
    return drawing


class FrameOverlays:
    """
    Overlays of a video's frames, in which nothing moves but what moves in the video: regions tinted and outlined as in
    [`draw_overlay`], without names in them; and a legend of all classes in their order, without shares, unless there
    are more than `MAX_FRAME_LEGEND`.

    Args:
        size: (width, height) of all frames.
        class_names: one for each label.
        colors: (len(class_names), 3) uint8 RGB.
        opacity: of the tint, 0..1.
    """

    def __init__(
        self, size: tuple[int, int], class_names: Sequence[str], colors: np.ndarray, opacity: float = 0.5
    ) -> None:
        self.colors, self.opacity = colors, opacity
        self._canvas = Image.new("RGB", size)
        if len(class_names) <= MAX_FRAME_LEGEND:
            names = [drawn_name(label, name) for label, name in enumerate(class_names)]
            self._canvas = legend_canvas(size, list(map(LegendEntry, colors, names)), _font_size(size))

    def draw(self, image: Image.Image, label_map: np.ndarray) -> Image.Image:
        """
        Args:
            image: 8-bit RGB.
            label_map: (H, W) integers, of the image's size.
        """
        drawing = self._canvas.copy()
        _tint(drawing, image, label_map, self.colors, self.opacity)
        return drawing


def _font_size(size: tuple[int, int]) -> int:
    """About as many letters across whatever the size, and never out of proportion to a thin image."""
    return max(14, min(round((size[0] * size[1]) ** 0.5 / 35), min(size) // 8))


def _tint(drawing: Image.Image, image: Image.Image, label_map: np.ndarray, colors: np.ndarray, opacity: float) -> None:
    """Draws an image under its label map, with outlines, at the top left of a drawing."""
    for rows in _bands(label_map):
        part = image.crop((0, rows.start, image.width, rows.stop))
        part = Image.blend(part, colorize(label_map[rows], colors), opacity)
        part.paste((255, 255, 255), mask=_outlines(label_map, rows))
        drawing.paste(part, (0, rows.start))


def _bands(label_map: np.ndarray) -> Iterator[slice]:
    """The rows of a label map, so many at once."""
    for top in range(0, len(label_map), ROWS_AT_ONCE):
        yield slice(top, min(top + ROWS_AT_ONCE, len(label_map)))


def _checked(label_map: np.ndarray, count: int) -> np.ndarray:
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or not label_map.size:
        raise ValueError(f"A label map must be of shape (height, width), got {label_map.shape}.")
    low, high = int(label_map.min()), int(label_map.max())
    if low < 0 or high >= count:
        raise ValueError(f"The label map has values {low}..{high}, but only 0..{count - 1} have colours.")
    return label_map


def _outlines(label_map: np.ndarray, rows: slice) -> Image.Image:
    """
    A mask of where one region ends and another begins, for some rows, as wide as the image's size asks for: on the
    right or lower side of each border, or on the other side if the region there is too fine; none beside what it would
    drown.
    """
    width = 2 * (max(label_map.shape) // 1500) + 1
    # Rows beyond which nothing is looked at: a square's side, what is beside a border, and the outline itself.
    top = max(0, rows.start - (OUTLINED_WIDTH + 1) * width - 2)
    label_map = label_map[top : rows.stop + (OUTLINED_WIDTH + 1) * width + 2]
    wide = _as_wide_as(OUTLINED_WIDTH * width + 1, label_map)
    seen = _as_wide_as(OUTLINED_WIDTH // 4 * width + 1, label_map)
    edges = np.zeros(label_map.shape, dtype=bool)
    for axis in (0, 1):
        labels, inside, visible, marked = (np.moveaxis(array, axis, 0) for array in (label_map, wide, seen, edges))
        border = labels[1:] != labels[:-1]
        marked[1:] |= border & inside[1:] & visible[:-1]
        marked[:-1] |= border & inside[:-1] & visible[1:] & ~inside[1:]
    outlines = _extreme(edges, width, np.maximum) & wide
    return Image.fromarray(255 * outlines[rows.start - top : rows.stop - top].astype(np.uint8))


def _as_wide_as(side: int, label_map: np.ndarray) -> np.ndarray:
    """Which pixels lie in a square of one label of so many pixels, an odd number: (H, W) bool."""
    alike = _extreme(label_map, side, np.minimum) == _extreme(label_map, side, np.maximum)
    return _extreme(alike, side, np.maximum)


def _extreme(values: np.ndarray, side: int, of_two: np.ufunc) -> np.ndarray:
    """
    The least or greatest value in the square around each pixel. As scipy's filters, but by comparing whole arrays, with
    twice the width after each: ten times as fast on a photograph's labels.
    """
    for axis in (0, 1):
        values = np.pad(values, [(side // 2,) * 2 if axis == padded else (0, 0) for padded in (0, 1)], mode="edge")
        width = 1
        while width < side:
            step = min(width, side - width)
            along = np.moveaxis(values, axis, 0)
            values = np.moveaxis(of_two(along[:-step], along[step:]), 0, axis)
            width += step
    return values


def _placements(
    label_map: np.ndarray, names: dict[int, str], font_size: int, stroke: int
) -> dict[int, tuple[float, float]]:
    """For each label whose name fits into its largest region: the (x, y) where most room is left around the name."""
    step = -(-max(label_map.shape) // PLACEMENT_SIZE)
    small = label_map[step // 2 :: step, step // 2 :: step] if min(label_map.shape) > step // 2 else label_map[:0]
    placements = {}
    for label in np.unique(small):
        name = names[int(label)]
        regions, _ = ndimage.label(small == label)
        largest = regions == 1 + np.bincount(regions.ravel())[1:].argmax()
        # Distance to the region's (or image's) edge, in units of the name's half width and half height: from 1 on a
        # name in the middle touches no edge straight beside, above or below it.
        left, top, right, bottom = text_font(name, font_size).getbbox(name, stroke_width=stroke)
        half = max(bottom - top, 1) / (2 * step), max(right - left, 1) / (2 * step)
        room = ndimage.distance_transform_edt(np.pad(largest, 1), sampling=(1 / half[0], 1 / half[1]))[1:-1, 1:-1]
        if room.max() >= 1:
            # Of the points with about as much room as any, the one most in the middle of them.
            points = np.argwhere(room >= 0.95 * room.max())
            y, x = points[np.square(points - points.mean(axis=0)).sum(axis=1).argmin()] * step + step // 2
            placements[int(label)] = (float(x), float(y))
    return placements


@dataclass(frozen=True)
class Comparison:
    """
    One image, what is on it, and what models make of it.

    Attributes:
        title: what to write over it.
        image: 8-bit RGB.
        label_map: (H, W) integers, the ground truth.
        predictions: (H, W) integers from 0 by the model's name; those beyond the classes are shown as "other".
        scores: each model's mIoU on this image, in percent, to write over its prediction; nan for none.
    """

    title: str
    image: Image.Image
    label_map: np.ndarray
    predictions: dict[str, np.ndarray]
    scores: dict[str, float]


def draw_comparisons(
    comparisons: Sequence[Comparison],
    class_names: Sequence[str],
    ignore_index: int,
    font_size: int = 15,
    given_colors: Mapping[str, Color] | None = None,
) -> Image.Image:
    """
    A grid: for each comparison a row of the image, the ground truth, and for each model its prediction and its errors;
    a legend of the classes that occur below. Images are scaled to `COMPARISON_SIZE`.

    Args:
        comparisons: of the same models.
        class_names: one for each label.
        ignore_index: what pixels without a label have in the label maps. They are no errors, whatever is predicted.
        font_size: in pixels.
        given_colors: by class name, for classes that are to have their own: see [`san_hf.colors.name_colors`].

    Raises:
        ValueError: no comparisons, maps of another size than their image, or labels without a name.
    """
    if not comparisons:
        raise ValueError("Got no comparisons to draw, expected at least one.")
    num_labels = len(class_names)
    # Beyond the classes: "other", "no label".
    colors = np.concatenate([name_colors(class_names, given_colors), [OTHER_COLOR], [UNLABELLED_COLOR]])
    models = list(comparisons[0].predictions)
    rows, seen = [], np.zeros(len(colors), dtype=bool)
    for comparison in comparisons:
        truth = np.where(comparison.label_map == ignore_index, num_labels + 1, comparison.label_map)
        predictions = [np.minimum(comparison.predictions[model], num_labels) for model in models]
        for label_map in (truth, *predictions):
            if label_map.shape != (comparison.image.height, comparison.image.width):
                raise ValueError(
                    f"{comparison.title}: a label map is {label_map.shape}, its image "
                    f"{(comparison.image.height, comparison.image.width)} (height, width): they must be of the same "
                    "size."
                )
            seen[np.unique(label_map)] = True
        cells = [_fit(to_rgb(comparison.image), Image.Resampling.BICUBIC)]
        cells.append(_fit(colorize(truth, colors), Image.Resampling.NEAREST))
        for prediction in predictions:
            cells.append(_fit(colorize(prediction, colors), Image.Resampling.NEAREST))
            cells.append(_errors(cells[0], truth, prediction, num_labels + 1))
        rows.append(cells)

    gap, line = font_size * 2 // 3, font_size * 3 // 2
    width = max(max(cells[0].width for cells in rows), font_size * 10)
    canvas = Image.new(
        "RGB",
        (
            gap + len(rows[0]) * (width + gap),
            gap + line + sum(line + cells[0].height + gap for cells in rows),
        ),
        (255, 255, 255),
    )
    draw = ImageDraw.Draw(canvas)

    def write(text: str, column: int, y: int, columns: int = 1) -> None:
        room = columns * (width + gap) - gap
        x = gap + column * (width + gap)
        text = fitted(text, font_size, room)
        draw.text((x, y + line / 2), text, (0, 0, 0), text_font(text, font_size), anchor="lm")

    headers = ["image", "ground truth", *(text for model in models for text in (model, "its errors"))]
    for column, header in enumerate(headers):
        write(header, column, gap)
    y = gap + line
    for comparison, cells in zip(comparisons, rows):
        write(comparison.title, 0, y, columns=2)
        for number, model in enumerate(models):
            if np.isfinite(comparison.scores[model]):
                write(f"mIoU {comparison.scores[model]:.1f}", 2 + 2 * number, y)
        for column, drawing in enumerate(cells):
            canvas.paste(drawing, (gap + column * (width + gap), y + line))
        y += line + cells[0].height + gap
    names = [*(drawn_name(label, name) for label, name in enumerate(class_names)), "other", "no label"]
    entries = [LegendEntry(colors[label], names[label]) for label in np.flatnonzero(seen)]
    drawing = legend_canvas(canvas.size, [*entries, LegendEntry(ERROR_COLOR, "wrong")], font_size)
    drawing.paste(canvas)
    return drawing


def _fit(drawing: Image.Image, resample: Image.Resampling) -> Image.Image:
    scale = COMPARISON_SIZE / max(drawing.size)
    return drawing.resize([max(1, round(side * scale)) for side in drawing.size], resample)


def _errors(drawing: Image.Image, truth: np.ndarray, prediction: np.ndarray, unlabelled: int) -> Image.Image:
    """The image in pale grey, red where the prediction is wrong, and dark where there is no label."""
    wrong = _fit(Image.fromarray((truth != prediction) & (truth != unlabelled)), Image.Resampling.NEAREST)
    missing = _fit(Image.fromarray(truth == unlabelled), Image.Resampling.NEAREST)
    pale = Image.blend(drawing.convert("L").convert("RGB"), Image.new("RGB", drawing.size, (255, 255, 255)), 0.45)
    red = Image.blend(pale, Image.new("RGB", drawing.size, ERROR_COLOR), 0.75)
    pale.paste(red, mask=wrong)
    pale.paste(UNLABELLED_COLOR, mask=missing)
    return pale
