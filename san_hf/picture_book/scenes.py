"""Pages and photographs of the picture book: drawn scenes with exact label maps and captions, from a seed.

Coordinates are (x, y) in pixels, origin top left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from san_hf.picture_book.objects import COMPOSITIONS, HABITATS, LABELS, STUFF, Colour, draw_object, scale_colour


PAGE_SIZE = 160  # side of a page in pixels

_SUPERSAMPLING = 2
_GROUND: dict[str, Colour] = {"grass": (112, 172, 74), "sand": (226, 202, 148), "water": (72, 152, 190)}
_SKIES = (  # colours at the top and at the horizon
    ((120, 182, 232), (206, 230, 246)),
    ((150, 196, 224), (240, 226, 206)),
    ((160, 170, 214), (240, 206, 210)),
    ((176, 190, 202), (218, 224, 228)),
)


@dataclass(frozen=True)
class SceneObject:
    """One drawn object.

    Attributes:
        name: Composition, one of `COMPOSITIONS`.
        box: (left, top, right, bottom) of its visible pixels, right and bottom exclusive.
        visible: Share of its pixels that nothing covers, 0..1.
    """

    name: str
    box: tuple[int, int, int, int]
    visible: float


@dataclass(frozen=True)
class Scene:
    """One page of the picture book: an image with its label map and a caption.

    Attributes:
        image: RGB.
        label_map: (H, W) uint8, indices into `CLASS_NAMES`; every pixel has one.
        objects: The drawn objects, those farther away first.
        caption: What the page shows: "a red car and a striped house on the grass".
    """

    image: Image.Image
    label_map: np.ndarray
    objects: tuple[SceneObject, ...]
    caption: str


def _background(
    rng: np.random.Generator, width: int, height: int, habitats: set[str]
) -> tuple[Image.Image, Image.Image, dict[str, tuple[float, float]]]:
    """
    The stuff of a scene: sky, sometimes mountains, and one or two bands of ground, so that each habitat is there.

    Returns:
        The RGB image, its label map as an image, and {habitat: (top, bottom)}: the rows where an object may touch the
        ground (for "sky": where its centre may be).
    """
    top_colour, low_colour = _SKIES[rng.integers(len(_SKIES))]
    horizon = height * rng.uniform(0.32, 0.52)
    ramp = Image.linear_gradient("L").resize((width, height))
    low_sky, top_sky = (Image.new("RGB", (width, height), colour) for colour in (low_colour, top_colour))
    image = Image.composite(low_sky, top_sky, ramp)
    labels = Image.new("L", (width, height), LABELS["sky"])
    draw, draw_labels = ImageDraw.Draw(image), ImageDraw.Draw(labels)

    for _ in range(rng.integers(0, 3)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, horizon), height * rng.uniform(0.04, 0.08)
        for shift in (-1.2, 0.0, 1.2):
            middle = x + shift * r
            draw.ellipse((middle - r, y - r * 0.7, middle + r, y + r * 0.7), fill=scale_colour(low_colour, 1.06))
    if rng.random() < 0.45:
        colour = scale_colour(
            [(128, 124, 150), (110, 128, 140), (150, 134, 130)][rng.integers(3)], rng.uniform(0.85, 1.1)
        )
        step = width / rng.uniform(2.0, 4.0)
        x = -step * rng.random()
        outline = [(0, horizon + 1), (x, horizon - height * 0.06)]
        while x < width:
            outline.append((x + step / 2, horizon - height * rng.uniform(0.14, 0.26)))
            outline.append((x + step, horizon - height * rng.uniform(0.04, 0.08)))
            x += step
        outline.append((width, horizon + 1))
        draw.polygon(outline, fill=colour)
        draw_labels.polygon(outline, fill=LABELS["mountain"])

    land = ["grass", "sand"][rng.integers(2)]
    if {"land", "water"} <= habitats or rng.random() < 0.3:
        kinds = [land, "water"] if rng.random() < 0.5 else ["water", land]
        edges = [horizon, horizon + (height - horizon) * rng.uniform(0.4, 0.6), height]
    else:
        kinds = ["water" if "water" in habitats or (not habitats and rng.random() < 0.4) else land]
        edges = [horizon, height]
    rows = {"sky": (height * 0.1, horizon)}
    for kind, top, bottom in zip(kinds, edges, edges[1:]):
        colour = scale_colour(_GROUND[kind], rng.uniform(0.85, 1.12))
        # The upper edge is a wave, that of water a straight line.
        swell = 0 if kind == "water" else height * rng.uniform(0, 0.03)
        phase, waves = rng.uniform(0, 6.3), rng.uniform(1, 3)
        xs = np.linspace(0, width, 24)
        outline = [(x, top + swell * math.sin(phase + 6.3 * waves * x / width)) for x in xs]
        outline += [(width, height), (0, height)]
        draw.polygon(outline, fill=colour)
        draw_labels.polygon(outline, fill=LABELS[kind])
        light, dark, unit = scale_colour(colour, 1.16), scale_colour(colour, 0.84), height / 90
        for x, y in zip(rng.uniform(0, width, 60), rng.uniform(top + height * 0.03, height, 60)):
            if kind == "grass":
                draw.line((x, y, x + unit, y - 3 * unit), fill=dark, width=max(1, round(unit / 2)))
            elif kind == "sand":
                draw.ellipse((x, y, x + unit, y + unit), fill=dark)
            else:
                draw.line((x, y, x + 6 * unit, y), fill=light, width=max(1, round(unit / 2)))
        rows["water" if kind == "water" else "land"] = (top + 0.35 * (bottom - top), bottom)
    return image, labels, rows


def _light(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The image under some light: brightness, tint, a gradient from left to right, and noise."""
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    gain = rng.uniform(0.78, 1.08) * rng.uniform(0.94, 1.06, 3)
    ramp = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, width)[None, :, None]
    grain = rng.normal(0, rng.uniform(1, 5), (height, width, 1))
    return Image.fromarray(np.clip(pixels * (gain * ramp) + grain, 0, 255).astype(np.uint8))


