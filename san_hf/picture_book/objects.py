"""Objects of the picture book: their class names, and how each one is drawn.

An object is a *composition* of one attribute (a colour or a pattern) and one kind of thing: "red car", "striped house".
Two in eleven of the compositions are *novel*: captions may name them, but a segmentation model never gets a mask of
one. So mIoU on novel against base compositions measures how far a model understands the class names, not how well it
remembers the masks. Every attribute and every kind of thing occurs in base compositions.

Pillow does all the drawing; coordinates are (x, y) in pixels, origin top left.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps


Colour = tuple[int, int, int]  # red, green, blue, each 0..255
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
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

# Where each kind of thing is drawn: above the horizon, or in a band of land or water.
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
LABELS = {name: index for index, name in enumerate(CLASS_NAMES)}

_OUTLINE = (52, 44, 48)


def scale_colour(colour: Sequence[int], factor: float) -> Colour:
    """A colour with all channels multiplied, at most 255."""
    red, green, blue = (min(255, int(channel * factor)) for channel in colour)
    return red, green, blue


def _texture(rng: np.random.Generator, attribute: str, size: int) -> Image.Image:
    """The texture of an object: a `size` x `size` RGB image of one colour, of stripes or of a rainbow."""
    if attribute in COLOURS:
        jitter = rng.integers(-14, 15, 3)
        return Image.new("RGB", (size, size), tuple(int(c) for c in np.clip(COLOURS[attribute] + jitter, 0, 255)))
    if attribute == "rainbow":
        hue = Image.linear_gradient("L").resize((size, size)).point(lambda level: level * 0.8)  # red to violet
        if rng.random() < 0.5:
            hue = hue.rotate(90)
        saturation, value = (Image.new("L", (size, size), int(rng.integers(200, 246))) for _ in range(2))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    # Stripes have any two colours, one dark and one light: the colours alone do not tell what is striped.
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


class Cutout:
    """
    An object, drawn part by part on a square, and its mask.

    Points are (x, y), each 0..1, as a share of the side.

    Args:
        texture: RGB, as wide as high; what the object's body is made of.
    """

    def __init__(self, texture: Image.Image):
        self.texture = texture
        self.size = texture.width
        self.image = Image.new("RGB", texture.size)
        self.mask = Image.new("L", texture.size)
        self._line = max(1, round(self.size / 40))

    def body(self, method: str, *points: Point, shade: float = 1.0) -> None:
        """A part with the object's texture, darker by `shade`; `method` is one of Pillow's `ImageDraw`."""
        self._paint(method, points, self.texture.point(lambda level: level * shade))

    def detail(self, method: str, fill: Colour, *points: Point) -> None:
        """A part with a colour of its own, whatever the object's colour."""
        self._paint(method, points, fill)

    def _paint(self, method: str, points: Sequence[Point], fill: Image.Image | Colour) -> None:
        points = [(x * (self.size - 1), y * (self.size - 1)) for x, y in points]
        part = Image.new("L", self.image.size)
        getattr(ImageDraw.Draw(part), method)(points, fill=255)
        self.image.paste(fill, (0, 0, *self.image.size), part)
        getattr(ImageDraw.Draw(self.image), method)(points, outline=_OUTLINE, width=self._line)
        self.mask.paste(255, (0, 0, *self.image.size), part)


def _house(c: Cutout) -> None:
    c.body("rectangle", (0.08, 0.38), (0.92, 1.0))
    c.body("polygon", (0.0, 0.42), (0.5, 0.04), (1.0, 0.42), shade=0.7)
    c.detail("rectangle", (98, 66, 48), (0.42, 0.68), (0.6, 1.0))
    c.detail("rectangle", (196, 226, 238), (0.17, 0.52), (0.32, 0.68))


def _car(c: Cutout) -> None:
    c.body("polygon", (0.18, 0.5), (0.3, 0.22), (0.68, 0.22), (0.84, 0.5))
    c.detail("polygon", (196, 226, 238), (0.29, 0.48), (0.37, 0.3), (0.62, 0.3), (0.71, 0.48))
    c.body("rectangle", (0.0, 0.48), (1.0, 0.82))
    for x in (0.13, 0.65):
        c.detail("ellipse", (60, 58, 62), (x, 0.7), (x + 0.22, 0.92))


