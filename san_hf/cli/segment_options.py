"""Options of `san-hf segment` alone."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Runtime(str, Enum):
    """What runs exported folders."""

    onnx = "onnx"
    openvino = "openvino"


ClassesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
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
        "would be: for satellite and microscope images, whose objects are small.",
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
RuntimeOption = Annotated[
    Runtime | None,
    typer.Option(
        show_default=False,
        help="Run a folder that san-hf export wrote, in the open form, which --model then names, on this runtime.",
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