def _join_names(names: Sequence[str]) -> str:
    """["red car", "blue house"] -> "a red car and a blue house"."""
    names = [f"a {name}" for name in names]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def draw_scene(
    seed: int | Sequence[int] | np.random.Generator,
    size: tuple[int, int] = (PAGE_SIZE, PAGE_SIZE),
    names: Sequence[str] | None = None,
    choose_from: Sequence[str] = COMPOSITIONS,
    scale: tuple[float, float] = (0.48, 0.68),
) -> Scene:
    """Draws one scene; the same seed gives the same scene, byte for byte, with the same Pillow and NumPy.

    Args:
        seed: Seed, seeds, or generator.
        size: (width, height) in pixels, each at least 32. A larger page shows the same kind of scene in more detail.
        names: Compositions to draw, at most five; an empty list for stuff only. Default: two of `choose_from`.
        choose_from: Compositions to choose from if `names` is not given; `BASE` for training with masks.
        scale: Smallest and largest side of an object's square, as a share of the page's shorter side.

    Raises:
        ValueError: for a size under 32 px, more than five names, or a name that is not in `COMPOSITIONS`.
    """
    if min(size) < 32:
        raise ValueError(f"A scene needs at least 32 x 32 pixels to show anything, got {size[0]} x {size[1]}.")
    rng = np.random.default_rng(seed)
    if names is None:
        names = [choose_from[i] for i in rng.choice(len(choose_from), min(2, len(choose_from)), False)]
    if len(names) > 5:
        raise ValueError(f"A scene has room for five objects, got {len(names)}.")
    unknown = sorted(set(names) - set(COMPOSITIONS))
    if unknown:
        raise ValueError(f"Not in the picture book: {unknown}. Names are '<attribute> <object>', as in COMPOSITIONS.")

    width, height = (side * _SUPERSAMPLING for side in size)
    habitats = {HABITATS[name.split(" ")[1]] for name in names}
    while True:
        image, labels, rows = _background(rng, width, height, habitats)
        placed = []
        slots = rng.permutation(len(names)) + rng.uniform(0.3, 0.7, len(names))
        for name, slot in zip(names, slots):
            side = int(min(width, height) * rng.uniform(*scale))
            habitat = HABITATS[name.split(" ")[1]]
            row = rng.uniform(*rows[habitat])
            top = row - side * (0.5 if habitat == "sky" else 0.92)
            top = int(np.clip(top, 0, height - side))
            left = int(np.clip(width * slot / len(names) - side / 2, 0, width - side))
            placed.append((top + side, left, top, side, name, habitat == "sky"))
        # Objects higher up on the page are farther away, those in the sky farthest.
        placed.sort(key=lambda item: (not item[-1], item[0]))
        index_map = Image.new("L", (width, height))  # 0: stuff, i: object i
        drawn = []
        for index, (_, left, top, side, name, _) in enumerate(placed, start=1):
            object_image, mask = draw_object(rng, name, side)
            image.paste(object_image, (left, top), mask)
            labels.paste(LABELS[name], (left, top, left + side, top + side), mask)
            index_map.paste(index, (left, top, left + side, top + side), mask)
            drawn.append((name, mask.histogram()[255]))
        counts = index_map.histogram()
        visible = [counts[index] / pixels for index, (_, pixels) in enumerate(drawn, start=1)]
        if min(visible, default=1.0) >= 0.55:
            break

    image = _light(rng, image.reduce(_SUPERSAMPLING))
    labels = labels.resize(size, Image.Resampling.NEAREST)
    indices = np.asarray(index_map.resize(size, Image.Resampling.NEAREST))
    objects = []
    for index, ((name, _), share) in enumerate(zip(drawn, visible), start=1):
        ys, xs = np.nonzero(indices == index)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append(SceneObject(name, box, share))
    label_map = np.asarray(labels)
    seen = [name for name in STUFF if (label_map == LABELS[name]).mean() > 0.05]
    stuff = " and ".join(seen)
    caption = f"{_join_names([o.name for o in objects])} with {stuff}" if objects else stuff
    return Scene(image, label_map, tuple(objects), caption)


