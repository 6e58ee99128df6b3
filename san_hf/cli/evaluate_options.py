"""Options of `san-hf evaluate` alone."""

from pathlib import Path
from typing import Annotated

import typer

from san_hf.data.benchmarks import BENCHMARKS


SourcesOption = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        "-d",
        metavar="SET",
        show_default=False,
        help="What to measure on; may be repeated. A folder that san-hf prepare wrote; a folder with images/ and "
        "labels/ and a classes.txt; a dataset on the Hugging Face Hub; a benchmark's name, to be found in "
        "--data-root; or all, for the six benchmarks there.",
    ),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", show_default=False, help=f"The folder that holds {', '.join(BENCHMARKS)}, once prepared."
    ),
]
SplitOption = Annotated[str, typer.Option(metavar="SPLIT", help="Which part of the set.")]
ValidationShareOption = Annotated[
    float | None,
    typer.Option(
        "--validation-split",
        metavar="SHARE",
        show_default=False,
        help="Only the share of --split that a training with data.validation_split=SHARE and the same seed sets aside.",
    ),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Each set's results go to a folder in here.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run; what is finished is not done again.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", show_default=False, help="Only the first N images.")
]
AugmentOption = Annotated[
    bool,
    typer.Option("--tta", help="Test-time augmentation: six sizes, each also mirrored. About 17 times the pixels."),
]
BoundaryOption = Annotated[bool, typer.Option("--boundary", help="Boundary IoU, too.")]
PerClassOption = Annotated[bool, typer.Option("--per-class", help="Print the table of the classes, too.")]
PredictionsOption = Annotated[
    bool, typer.Option("--predictions", help="Write predictions.json, in the format of COCO-Stuff.")
]
PicturesOption = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Draw the N worst images and N random ones, with their errors: pictures.png."
    ),
]
CompareOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        show_default=False,
        help="Evaluate this model as well, and draw it beside, such as the one before fine-tuning.",
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, metavar="N", help="Of the choice of random images, and of --validation-split.")
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        show_default=False,
        help="The class names in the order of the labels, if the set doesn't say: a file (text with one name a line, "
        "or JSON, a list or mapping), or a benchmark's name. Of a vocabulary's file, .safetensors, the "
        "embeddings are used as they are.",
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default=False, help="A column's name; of two folders, the folder's."),
]
IgnoreIndexOption = Annotated[
    int | None,
    typer.Option(metavar="LABEL", show_default=False, help="The label of pixels that have none; usually 255."),
]
LabelShiftOption = Annotated[
    int, typer.Option(metavar="N", help="Added to the labels; -1 where they start at 1 and 0 means none.")
]
PaletteOption = Annotated[
    str | None,
    typer.Option(
        metavar="PALETTE",
        show_default=False,
        help="What the colours of label maps stand for: binary (black and white), voc, cityscapes, or a file of "
        "colours and classes.",
    ),
]
StreamingOption = Annotated[
    bool, typer.Option("--streaming", help="Read a dataset from the Hub while evaluating, without a download.")
]
SkipBrokenOption = Annotated[
    bool,
    typer.Option("--skip-broken", help="Leave out images that can't be read, and name them, rather than stop."),
]
BatchSizeOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Images of the same size at a time: faster on a GPU.")
]
WorkersOption = Annotated[int, typer.Option(min=0, metavar="N", help="Threads that read images ahead.")]
SaveEveryOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="After how many images to note the state, for --resume.")
]
