"""Visualisations of label maps: colours, class maps, overlays with names and a legend, and comparisons."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage


OTHER_COLOR = (128, 128, 128)
# Drawn names are cut to this many characters.
MAX_NAME_LENGTH = 40
# An overlay is enlarged by a whole factor until its longer side is about this many pixels, so that names can be read.
READABLE_SIZE = 640
# Regions are analysed at this size at most: where a name goes needs no more.
PLACEMENT_SIZE = 512
# In comparisons: what has no label, what is wrong, and the longer side of each image.
UNLABELLED_COLOR = (24, 24, 24)
ERROR_COLOR = (230, 30, 30)
COMPARISON_SIZE = 320


def class_colors(num_classes: int) -> np.ndarray:
    """
    Colours for class indices 0..num_classes - 1: each as far as can be from all before it, to the eye.

    A class's colour depends on its index alone, not on how many classes there are. None is near `OTHER_COLOR`, black
    or white. From index 1,000 on they repeat.

    Returns:
        `np.ndarray` of shape (num_classes, 3), uint8 RGB.
    """
    palette = _palette()
    return palette[np.arange(num_classes) % len(palette)]


@cache
def _palette(size: int = 1000) -> np.ndarray:
    levels = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    # Neither near black or white nor near grey, and not so glaring that an image can't be seen through them.
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    usable = (lightness > 0.45) & (lightness < 0.9) & (chroma > 0.06) & (chroma < 0.2)
    candidates, lab = candidates[usable], lab[usable]
    distance = np.linalg.norm(lab - _oklab(np.array([OTHER_COLOR])), axis=1)
    chosen = []
    for _ in range(size):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return candidates[chosen].astype(np.uint8)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (N, 3) in 0..255 as Oklab, where distance is about difference to the eye (Ottosson 2020)."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def colorize(label_map: np.ndarray, colors: np.ndarray) -> Image.Image:
    """
    A label map in colours.

    Args:
        label_map: (H, W) integers in 0..len(colors) - 1.
        colors: (C, 3) uint8 RGB.

    Raises:
        ValueError: a label without a colour.
    """
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or not label_map.size:
        raise ValueError(f"A label map must be of shape (height, width), got {label_map.shape}.")
    low, high = int(label_map.min()), int(label_map.max())
    if low < 0 or high >= len(colors):
        raise ValueError(f"The label map has values {low}..{high}, but only 0..{len(colors) - 1} have colours.")
    return Image.fromarray(np.asarray(colors, dtype=np.uint8)[label_map])


def draw_overlay(
    image: Image.Image,
    label_map: np.ndarray,
    class_names: Sequence[str],
    colors: np.ndarray | None = None,
    opacity: float = 0.5,
) -> Image.Image:
    """
    The image under its label map: regions tinted and outlined, each class named once inside its largest region, and
    a legend with the share of pixels below. Small images are enlarged by a whole factor.

    Args:
        image: of the label map's size.
        label_map: (H, W) integers in 0..len(class_names) - 1.
        class_names: one for each label.
        colors: (len(class_names), 3) uint8 RGB; `class_colors` by default.
        opacity: of the tint, 0..1.

    Raises:
        ValueError: sizes that don't fit, or a label without a name.
    """
    label_map = np.asarray(label_map)
    colors = class_colors(len(class_names)) if colors is None else colors
    if label_map.shape != (image.height, image.width):
        raise ValueError(
            f"The label map is {label_map.shape}, the image {(image.height, image.width)} (height, width): they must "
            "be of the same size. post_process_semantic_segmentation takes it as target_sizes."
        )
    if len(colors) != len(class_names):
        raise ValueError(f"Got {len(colors)} colours for {len(class_names)} class names.")

    factor = max(1, round(READABLE_SIZE / max(image.size)))
    label_map = label_map.repeat(factor, axis=0).repeat(factor, axis=1)
    size = (image.width * factor, image.height * factor)
    drawing = Image.blend(
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC), colorize(label_map, colors), opacity
    )
    drawing.paste((255, 255, 255), mask=_outlines(label_map))
    font_size = max(14, max(size) // 40)
    draw = ImageDraw.Draw(drawing)
    for label, position in _placements(label_map, class_names, font_size).items():
        name = _short(class_names[label])
        draw.text(
            position,
            name,
            fill=(255, 255, 255),
            font=_font(name, font_size),
            anchor="mm",
            stroke_width=max(2, font_size // 8),
            stroke_fill=(0, 0, 0),
        )
    return _with_legend(drawing, _shares(label_map, class_names, colors), font_size)


def _outlines(label_map: np.ndarray) -> Image.Image:
    """A mask of where one region ends and another begins, as wide as the image's size asks for."""
    edges = np.zeros(label_map.shape, dtype=np.uint8)
    edges[:, 1:] |= label_map[:, 1:] != label_map[:, :-1]
    edges[1:] |= label_map[1:] != label_map[:-1]
    width = 2 * (max(label_map.shape) // 1500) + 1
    return Image.fromarray(255 * edges).filter(ImageFilter.MaxFilter(width))


def _placements(label_map: np.ndarray, class_names: Sequence[str], font_size: int) -> dict[int, tuple[float, float]]:
    """For each label whose name fits into its largest region: the (x, y) where most room is left around the name."""
    step = -(-max(label_map.shape) // PLACEMENT_SIZE)
    small = label_map[step // 2 :: step, step // 2 :: step] if min(label_map.shape) > step // 2 else label_map[:0]
    placements = {}
    for label in np.unique(small):
        name = _short(class_names[label])
        regions, _ = ndimage.label(small == label)
        largest = regions == 1 + np.bincount(regions.ravel())[1:].argmax()
        # Distance to the region's (or image's) edge, in units of the name's half width and half height: from 1 on a
        # name in the middle touches no edge straight beside, above or below it.
        left, top, right, bottom = _font(name, font_size).getbbox(name)
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
    comparisons: Sequence[Comparison], class_names: Sequence[str], ignore_index: int, font_size: int = 15
) -> Image.Image:
    """
    A grid: for each comparison a row of the image, the ground truth, and for each model its prediction and its errors;
    a legend of the classes that occur below. Images are scaled to `COMPARISON_SIZE`.

    Args:
        comparisons: of the same models.
        class_names: one for each label.
        ignore_index: what pixels without a label have in the label maps. They are no errors, whatever is predicted.
        font_size: in pixels.

    Raises:
        ValueError: no comparisons, maps of another size than their image, or labels without a name.
    """
    if not comparisons:
        raise ValueError("Got no comparisons to draw, expected at least one.")
    num_labels = len(class_names)
    # Beyond the classes: "other", "no label".
    colors = np.concatenate([class_colors(num_labels), [OTHER_COLOR], [UNLABELLED_COLOR]])
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
        cells = [_fit(comparison.image.convert("RGB"), Image.Resampling.BICUBIC)]
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
        draw.text((x, y + line / 2), _cut(text, font_size, room), (0, 0, 0), _font(text, font_size), anchor="lm")

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
    names = [*class_names, "other", "no label"]
    entries = [(colors[label], _short(names[label])) for label in np.flatnonzero(seen)]
    return _with_legend(canvas, [*entries, (ERROR_COLOR, "wrong")], font_size)


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


def _shares(label_map: np.ndarray, class_names: Sequence[str], colors: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Colour, and name with its share, of each class in the map, largest first."""
    counts = np.bincount(label_map.ravel(), minlength=len(class_names))
    present = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    return [(colors[label], f"{_short(class_names[label])} {counts[label] / label_map.size:.1%}") for label in present]


def _with_legend(drawing: Image.Image, entries: Sequence[tuple[Iterable[int], str]], font_size: int) -> Image.Image:
    """The image with a strip below: the (colour, text) of each entry."""
    line, gap = font_size * 3 // 2, font_size * 2 // 3
    widths = [line + _font(text, font_size).getlength(text) + gap for _, text in entries]
    drawingwidth = max(drawing.width, 320, round(max(widths)) + gap)
    positions: list[tuple[float, int]] = []
    x, y = float(gap), gap
    for width in widths:
        if x > gap and x + width > drawingwidth:
            x, y = float(gap), y + line
        positions.append((x, y))
        x += width
    canvas = Image.new("RGB", (drawingwidth, drawing.height + y + line + gap), (255, 255, 255))
    canvas.paste(drawing)
    draw = ImageDraw.Draw(canvas)
    for (color, text), (x, y) in zip(entries, positions):
        top = drawing.height + y
        fill = tuple(int(value) for value in color)
        draw.rectangle((x, top + 1, x + font_size, top + 1 + font_size), fill=fill, outline=(0, 0, 0))
        draw.text((x + line - 2, top + 1 + font_size / 2), text, (0, 0, 0), _font(text, font_size), anchor="lm")
    return canvas


def _cut(text: str, font_size: int, room: float) -> str:
    """The text, cut to the room there is, in pixels."""
    text, font = " ".join(text.split()), _font(text, font_size)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _short(name: str) -> str:
    """One line of at most MAX_NAME_LENGTH characters."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1].rstrip() + "…"


@cache
def _load_font(size: int, ascii_only: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if not ascii_only:
        # Pillow's own font has no others.
        for file in ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf", "arial.ttf"):
            try:
                return ImageFont.truetype(file, size)
            except OSError:
                pass
    return ImageFont.load_default(size)


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return _load_font(size, ascii_only=text.replace("…", "").isascii())
