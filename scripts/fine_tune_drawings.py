"""The example of the page about fine-tuning, san_hf/training/FINETUNING.md: a small data set, and the page's figure.

    python scripts/fine_tune_drawings.py --data winter --clip winter-clip
    python scripts/fine_tune_drawings.py --data winter --run runs/winter --figure san_hf/training/finetuning.png

The first writes 60 + 30 drawings with their label maps: winter as the picture book has none, with snow instead of grass
and sand, and snowmen, a word that the embedded checkpoint has never read. The second draws what the page's training has
made of them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import CLIPModel

from san_hf import Predictor, from_pretrained
from san_hf.colors import name_colors
from san_hf.data import load_segmentation_dataset
from san_hf.legend import LegendEntry, legend_canvas, text_font
from san_hf.picture_book.objects import COLOURS, LABELS, Cutout
from san_hf.picture_book.scenes import PAGE_SIZE, draw_scene
from san_hf.visualization import colorize


CLASS_NAMES = ("snowman", "house", "tree", "car", "snow", "sky", "mountain", "water")
THINGS = ("house", "tree", "car")
COUNTS = {"train": 60, "validation": 30}
SEED = 2024


def draw_snowman(rng: np.random.Generator, size: int) -> tuple[Image.Image, Image.Image]:
    """The RGB image and the mask, 255 where it is the snowman, each `size` x `size`."""
    grey = int(rng.integers(215, 250))
    cutout = Cutout(Image.new("RGB", (size, size), (grey, grey, min(255, grey + 8))))
    scarf = list(COLOURS.values())[rng.integers(6)]
    for box in (((0.2, 0.56), (0.8, 1.0)), ((0.28, 0.3), (0.72, 0.68)), ((0.34, 0.08), (0.66, 0.4))):
        cutout.body("ellipse", *box)
    cutout.detail("rectangle", (40, 38, 44), (0.28, 0.1), (0.72, 0.14))
    cutout.detail("rectangle", (40, 38, 44), (0.38, 0.0), (0.62, 0.12))
    cutout.detail("polygon", (240, 132, 30), (0.5, 0.22), (0.5, 0.28), (0.72, 0.27))
    cutout.detail("rectangle", scarf, (0.34, 0.36), (0.66, 0.41))
    for y in (0.46, 0.56, 0.7):
        cutout.detail("ellipse", (40, 38, 44), (0.48, y), (0.53, y + 0.05))
    return cutout.image, cutout.mask


def draw_winter(seed: Sequence[int]) -> tuple[Image.Image, np.ndarray]:
    """One drawing: RGB, and its (height, width) uint8 labels, indices into `CLASS_NAMES`."""
    rng = np.random.default_rng(seed)
    attribute, thing = list(COLOURS)[rng.integers(len(COLOURS))], THINGS[rng.integers(len(THINGS))]
    scene = draw_scene(rng, names=[f"{attribute} {thing}"])
    ground = np.isin(scene.label_map, [LABELS["grass"], LABELS["sand"]])
    pixels = np.asarray(scene.image, np.float32)
    pixels = np.where(ground[..., None], 235 + 0.25 * (pixels - pixels[ground].mean(axis=0)), pixels)
    names = dict.fromkeys(("grass", "sand"), "snow") | {f"{attribute} {thing}": thing}
    labels = np.zeros_like(scene.label_map)
    for label in np.unique(scene.label_map):
        name = next(name for name, value in LABELS.items() if value == label)
        labels[scene.label_map == label] = CLASS_NAMES.index(names.get(name, name))
    image, label_image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(labels)
    size = int(PAGE_SIZE * rng.uniform(0.4, 0.6))
    snowman, mask = draw_snowman(rng, size)
    # Beside the thing, its feet on the ground.
    left_edge, _, right_edge, _ = scene.objects[0].box
    left = 2 if left_edge > PAGE_SIZE - right_edge else PAGE_SIZE - size - 2
    place = (left, int(PAGE_SIZE * rng.uniform(0.72, 0.98)) - size)
    image.paste(snowman, place, mask)
    label_image.paste(CLASS_NAMES.index("snowman"), (*place, place[0] + size, place[1] + size), mask)
    return image, np.asarray(label_image)


def write_data(folder: Path) -> None:
    """A pair of folders for each split, and the class list: the form that most tools write."""
    for number, (split, count) in enumerate(COUNTS.items()):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, labels = draw_winter([SEED, number, index])
            image.save(folder / split / "images" / f"{index:03}.png")
            Image.fromarray(labels).save(folder / split / "labels" / f"{index:03}.png")
    (folder / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")


def write_clip(folder: Path) -> None:
    """The embedded checkpoint's CLIP as a model by itself: a side adapter names the CLIP that it belongs to."""
    model, processor = from_pretrained("picture-book")
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    clip = CLIPModel(model.config.clip_config)
    clip.load_state_dict({name: state[name] for name in clip.state_dict()})
    clip.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def read_steps(run: Path) -> dict[str, Predictor]:
    """The models of the figure's columns by their titles; `run` is the output of the page's training."""
    start, processor = from_pretrained("picture-book")
    columns = {"before": Predictor(start, processor)}
    steps = [path for path in sorted((run / "checkpoints").iterdir()) if path.name.startswith("step-")]
    for checkpoint in (steps[0], steps[-1]):
        model, _ = from_pretrained("picture-book")
        trained = load_file(checkpoint / "model.safetensors")
        del trained["class_embeds"]  # of the names; the figure encodes them again
        model.load_state_dict(trained, strict=False)
        columns[f"after {int(checkpoint.name.split('-')[1])} steps"] = Predictor(model.eval(), processor)
    shared, _ = from_pretrained("picture-book")
    shared.load_side_adapter(run / "final", "winter")
    columns["as an adapter"] = Predictor(shared.get_side_adapter("winter"), processor)
    return columns


