"""Options that several commands share: what they are called, what they take, and what they are for."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Precision(str, Enum):
    """Names of torch's floating-point types."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


MODEL_HELP = (
    "A folder, san-vit-b-16 or san-vit-large-14 (the released models, downloaded once), or a repository on the Hugging "
    "Face Hub. The default is a tiny model that only proves the pipeline."
)
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
ExpandOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        show_default=False,
        help="Let pixels go elsewhere, too: to COCO-Stuff's 171 classes (coco), its 91 stuff classes "
        '(coco-stuff), or classes of your own, as for --classes: "wall, floor". All of these become one '
        '"other"; in an evaluation, they are wrong.',
    ),
]
TemplatesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|TEXT|FILE",
        show_default=False,
        help="The sentences that names are put into: vild, ViLD's 14; imagenet, CLIP's 80 for ImageNet; your own, such "
        'as "a photo of a {}."; or a file of such lines. May be repeated. By default, what the model was trained with.',
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="SCORE",
        show_default=False,
        help='Pixels whose confidence is lower (0 to 1) become "other"; in an evaluation, they are wrong.',
    ),
]
SynonymsOption = Annotated[
    bool,
    typer.Option(
        "--synonyms",
        help='Take the name "television, tv" for two words, of which the better one counts. By default names are '
        "put into the prompts as they are, as in SAN's published results.",
    ),
]
AverageSynonymsOption = Annotated[
    bool, typer.Option("--average-synonyms", help="With --synonyms, the mean of a class's words counts instead.")
]
ColorsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLOUR|FILE",
        show_default=False,
        help="The colour of a class, such as sky=#87ceeb or road=grey; or a file with such lines. May be repeated.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")
]
PrecisionOption = Annotated[
    Precision, typer.Option("--dtype", metavar="DTYPE", help="Precision to compute in: float32, bfloat16 or float16.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has written.")]
OutputFolderOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where to write. It is made if need be.")
]
