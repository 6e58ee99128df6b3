"""What the browser shows of a segmentation: the picture under it, its legend, one pixel of it, and the files of it."""

from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from san_hf.app.state import Session
from san_hf.inference.segmentation import Segmentation
from san_hf.messages import join_some, printable
from san_hf.visualization import colorize


VIEWS = ("overlay", "mask", "confidence")
DOWNLOADS = ("overlay", "png-labels", "coco", "geojson")
# Longer side of what is sent to the browser.
LONGEST_SIDE = 1280


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
    rows = ((np.arange(height) + 0.5) * segmentation.height / height).astype(int)
    columns = ((np.arange(width) + 0.5) * segmentation.width / width).astype(int)
    if view == "confidence":
        confidence = segmentation.confidence
        assert confidence is not None  # sessions ask for it
        return Image.fromarray((confidence[np.ix_(rows, columns)] * 255).round().astype(np.uint8))
    mask = colorize(segmentation.label_map[np.ix_(rows, columns)], segmentation.colors)
    if view == "mask":
        return mask
    return Image.blend(segmentation.image.resize((width, height), reducing_gap=2.0), mask, opacity)


def view_size(segmentation: Segmentation) -> tuple[int, int]:
    """(width, height) of what [`draw_view`] draws."""
    scale = min(1.0, LONGEST_SIDE / max(segmentation.width, segmentation.height))
    return max(1, round(segmentation.width * scale)), max(1, round(segmentation.height * scale))


def describe_pixel(segmentation: Segmentation, x: float, y: float) -> str:
    """Class and score of a pixel in Markdown-free text; (x, y) are those of what [`draw_view`] draws."""
    width, height = view_size(segmentation)
    column = min(max(int((x + 0.5) * segmentation.width / width), 0), segmentation.width - 1)
    row = min(max(int((y + 0.5) * segmentation.height / height), 0), segmentation.height - 1)
    name = segmentation.class_names[int(segmentation.label_map[row, column])]
    assert segmentation.confidence is not None  # sessions ask for it
    return f"{printable(name)}, score {segmentation.confidence[row, column]:.2f} (x {column}, y {row})"


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