def draw_photo(
    seed: int | Sequence[int] | np.random.Generator, subject: str, size: int = 64, others: int = 0
) -> tuple[Image.Image, tuple[str, ...], tuple[str, ...]]:
    """Draws a square photograph of one subject: a part of a scene, with the subject in view.

    Args:
        seed: Seed, seeds, or generator.
        subject: One of `CLASS_NAMES`; stuff fills most of the photograph.
        size: Side of the photograph in pixels.
        others: Number of other objects in the scene, at most four; they may lie outside the photograph.

    Returns:
        The RGB image, the names of the objects of which at least 80 % of the box is in view, and the names of the
        stuff that fills more than a sixth of it. The subject is one of these names.
    """
    rng = np.random.default_rng(seed)
    side = size * 3 // 2
    things: tuple[str, ...] = ()
    while True:
        other_names = [COMPOSITIONS[i] for i in rng.choice(len(COMPOSITIONS), others, replace=False)]
        names = [] if subject in STUFF else list(dict.fromkeys([subject, *other_names]))
        scene = draw_scene(rng, (side, side), names, scale=(0.32, 0.5))
        for _ in range(8):
            if subject in STUFF:
                window = int(side * rng.uniform(0.25, 0.6))
                left, top = rng.integers(0, side - window, 2, endpoint=True)
                part = scene.label_map[top : top + window, left : left + window]
                found = (part == LABELS[subject]).mean() > 0.6
            else:
                window = int(side * rng.uniform(0.5, 0.95))
                left, top = rng.integers(0, side - window, 2, endpoint=True)
                part = scene.label_map[top : top + window, left : left + window]
                things = tuple(o.name for o in scene.objects if _inside(o.box, left, top, window) > 0.8)
                found = subject in things
            if found:
                frame = (left, top, left + window, top + window)
                photo = scene.image.resize((size, size), Image.Resampling.BILINEAR, box=frame)
                return photo, things, tuple(name for name in STUFF if (part == LABELS[name]).mean() > 1 / 6)


def _inside(box: tuple[int, int, int, int], left: int, top: int, side: int) -> float:
    """Share of the box that lies inside the square window, 0..1."""
    width = max(0, min(box[2], left + side) - max(box[0], left))
    height = max(0, min(box[3], top + side) - max(box[1], top))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))
