"""Options of `san-hf segment` alone."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from san_hf.rasters import RasterOptions


class Runtime(str, Enum):
    """What runs exported folders."""

    onnx = "onnx"
    openvino = "openvino"


ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        show_default=False,
        help="Image files, folders (with all below them) or patterns; - for one image from standard input; with "
        "--allow-urls also https:// addresses.",
    ),
]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        show_default=False,
        help='What to look for, separated by commas: "cat, grass, sky". A name with a comma goes in double '
        "quotes. Or a benchmark's name, such as voc, for its class names, or a file that --save-vocabulary wrote. "
        "Every pixel gets one of these names, so name the background, too, or use --expand. "
        "Not needed if the model carries names of its own.",
    ),
]
ClassesFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="What to look for, from a file: text with one name a line; JSON, a list or mapping; or "
        "a vocabulary's, .safetensors.",
    ),
]
OtherOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help='What to call pixels that --expand or --threshold take from your classes, if not "other".',
    ),
]
AllowUrlsOption = Annotated[
    bool,
    typer.Option(
        "--allow-urls",
        help="Fetch images that are named by http:// or https:// addresses, of at most 256 MB each, from any host.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        show_default=False,
        help="Only the I-th of N parts of the images, for several machines with the same arguments: 1/4 to 4/4.",
    ),
]
TileOption = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        show_default=False,
        help="Segment larger images in windows of SIZE x SIZE pixels, each as large in the model as a whole image "
        "would be: for satellite and microscope images, whose objects are small. TIFF and JPEG 2000 files of any size "
        "are then read and written piece by piece.",
    ),
]
OverlapOption = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        show_default=False,
        help="What windows of --tile have in common, where their scores are blended; an eighth of SIZE by default.",
    ),
]
BandsOption = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        show_default=False,
        help="Which bands of a satellite image are red, green and blue, by their numbers from 1, such as 4,3,2; or "
        "one, as grey. By default what the file says.",
    ),
]
RangeOption = Annotated[
    str | None,
    typer.Option(
        "--range",
        metavar="LOW,HIGH",
        show_default=False,
        help="Which values of a satellite or microscope image are black and white, such as 0,3000; by default all that "
        "an 8-bit or 16-bit image can have.",
    ),
]
RuntimeOption = Annotated[
    Runtime | None,
    typer.Option(
        metavar="RUNTIME",
        show_default=False,
        help="Run a folder that san-hf export wrote, in the open form, which --model then names, by onnx or openvino.",
    ),
]
SaveVocabularyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="Keep the names with all that belongs to them (words, templates, colours, embeddings) in a file, "
        ".safetensors, for --classes of later runs of this model.",
    ),
]


def raster_of_options(bands: str | None, value_range: str | None) -> "RasterOptions | None":
    """
    What --bands and --range say, if anything.

    Raises:
        ValueError: no numbers, or no such bands or range.
    """
    if bands is None and value_range is None:
        return None
    from san_hf.rasters import RasterOptions

    try:
        numbers = None if bands is None else [int(number) for number in bands.split(",")]
    except ValueError:
        raise ValueError(f"Got --bands {bands!r:.40}, expected whole numbers, such as 4,3,2.") from None
    try:
        limits = None if value_range is None else tuple(float(number) for number in value_range.split(","))
    except ValueError:
        raise ValueError(f"Got --range {value_range!r:.40}, expected two numbers, such as 0,3000.") from None
    return RasterOptions(numbers, limits)  # type: ignore[arg-type]  # which checks how many