def draw_steps(data: Path, run: Path, drawings: Sequence[int] = (2, 12, 9)) -> Image.Image:
    """A row for each of some validation drawings: itself, its labels, and what the model makes of it, step by step."""
    colors, side, gap, font_size = name_colors(CLASS_NAMES), 190, 8, 14
    split, rows = load_segmentation_dataset(data, "validation"), []
    columns = read_steps(run)
    for index in drawings:
        image, labels, _ = split[index]
        cells = [image, colorize(np.asarray(labels), colors)]
        for predictor in columns.values():
            (label_map,) = predictor([image], predictor.vocabulary(CLASS_NAMES))
            cells.append(colorize(label_map.cpu().numpy(), colors))
        rows.append([cell.resize((side, side), Image.Resampling.NEAREST) for cell in cells])
    titles = ["drawing", "its labels", *columns]
    size = gap + len(titles) * (side + gap), 3 * gap + font_size + len(rows) * (side + gap)
    entries = [LegendEntry(color, name) for color, name in zip(colors, CLASS_NAMES)]
    canvas = legend_canvas(size, entries, font_size)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap), gap), title, (0, 0, 0), text_font(title, font_size))
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            canvas.paste(cell, (gap + column * (side + gap), 3 * gap + font_size + row * (side + gap)))
    return canvas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the drawings; written unless it exists")
    parser.add_argument("--clip", type=Path, help="folder to write the embedded checkpoint's CLIP to")
    parser.add_argument("--run", type=Path, help="output of the page's training, for --figure")
    parser.add_argument("--figure", type=Path, help="file to draw what the training did, step by step")
    options = parser.parse_args()
    if not options.data.exists():
        write_data(options.data)
    if options.clip:
        write_clip(options.clip)
    if options.figure:
        # As many colours as the model has classes, and some more for the drawings: a file a third as large.
        draw_steps(options.data, options.run).quantize(192).save(options.figure, optimize=True)
