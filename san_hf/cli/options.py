"""Options that several commands share: what they are called, what they take, and what they are for."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from san_hf.vocabularies import EXPANSIONS


Expansion = Enum("Expansion", {name: name for name in EXPANSIONS}, type=str)  # type: ignore[misc]  # dynamic


class Templates(str, Enum):
    """Names of `san_hf.modeling.prompts_san.PROMPT_TEMPLATES`."""

    vild = "vild"
    imagenet = "imagenet"


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
    Expansion | None,
    typer.Option(
        show_default=False,
        help="Let pixels go elsewhere, too: to COCO-Stuff's 171 classes (coco) or its 91 stuff classes (coco-stuff). "
        'All of these become one "other"; in an evaluation, they are wrong.',
    ),
]
TemplatesOption = Annotated[
    Templates | None,
    typer.Option(
        show_default=False,
        help="The sentences that names are put into: ViLD's 14, or CLIP's 80 for ImageNet. By default, what the model "
        "was trained with.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")
]
PrecisionOption = Annotated[Precision, typer.Option("--dtype", help="Precision to compute in.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has written.")]
OutputFolderOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where to write. It is made if need be.")
]


def value_of(choice: Enum | None) -> str | None:
    """The text of a choice."""
    return None if choice is None else choice.value
