"""`san-hf convert`, both ways."""

from pathlib import Path
from typing import Annotated

import typer

from san_hf.cli.console import fail, quiet_libraries, show
from san_hf.cli.options import OverwriteOption, Precision
from san_hf.messages import printable
from san_hf.paths import expand_path


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help="The original's checkpoint, .pth or .safetensors; with --to-original, a model: a folder, or a name as "
            "in segment.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", show_default=False, help="The folder to write; with --to-original, the .pth file."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A saved SANConfig (config.json), for sizes other than the two released models'."
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            show_default=False, help="Precision of the written weights: float32, or with --to-original the model's."
        ),
    ] = None,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="The way back: from a model to the original's layout.")
    ] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the side adapter alone, without the CLIP that --base names.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CLIP",
            show_default=False,
            help="With --adapter-only, the CLIP that SOURCE was trained on: a folder or a repository, such as "
            "openai/clip-vit-base-patch16. Its tensors are compared with SOURCE's frozen ones.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Convert a checkpoint of the original SAN to a Transformers folder, or a model to the original's layout.

    For example: `san-hf convert san_vit_b_16.pth san-vit-b-16`

    The side adapter alone: `san-hf convert san_vit_b_16.pth adapter --adapter-only --base openai/clip-vit-base-patch16`

    And back: `san-hf convert my-san my_san.pth --to-original`
    """
    import torch

    from san_hf.conversion import convert_checkpoint, export_checkpoint
    from san_hf.hub import resolve

    quiet_libraries()
    source = expand_path(source)
    precision = None if dtype is None else getattr(torch, dtype.value)
    if adapter_only != (base is not None):
        fail("--adapter-only and --base CLIP go together: a side adapter means nothing without its CLIP.")
    if to_original:
        if adapter_only:
            fail("--adapter-only is for a Transformers folder: the original's layout has CLIP, leave it out.")
        if config is not None:
            fail("--config is for checkpoints of the original: a model has its own, leave it out with --to-original.")
        written = export_checkpoint(resolve(source), output, dtype=precision, overwrite=overwrite)
    else:
        written = convert_checkpoint(
            source,
            output,
            config,
            dtype=precision or torch.float32,
            overwrite=overwrite,
            base=None if base is None else expand_path(base),
        )
    show(f"Wrote {printable(written)}")
