"""`san-hf train`, which is also `scripts/train.py`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from san_hf.cli.console import explain, quiet_libraries, show_error


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            show_default=False,
            help="Changes to the recipe, such as data.source=my_photos output=runs/mine "
            "optimizer.learning_rate=5e-5 training.steps=2000.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            show_default=False,
            help="The recipe: a YAML file, or the name of one that comes with the package: coco_stuff_vit_b16, "
            "coco_stuff_vit_l14, finetune, small_photographs. Without one, SAN's published recipe holds, and model, "
            "data.source and output have to be given.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in the output folder from its last checkpoint; else from the start."
        ),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print each key with its value and what it is, and train nothing.")
    ] = False,
) -> None:
    """
    Train or fine-tune a SAN.

    On your own photographs, in a folder with train/images, train/labels, validation/images, validation/labels and a
    classes.txt:

        san-hf train --config finetune data.source=FOLDER output=runs/mine

    On several GPUs or machines, by `accelerate config` once and then `accelerate launch scripts/train.py` with the same
    arguments. The output folder gets checkpoints, log.jsonl, the best model and the final one.
    """
    import torch.distributed as dist

    from san_hf.training.config_file import describe, load_config
    from san_hf.training.errors import PeerError
    from san_hf.training.loop import train as run

    status = 0
    quiet_libraries()
    try:
        settings = load_config(config, overrides or [], to_show=show)
        if show:
            typer.echo(describe(settings))
            return
        run(settings, resume=resume)
        if dist.is_initialized() and dist.get_backend() == "nccl":  # which asks for it
            dist.destroy_process_group()
    except PeerError:
        status = 2
    except (OSError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        message = explain(error)
        if isinstance(error, OSError) and error.strerror:  # a full disk can show anywhere
            where = f" ({error.filename})" if error.filename else ""
            message = f"{error.strerror}{where}. Complete checkpoints are kept: see --resume."
        show_error(error, message)
        status = 2
    if dist.is_initialized() and dist.get_backend() == "gloo":
        # Its threads still run. Where the interpreter takes down the rest around them, a run that has succeeded may
        # end by SIGABRT; destroying the group may hang, see RunLog. All files are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
app.command(no_args_is_help=True)(train)
