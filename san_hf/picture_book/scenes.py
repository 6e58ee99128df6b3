"""A procedural picture book: drawn scenes with exact label maps and captions, from a seed.

Every object is a *composition* of one attribute (a colour or a pattern) and one kind of thing: "red car", "striped
house". Two in eleven of the compositions are *novel*: they may occur in captions, but a segmentation model never gets a
mask of one, so that mIoU on novel against base compositions measures what an open-vocabulary model understands of
words rather than what it has memorised of masks. Every attribute and every kind of thing occurs in base compositions.

All drawing is Pillow's; coordinates are (x, y) in pixels, origin top left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps


COLOURS = {
    "red": (212, 40, 40),
    "orange": (240, 132, 30),
    "yellow": (245, 214, 50),
    "green": (28, 124, 62),
    "blue": (40, 70, 200),
    "purple": (125, 50, 160),
    "pink": (242, 140, 190),
    "white": (245, 244, 240),
    "black": (38, 36, 42),
}
PATTERNS = ("striped", "rainbow")
ATTRIBUTES = (*COLOURS, *PATTERNS)

PAGE_SIZE = 160  # side of a page in pixels

# What may be drawn where. Sky objects float above the horizon, the others stand or swim in a band of their own.
HABITATS = {
    "house": "land",
    "car": "land",
    "tree": "land",
    "ball": "land",
    "boat": "water",
    "fish": "water",
    "bird": "sky",
}
OBJECTS = tuple(HABITATS)
STUFF = ("sky", "mountain", "grass", "sand", "water")

COMPOSITIONS = tuple(f"{attribute} {thing}" for thing in OBJECTS for attribute in ATTRIBUTES)
# Diagonals of the attribute x object table: two novel pairs for each object, one or two for each attribute.
NOVEL = tuple(
    f"{attribute} {thing}"
    for o, thing in enumerate(OBJECTS)
    for a, attribute in enumerate(ATTRIBUTES)
    if (a + 3 * o) % len(ATTRIBUTES) < 2
)
BASE = tuple(name for name in COMPOSITIONS if name not in NOVEL)
CLASS_NAMES = (*COMPOSITIONS, *STUFF)  # index = value in a label map
_LABELS = {name: index for index, name in enumerate(CLASS_NAMES)}

_SUPERSAMPLING = 2
_GROUND = {"grass": (112, 172, 74), "sand": (226, 202, 148), "water": (72, 152, 190)}
_SKIES = (
    ((120, 182, 232), (206, 230, 246)),
    ((150, 196, 224), (240, 226, 206)),
    ((160, 170, 214), (240, 206, 210)),
    ((176, 190, 202), (218, 224, 228)),
)
_INK = (52, 44, 48)


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
    """One page of the book.

    Attributes:
        image: RGB picture.
        label_map: (H, W) uint8, indices into `CLASS_NAMES`; every pixel has one.
        objects: The drawn objects, those farther away first.
        caption: What is seen, in plain words: "a red car and a striped house on the grass".
    """

    image: Image.Image
    label_map: np.ndarray
    objects: tuple[SceneObject, ...]
    caption: str


def _shade(colour: Sequence[int], factor: float) -> tuple[int, int, int]:
    return tuple(min(255, int(channel * factor)) for channel in colour)


def _mix(a: Sequence[int], b: Sequence[int], share: float) -> tuple[int, int, int]:
    return tuple(int(x + (y - x) * share) for x, y in zip(a, b))


def _cloth(rng: np.random.Generator, attribute: str, size: int) -> Image.Image:
    """The material of an object: a `size` x `size` RGB tile, plain in a colour or with a pattern of two colours."""
    if attribute in COLOURS:
        jitter = rng.integers(-14, 15, 3)
        return Image.new("RGB", (size, size), tuple(int(c) for c in np.clip(COLOURS[attribute] + jitter, 0, 255)))
    if attribute == "rainbow":
        hue = Image.linear_gradient("L").resize((size, size)).point(lambda level: level * 0.8)  # red to violet
        if rng.random() < 0.5:
            hue = hue.rotate(90)
        saturation, value = (Image.new("L", (size, size), int(rng.integers(200, 246))) for _ in range(2))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    # Stripes come in any two colours of clearly different lightness: they are not recognised by their colour.
    dark = [(190, 40, 40), (40, 60, 170), (110, 40, 140), (30, 110, 60), (60, 50, 50)][rng.integers(5)]
    light = [(250, 246, 238), (248, 216, 80), (250, 190, 200), (176, 224, 240), (250, 170, 90)][rng.integers(5)]
    base, ink = (dark, light) if rng.random() < 0.5 else (light, dark)
    tile = Image.new("RGB", (size, size), base)
    draw = ImageDraw.Draw(tile)
    step = size / rng.uniform(3.2, 4.8)
    start = rng.uniform(-step, 0)
    vertical = rng.random() < 0.5
    for i in range(math.ceil(size / step) + 1):
        near, far = start + i * step, start + (i + 0.5) * step
        draw.rectangle((near, 0, far, size) if vertical else (0, near, size, far), fill=ink)
    return tile


class _Cutout:
    """An object being drawn on a square: `body` parts take the cloth or a shade of it, `detail` parts a colour of their
    own."""

    def __init__(self, cloth: Image.Image):
        self.cloth = cloth
        self.size = cloth.width
        self.image = Image.new("RGB", cloth.size)
        self.mask = Image.new("L", cloth.size)
        self._line = max(1, round(self.size / 40))

    def _points(self, points):
        return [(x * (self.size - 1), y * (self.size - 1)) for x, y in points]

    def _paint(self, method: str, points, fill) -> None:
        points = self._points(points)
        part = Image.new("L", self.image.size)
        getattr(ImageDraw.Draw(part), method)(points, fill=255)
        self.image.paste(fill, (0, 0, *self.image.size), part)
        getattr(ImageDraw.Draw(self.image), method)(points, outline=_INK, width=self._line)
        self.mask.paste(255, (0, 0, *self.image.size), part)

    def body(self, method: str, *points, shade: float = 1.0) -> None:
        self._paint(method, points, self.cloth.point(lambda level: level * shade))

    def detail(self, method: str, fill, *points) -> None:
        self._paint(method, points, fill)


def _house(c: _Cutout) -> None:
    c.body("rectangle", (0.08, 0.38), (0.92, 1.0))
    c.body("polygon", (0.0, 0.42), (0.5, 0.04), (1.0, 0.42), shade=0.7)
    c.detail("rectangle", (98, 66, 48), (0.42, 0.68), (0.6, 1.0))
    c.detail("rectangle", (196, 226, 238), (0.17, 0.52), (0.32, 0.68))


def _car(c: _Cutout) -> None:
    c.body("polygon", (0.18, 0.5), (0.3, 0.22), (0.68, 0.22), (0.84, 0.5))
    c.detail("polygon", (196, 226, 238), (0.29, 0.48), (0.37, 0.3), (0.62, 0.3), (0.71, 0.48))
    c.body("rectangle", (0.0, 0.48), (1.0, 0.82))
    for x in (0.13, 0.65):
        c.detail("ellipse", (60, 58, 62), (x, 0.7), (x + 0.22, 0.92))


def _tree(c: _Cutout) -> None:
    c.detail("rectangle", (122, 84, 54), (0.42, 0.6), (0.58, 1.0))
    c.body("polygon", (0.5, 0.0), (0.8, 0.3), (0.7, 0.32), (0.96, 0.7), (0.04, 0.7), (0.3, 0.32), (0.2, 0.3))
    for x, y in ((0.44, 0.2), (0.24, 0.54), (0.5, 0.44), (0.68, 0.56)):
        c.detail("ellipse", (206, 60, 92), (x, y), (x + 0.1, y + 0.1))


def _ball(c: _Cutout) -> None:
    c.body("ellipse", (0.1, 0.2), (0.9, 1.0))
    tips = [(k * math.pi / 5, radius) for k, radius in enumerate([0.22, 0.1] * 5)]
    star = [(0.5 + radius * math.sin(angle), 0.6 - radius * math.cos(angle)) for angle, radius in tips]
    c.detail("polygon", (240, 196, 84), *star)


def _boat(c: _Cutout) -> None:
    c.detail("rectangle", (90, 70, 58), (0.47, 0.0), (0.52, 0.74))
    c.body("polygon", (0.54, 0.03), (0.95, 0.64), (0.54, 0.64))
    c.body("polygon", (0.45, 0.12), (0.08, 0.64), (0.45, 0.64))
    c.body("polygon", (0.0, 0.72), (1.0, 0.72), (0.82, 0.96), (0.18, 0.96), shade=0.7)


def _fish(c: _Cutout) -> None:
    c.body("polygon", (0.28, 0.3), (0.46, 0.06), (0.62, 0.34), shade=0.7)
    c.body("polygon", (0.32, 0.72), (0.5, 0.94), (0.58, 0.7), shade=0.7)
    c.body("polygon", (0.68, 0.5), (1.0, 0.26), (0.94, 0.5), (1.0, 0.76))
    c.body("ellipse", (0.0, 0.24), (0.8, 0.78))
    c.detail("ellipse", (250, 250, 250), (0.1, 0.34), (0.28, 0.52))
    c.detail("ellipse", (20, 20, 20), (0.15, 0.39), (0.23, 0.47))


def _bird(c: _Cutout) -> None:
    for x in (0.42, 0.56):
        c.detail("rectangle", (240, 150, 40), (x, 0.76), (x + 0.05, 1.0))
    c.detail("polygon", (240, 150, 40), (0.0, 0.4), (0.18, 0.24), (0.18, 0.46))
    c.body("polygon", (0.66, 0.5), (1.0, 0.36), (0.96, 0.66))
    c.body("ellipse", (0.2, 0.36), (0.82, 0.8))
    c.body("ellipse", (0.28, 0.58), (0.62, 0.78), shade=0.7)
    c.body("ellipse", (0.1, 0.16), (0.44, 0.5))
    c.body("polygon", (0.4, 0.54), (0.78, 0.02), (0.7, 0.56))
    c.detail("ellipse", (20, 20, 20), (0.19, 0.26), (0.27, 0.34))


_DRAW: dict[str, Callable[[_Cutout], None]] = {
    "house": _house,
    "car": _car,
    "tree": _tree,
    "ball": _ball,
    "boat": _boat,
    "fish": _fish,
    "bird": _bird,
}


def _cut_out(rng: np.random.Generator, name: str, size: int) -> tuple[Image.Image, Image.Image]:
    """Draws `name` on a `size` x `size` square: RGB picture and its "L" mask."""
    attribute, thing = name.split(" ")
    cutout = _Cutout(_cloth(rng, attribute, size))
    _DRAW[thing](cutout)
    image, mask = cutout.image, cutout.mask
    if rng.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    if HABITATS[thing] == "sky" or thing == "fish":
        angle = rng.uniform(-20, 20)
        image, mask = image.rotate(angle, Image.Resampling.BILINEAR), mask.rotate(angle)
    return image, mask


def _background(rng, width: int, height: int, habitats: set[str]):
    """Sky, perhaps mountains, and one or two bands of ground that offer every habitat asked for.

    Returns the picture, its label image and {habitat: (top, bottom)}, the rows where an object may touch the ground
    (for "sky": where its middle may be).
    """
    top_colour, low_colour = _SKIES[rng.integers(len(_SKIES))]
    horizon = height * rng.uniform(0.32, 0.52)
    ramp = Image.linear_gradient("L").resize((width, height))
    low, top = (Image.new("RGB", (width, height), colour) for colour in (low_colour, top_colour))
    image = Image.composite(low, top, ramp)
    labels = Image.new("L", (width, height), _LABELS["sky"])
    draw, draw_labels = ImageDraw.Draw(image), ImageDraw.Draw(labels)

    for _ in range(rng.integers(0, 3)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, horizon), height * rng.uniform(0.04, 0.08)
        for shift in (-1.2, 0.0, 1.2):
            middle = x + shift * r
            draw.ellipse((middle - r, y - r * 0.7, middle + r, y + r * 0.7), fill=_shade(low_colour, 1.06))
    if rng.random() < 0.45:
        colour = _shade([(128, 124, 150), (110, 128, 140), (150, 134, 130)][rng.integers(3)], rng.uniform(0.85, 1.1))
        step = width / rng.uniform(2.0, 4.0)
        x = -step * rng.random()
        outline = [(0, horizon + 1), (x, horizon - height * 0.06)]
        while x < width:
            outline.append((x + step / 2, horizon - height * rng.uniform(0.14, 0.26)))
            outline.append((x + step, horizon - height * rng.uniform(0.04, 0.08)))
            x += step
        outline.append((width, horizon + 1))
        draw.polygon(outline, fill=colour)
        draw_labels.polygon(outline, fill=_LABELS["mountain"])

    land = ["grass", "sand"][rng.integers(2)]
    if {"land", "water"} <= habitats or rng.random() < 0.3:
        kinds = [land, "water"] if rng.random() < 0.5 else ["water", land]
        edges = [horizon, horizon + (height - horizon) * rng.uniform(0.4, 0.6), height]
    else:
        kinds = ["water" if "water" in habitats or (not habitats and rng.random() < 0.4) else land]
        edges = [horizon, height]
    rows = {"sky": (height * 0.1, horizon)}
    for kind, top, bottom in zip(kinds, edges, edges[1:]):
        colour = _shade(_GROUND[kind], rng.uniform(0.85, 1.12))
        # A gentle wave instead of a ruler's edge, but for the sea against the sky.
        swell = 0 if kind == "water" else height * rng.uniform(0, 0.03)
        phase, waves = rng.uniform(0, 6.3), rng.uniform(1, 3)
        xs = np.linspace(0, width, 24)
        outline = [(x, top + swell * math.sin(phase + 6.3 * waves * x / width)) for x in xs]
        outline += [(width, height), (0, height)]
        draw.polygon(outline, fill=colour)
        draw_labels.polygon(outline, fill=_LABELS[kind])
        light, dark, unit = _shade(colour, 1.16), _shade(colour, 0.84), height / 90
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
    """Time of day: brightness, a tint, a ramp across the page, and a little grain."""
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    gain = rng.uniform(0.78, 1.08) * rng.uniform(0.94, 1.06, 3)
    ramp = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, width)[None, :, None]
    grain = rng.normal(0, rng.uniform(1, 5), (height, width, 1))
    return Image.fromarray(np.clip(pixels * (gain * ramp) + grain, 0, 255).astype(np.uint8))


def _listing(names: Sequence[str]) -> str:
    names = [f"a {name}" for name in names]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def draw_scene(
    seed: int | Sequence[int] | np.random.Generator,
    size: tuple[int, int] = (PAGE_SIZE, PAGE_SIZE),
    names: Sequence[str] | None = None,
    choose_from: Sequence[str] = COMPOSITIONS,
    scale: tuple[float, float] = (0.48, 0.68),
) -> Scene:
    """Draws one scene; the same seed gives the same scene, byte for byte, on the same Pillow and NumPy.

    Args:
        seed: Seed, seeds, or generator.
        size: (width, height) in pixels, each at least 32. Shapes follow the size, so a large page shows the same
            kind of scene in more detail.
        names: Compositions to draw, at most five; empty for a landscape. Default: two of `choose_from`.
        choose_from: Compositions to choose among where `names` is not given; `BASE` for training with masks.
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
        placed.sort(key=lambda item: (not item[-1], item[0]))  # what is farther up the page is farther away
        owner = Image.new("L", (width, height))
        drawn = []
        for index, (_, left, top, side, name, _) in enumerate(placed, start=1):
            picture, mask = _cut_out(rng, name, side)
            image.paste(picture, (left, top), mask)
            labels.paste(_LABELS[name], (left, top, left + side, top + side), mask)
            owner.paste(index, (left, top, left + side, top + side), mask)
            drawn.append((name, mask.histogram()[255]))
        counts = owner.histogram()
        visible = [counts[index] / pixels for index, (_, pixels) in enumerate(drawn, start=1)]
        if min(visible, default=1.0) >= 0.55:
            break

    image = _light(rng, image.reduce(_SUPERSAMPLING))
    labels = labels.resize(size, Image.Resampling.NEAREST)
    owner = np.asarray(owner.resize(size, Image.Resampling.NEAREST))
    objects = []
    for index, ((name, _), share) in enumerate(zip(drawn, visible), start=1):
        ys, xs = np.nonzero(owner == index)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append(SceneObject(name, box, share))
    label_map = np.asarray(labels)
    seen = [name for name in STUFF if (label_map == _LABELS[name]).mean() > 0.05]
    stuff = " and ".join(seen)
    caption = f"{_listing([o.name for o in objects])} with {stuff}" if objects else stuff
    return Scene(image, label_map, tuple(objects), caption)


