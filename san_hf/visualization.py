"""Label maps as pictures: colours, class maps, overlays with names and a legend."""

from collections.abc import Sequence
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
    # Neither near black or white nor near grey, and not so glaring that a picture can't be seen through them.
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
    The picture under its label map: regions tinted and outlined, each class named once inside its largest region, and
    a legend with the share of pixels below. Small pictures are enlarged by a whole factor.

    Args:
        image: the picture, of the label map's size.
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
    picture = Image.blend(
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC), colorize(label_map, colors), opacity
    )
    picture.paste((255, 255, 255), mask=_outlines(label_map))
    font_size = max(14, max(size) // 40)
    draw = ImageDraw.Draw(picture)
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
    return _with_legend(picture, label_map, class_names, colors, font_size)


def _outlines(label_map: np.ndarray) -> Image.Image:
    """A mask of where one region ends and another begins, as wide as the picture's size asks for."""
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
        # Distance to the region's (or picture's) edge, in units of the name's half width and half height: from 1 on a
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


def _with_legend(
    picture: Image.Image, label_map: np.ndarray, class_names: Sequence[str], colors: np.ndarray, font_size: int
) -> Image.Image:
    """The picture with a strip below: colour, name and share of each class in it, largest first."""
    counts = np.bincount(label_map.ravel(), minlength=len(class_names))
    present = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    entries = [
        (tuple(int(v) for v in colors[label]), f"{_short(class_names[label])} {counts[label] / label_map.size:.1%}")
        for label in present
    ]
    line, gap = font_size * 3 // 2, font_size * 2 // 3
    widths = [line + _font(text, font_size).getlength(text) + gap for _, text in entries]
    canvas_width = max(picture.width, 320, round(max(widths)) + gap)
    positions, x, y = [], gap, gap
    for width in widths:
        if x > gap and x + width > canvas_width:
            x, y = gap, y + line
        positions.append((x, y))
        x += width
    canvas = Image.new("RGB", (canvas_width, picture.height + y + line + gap), (255, 255, 255))
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for (color, text), (x, y) in zip(entries, positions):
        top = picture.height + y
        draw.rectangle((x, top + 1, x + font_size, top + 1 + font_size), fill=color, outline=(0, 0, 0))
        draw.text((x + line - 2, top + 1 + font_size / 2), text, (0, 0, 0), _font(text, font_size), anchor="lm")
    return canvas


def _short(name: str) -> str:
    """One line of at most MAX_NAME_LENGTH characters."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1].rstrip() + "…"


@cache
def _load_font(size: int, ascii_only: bool) -> ImageFont.FreeTypeFont:
    if not ascii_only:
        # Pillow's own font has no others.
        for file in ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf", "arial.ttf"):
            try:
                return ImageFont.truetype(file, size)
            except OSError:
                pass
    return ImageFont.load_default(size)


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return _load_font(size, ascii_only=text.replace("…", "").isascii())
