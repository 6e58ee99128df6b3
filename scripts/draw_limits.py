"""The figure and the tables of the page about limits, san_hf/inference/LIMITS.md: where the embedded checkpoint fails.

    python scripts/draw_limits.py --figure san_hf/inference/limits.png   # eight cases: page, question, answer
    python scripts/draw_limits.py --measure                              # two tables; ten minutes of one core

Pages are drawn from the seed of the test set, but with other objects, sizes and numbers than the test set has.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from san_hf import Predictor, from_pretrained
from san_hf.colors import name_colors
from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.legend import LegendEntry, legend_canvas, text_font
from san_hf.picture_book.measure import TEST_SEED
from san_hf.picture_book.objects import CLASS_NAMES, COMPOSITIONS, STUFF
from san_hf.picture_book.scenes import Scene, draw_scene
from san_hf.visualization import OTHER_COLOR, colorize
from san_hf.vocabularies import load_vocabulary


TWO = {"seed": 3, "names": ("red car", "blue house")}
# Title, page, class names, options of the vocabulary.
CASES: list[tuple[str, dict[str, Any], Sequence[str], dict[str, Any]]] = [
    ("asked for: yellow boat", TWO, ["yellow boat"], {}),
    ("yellow boat, with --expand", TWO, ["yellow boat"], {"expand": CLASS_NAMES}),
    ("not a red car, and the five of stuff", TWO, ["not a red car", *STUFF], {}),
    ("automobile, and stuff", TWO, ["automobile", *STUFF], {}),
    ("green car, red house, and stuff", TWO, ["green car", "red house", *STUFF], {}),
    ("red ball, and stuff", {"seed": 1, "names": ("red ball", "red ball")}, ["red ball", *STUFF], {}),
    (
        "all 82 names, small objects",
        {"seed": 4, "names": ("red car", "blue house"), "scale": (0.12, 0.16)},
        CLASS_NAMES,
        {},
    ),
    (
        "all 82 names, five objects",
        {"seed": 2, "names": ("pink tree", "red house", "green car", "yellow boat", "black bird"), "scale": (0.3, 0.4)},
        CLASS_NAMES,
        {},
    ),
]
PAGES = 100


def draw(page: dict[str, Any]) -> Scene:
    return draw_scene([TEST_SEED, page["seed"]], **{key: value for key, value in page.items() if key != "seed"})


def draw_cases(predictor: Predictor) -> Image.Image:
    """Four rows of two cases: the page, and its labels with a legend below."""
    side, gap, font_size, below = 190, 10, 14, 62
    width = 2 * side + 3 * gap
    height = 2 * gap + font_size + side + below
    canvas = Image.new("RGB", (2 * width, len(CASES) // 2 * height), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for number, (title, page, names, options) in enumerate(CASES):
        x, y = number % 2 * width + gap, number // 2 * height + gap
        image, vocabulary = draw(page).image, predictor.vocabulary(names, **options)
        (label_map,) = predictor([image], vocabulary)
        labels = np.asarray(label_map.cpu())
        colors = np.concatenate([name_colors(names), [OTHER_COLOR]])
        shown = [*names, "other"]
        pen.text((x, y), title, (0, 0, 0), text_font(title, font_size))
        y += font_size + gap
        canvas.paste(image.resize((side, side)), (x, y))
        drawn = colorize(labels, colors).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(drawn, (x + side + gap, y))
        entries = [LegendEntry(colors[label], shown[label]) for label in np.unique(labels)]
        legend = legend_canvas((2 * side + gap, 1), entries, font_size)
        canvas.paste(legend.crop((0, 0, 2 * side + gap, min(legend.height, below))), (x, y + side))
    return canvas


def measure(
    predictor: Predictor, names: Sequence[str], objects: int, scale: tuple[float, float]
) -> tuple[float, float]:
    """mIoU and pixel accuracy in percent on `PAGES` pages, of the classes on each; labels beyond them are wrong."""
    vocabulary = predictor.vocabulary(names)
    metrics = ConfusionMatrixMetrics(len(names), 255 if len(names) < 255 else 65535)
    for page in range(PAGES):
        rng = np.random.default_rng([TEST_SEED, page])
        chosen = [COMPOSITIONS[i] for i in rng.choice(len(COMPOSITIONS), objects, False)]
        scene = draw_scene(rng, names=chosen, scale=scale)
        (label_map,) = predictor([scene.image], vocabulary)
        metrics.update(label_map, scene.label_map.astype(np.int64))
    results = metrics.compute().metrics
    return results["mIoU"], results["pACC"]


def print_tables(predictor: Predictor) -> None:
    everything = [*CLASS_NAMES, *(name for name in load_vocabulary("coco-stuff") if name not in CLASS_NAMES)]
    many = [*everything, *(name for name in load_vocabulary("ade20k-847") if name not in everything)]
    print("| objects | side, share of the page | names that compete | mIoU | pixels right |\n|--:|--:|--:|--:|--:|")
    for objects, scale, names in [
        (2, (0.48, 0.68), CLASS_NAMES),
        (2, (0.3, 0.4), CLASS_NAMES),
        (2, (0.2, 0.25), CLASS_NAMES),
        (2, (0.1, 0.15), CLASS_NAMES),
        (1, (0.3, 0.4), CLASS_NAMES),
        (5, (0.3, 0.4), CLASS_NAMES),
        (2, (0.48, 0.68), everything),
        (2, (0.48, 0.68), many),
    ]:
        miou, accuracy = measure(predictor, names, objects, scale)
        print(f"| {objects} | {scale[0]} to {scale[1]} | {len(names)} | {miou:.1f} | {accuracy:.1f} % |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="file to draw the cases to")
    parser.add_argument("--measure", action="store_true", help="print the table of sizes, numbers and names")
    arguments = parser.parse_args()
    loaded = Predictor(*from_pretrained("picture-book"))
    if arguments.figure:
        draw_cases(loaded).quantize(128).save(arguments.figure, optimize=True)
    if arguments.measure:
        print_tables(loaded)