def draw_photo(
    seed: int | Sequence[int] | np.random.Generator, subject: str, size: int = 64, others: int = 0
) -> tuple[Image.Image, tuple[str, ...], tuple[str, ...]]:
    """Draws a square picture of one subject, framed as a person with a camera would, with other things around it.

    Args:
        seed: Seed, seeds, or generator.
        subject: One of `CLASS_NAMES`; a stuff fills most of the picture.
        size: Side of the picture in pixels.
        others: How many other objects stand in the scene, up to four.

    Returns:
        The picture, the names of the objects well in view, and those of the stuff that fills a sixth of it or more;
        the subject is among them.
    """
    rng = np.random.default_rng(seed)
    side = size * 3 // 2
    while True:
        around = [COMPOSITIONS[i] for i in rng.choice(len(COMPOSITIONS), others, replace=False)]
        names = [] if subject in STUFF else list(dict.fromkeys([subject, *around]))
        scene = draw_scene(rng, (side, side), names, scale=(0.32, 0.5))
        for _ in range(8):
            if subject in STUFF:
                window = int(side * rng.uniform(0.25, 0.6))
                left, top = rng.integers(0, side - window, 2, endpoint=True)
                part = scene.label_map[top : top + window, left : left + window]
                things = ()
                found = (part == _LABELS[subject]).mean() > 0.6
            else:
                window = int(side * rng.uniform(0.5, 0.95))
                left, top = rng.integers(0, side - window, 2, endpoint=True)
                part = scene.label_map[top : top + window, left : left + window]
                things = tuple(o.name for o in scene.objects if _inside(o.box, left, top, window) > 0.8)
                found = subject in things
            if found:
                frame = (left, top, left + window, top + window)
                picture = scene.image.resize((size, size), Image.Resampling.BILINEAR, box=frame)
                return picture, things, tuple(name for name in STUFF if (part == _LABELS[name]).mean() > 1 / 6)