def _tree(c: Cutout) -> None:
    c.detail("rectangle", (122, 84, 54), (0.42, 0.6), (0.58, 1.0))
    c.body("polygon", (0.5, 0.0), (0.8, 0.3), (0.7, 0.32), (0.96, 0.7), (0.04, 0.7), (0.3, 0.32), (0.2, 0.3))
    for x, y in ((0.44, 0.2), (0.24, 0.54), (0.5, 0.44), (0.68, 0.56)):
        c.detail("ellipse", (206, 60, 92), (x, y), (x + 0.1, y + 0.1))


def _ball(c: Cutout) -> None:
    c.body("ellipse", (0.1, 0.2), (0.9, 1.0))
    tips = [(k * math.pi / 5, radius) for k, radius in enumerate([0.22, 0.1] * 5)]
    star = [(0.5 + radius * math.sin(angle), 0.6 - radius * math.cos(angle)) for angle, radius in tips]
    c.detail("polygon", (240, 196, 84), *star)


def _boat(c: Cutout) -> None:
    c.detail("rectangle", (90, 70, 58), (0.47, 0.0), (0.52, 0.74))
    c.body("polygon", (0.54, 0.03), (0.95, 0.64), (0.54, 0.64))
    c.body("polygon", (0.45, 0.12), (0.08, 0.64), (0.45, 0.64))
    c.body("polygon", (0.0, 0.72), (1.0, 0.72), (0.82, 0.96), (0.18, 0.96), shade=0.7)


def _fish(c: Cutout) -> None:
    c.body("polygon", (0.28, 0.3), (0.46, 0.06), (0.62, 0.34), shade=0.7)
    c.body("polygon", (0.32, 0.72), (0.5, 0.94), (0.58, 0.7), shade=0.7)
    c.body("polygon", (0.68, 0.5), (1.0, 0.26), (0.94, 0.5), (1.0, 0.76))
    c.body("ellipse", (0.0, 0.24), (0.8, 0.78))
    c.detail("ellipse", (250, 250, 250), (0.1, 0.34), (0.28, 0.52))
    c.detail("ellipse", (20, 20, 20), (0.15, 0.39), (0.23, 0.47))


def _bird(c: Cutout) -> None:
    for x in (0.42, 0.56):
        c.detail("rectangle", (240, 150, 40), (x, 0.76), (x + 0.05, 1.0))
    c.detail("polygon", (240, 150, 40), (0.0, 0.4), (0.18, 0.24), (0.18, 0.46))
    c.body("polygon", (0.66, 0.5), (1.0, 0.36), (0.96, 0.66))
    c.body("ellipse", (0.2, 0.36), (0.82, 0.8))
    c.body("ellipse", (0.28, 0.58), (0.62, 0.78), shade=0.7)
    c.body("ellipse", (0.1, 0.16), (0.44, 0.5))
    c.body("polygon", (0.4, 0.54), (0.78, 0.02), (0.7, 0.56))
    c.detail("ellipse", (20, 20, 20), (0.19, 0.26), (0.27, 0.34))


_DRAW: dict[str, Callable[[Cutout], None]] = {
    "house": _house,
    "car": _car,
    "tree": _tree,
    "ball": _ball,
    "boat": _boat,
    "fish": _fish,
    "bird": _bird,
}


def draw_object(rng: np.random.Generator, name: str, size: int) -> tuple[Image.Image, Image.Image]:
    """
    Draws one object.

    Args:
        rng: decides on texture, mirroring and rotation.
        name: one of `COMPOSITIONS`.
        size: side of the square it fills, in pixels.

    Returns:
        The RGB image and the mask, mode "L": 255 is the object, 0 the background.
    """
    attribute, thing = name.split(" ")
    cutout = Cutout(_texture(rng, attribute, size))
    _DRAW[thing](cutout)
    image, mask = cutout.image, cutout.mask
    if rng.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    if HABITATS[thing] == "sky" or thing == "fish":
        angle = rng.uniform(-20, 20)
        image, mask = image.rotate(angle, Image.Resampling.BILINEAR), mask.rotate(angle)
    return image, mask
