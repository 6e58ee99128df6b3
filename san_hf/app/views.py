"""What the browser shows of a segmentation: the picture under it, its legend, one pixel of it, and the files of it."""

import zlib
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from san_hf.app.state import Session
from san_hf.inference.segmentation import Segmentation
from san_hf.messages import join_some, printable
from san_hf.visualization import colorize


VIEWS = ("overlay", "mask", "confidence")
DOWNLOADS = ("overlay", "png-labels", "coco", "geojson")
# Longer side of the picture that is sent to the browser, and of the pixels that it can tell about by itself.
LONGEST_SIDE, LONGEST_SIDE_TOLD = 1280, 640
# Classes that a pixel's description names besides its own.
MORE_CLASSES = 2


def draw_view(segmentation: Segmentation, view: str = "overlay", opacity: float = 0.5) -> Image.Image:
    """
    What to look at: the image under its label map, the label map in colours, or the confidence in grey, white for 1;
    scaled down to `LONGEST_SIDE`.

    Args:
        view: one of `VIEWS`.
        opacity: of the overlay's label map, 0..1.

    Raises:
        ValueError: no such view, or an opacity out of range.
    """
    if view not in VIEWS or not 0 <= opacity <= 1:
        raise ValueError(
            f"Got the view {view!r:.40} with opacity {opacity!r:.20}, expected {', '.join(VIEWS)}, 0 to 1."
        )
    width, height = view_size(segmentation)
    labels, confidence = _scaled_down(segmentation, width, height)
    if view == "confidence":
        return Image.fromarray((confidence * 255).round().astype(np.uint8))
    mask = colorize(labels, segmentation.colors)
    if view == "mask":
        return mask
    return Image.blend(segmentation.image.resize((width, height), reducing_gap=2.0), mask, opacity)


def view_size(segmentation: Segmentation, longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """(width, height) of what [`draw_view`] draws; or of what has another longer side at most."""
    scale = min(1.0, longest / max(segmentation.width, segmentation.height))
    return max(1, round(segmentation.width * scale)), max(1, round(segmentation.height * scale))


def describe_pixel(segmentation: Segmentation, x: float, y: float) -> str:
    """
    Class and score of a pixel and the next likely classes, as text; (x, y) are those of what [`draw_view`] draws.
    """
    width, height = view_size(segmentation)
    column = min(max(int((x + 0.5) * segmentation.width / width), 0), segmentation.width - 1)
    row = min(max(int((y + 0.5) * segmentation.height / height), 0), segmentation.height - 1)
    name = segmentation.class_names[int(segmentation.label_map[row, column])]
    assert segmentation.confidence is not None  # sessions ask for it
    text = f"{printable(name)}, score {segmentation.confidence[row, column]:.2f} (x {column}, y {row})"
    others = [entry for entry in segmentation.scores_at(column, row).items() if entry[0] != name]
    likely = [f"{printable(other)} {score:.2f}" for other, score in others[:MORE_CLASSES] if score >= 0.005]
    return f"{text}; next: {', '.join(likely)}" if likely else text


def describe_all_pixels(segmentation: Segmentation) -> dict[str, Any]:
    """
    Class and score of every pixel, scaled down to `LONGEST_SIDE_TOLD`, for hover.js: a few 10 kB.

    Returns:
        "width" and "height"; "names", those of the classes that are present; and "pixels", deflated, as base64: one
        byte each for all pixels, row by row, first the number of the name modulo 256, then that number divided by 256,
        then the score in hundredths.
    """
    width, height = view_size(segmentation, LONGEST_SIDE_TOLD)
    labels, confidence = _scaled_down(segmentation, width, height)
    present, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(labels.shape)
    planes = np.stack([numbers % 256, numbers // 256, (confidence * 100).round()]).astype(np.uint8)
    return {
        "width": width,
        "height": height,
        "names": [printable(segmentation.class_names[label]) for label in present],
        "pixels": b64encode(zlib.compress(planes.tobytes())).decode("ascii"),
    }


def _scaled_down(segmentation: Segmentation, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and confidences of the pixels that are the nearest ones to those of a smaller picture."""
    rows = ((np.arange(height) + 0.5) * segmentation.height / height).astype(int)
    columns = ((np.arange(width) + 0.5) * segmentation.width / width).astype(int)
    assert segmentation.confidence is not None  # sessions ask for it
    return segmentation.label_map[np.ix_(rows, columns)], segmentation.confidence[np.ix_(rows, columns)]


def legend_html(segmentation: Segmentation) -> str:
    """The classes that are present by their share, with their colours, and the names of the others."""
    legend = sorted(segmentation.legend(), key=lambda entry: -entry["pixels"])
    rows = "".join(
        f'<tr><td style="background:{entry["color"]};width:1.5em"></td><td>{escape(printable(entry["name"]))}</td>'
        f'<td style="text-align:right">{entry["share"]:.1%}</td></tr>'
        for entry in legend
        if entry["pixels"]
    )
    absent = [printable(entry["name"]) for entry in legend if not entry["pixels"]]
    note = f"<p>Not found: {escape(join_some(absent, 20))}.</p>" if absent else ""
    return f'<table class="legend">{rows}</table>{note}'


def describe_times(session: Session) -> str:
    """How long each step of the last answer took, and how often the picture was encoded."""
    steps = ", ".join(f"{step} {session.seconds[step]:.2f} s" for step in ("picture", "words", "labels"))
    return f"{steps}; vision passes for this picture: {session.vision_passes}"


def write_downloads(segmentation: Segmentation, folder: Path) -> list[str]:
    """Writes the files that are offered into a folder: overlay, label map, JSON, COCO and GeoJSON."""
    return [str(path) for path in segmentation.save(folder / "segmentation", DOWNLOADS, image="picture")]