def _inside(box: tuple[int, int, int, int], left: int, top: int, side: int) -> float:
    """Share of the box that lies inside the square window, 0..1."""
    width = max(0, min(box[2], left + side) - max(box[0], left))
    height = max(0, min(box[3], top + side) - max(box[1], top))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


TEST_SEED = 20230612  # never used for training; draw_scene(seed=[TEST_SEED, i]) is page i of the test set
VALIDATION_SEED = 20231109  # likewise, of pages to choose among models by, so that the test set stays unseen


def measure(segment: Callable[[Image.Image], np.ndarray], pages: int = 150, seed: int = TEST_SEED) -> dict[str, float]:
    """Measures a segmenter on the first pages of the test set, base and novel compositions mixed.

    All of `CLASS_NAMES` compete at every pixel. The mean runs over the classes that occur on those pages.

    Args:
        segment: Takes an RGB image and returns its label map, (H, W) indices into `CLASS_NAMES`.
        pages: How many pages to draw and segment.
        seed: `VALIDATION_SEED` for other pages.

    Returns:
        `base_miou`, `novel_miou`, `stuff_miou` and `pixel_accuracy`, each 0..100.
    """
    size = len(CLASS_NAMES)
    confusion = np.zeros((size, size), np.int64)  # rows: truth, columns: prediction
    for page in range(pages):
        scene = draw_scene([seed, page])
        pairs = scene.label_map.astype(np.int64) * size + np.asarray(segment(scene.image))
        confusion += np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size)
    hits, truth = confusion.diagonal(), confusion.sum(1)
    iou = hits / np.maximum(truth + confusion.sum(0) - hits, 1)

    def mean(names: Sequence[str]) -> float:
        return 100 * float(np.mean([iou[_LABELS[name]] for name in names if truth[_LABELS[name]]]))

    return {
        "base_miou": mean(BASE),
        "novel_miou": mean(NOVEL),
        "stuff_miou": mean(STUFF),
        "pixel_accuracy": 100 * float(hits.sum() / truth.sum()),
    }
