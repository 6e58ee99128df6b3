"""`san-hf train`, which is also `scripts/train.py`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


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
            help="The recipe, a YAML file: see san_hf/training/recipes. Without one, SAN's published recipe holds, and "
            "model, data.source and output have to be given.",
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

        san-hf train --config san_hf/training/recipes/finetune.yaml data.source=FOLDER output=runs/mine

    On several GPUs or machines, by `accelerate config` once and then `accelerate launch scripts/train.py` with the same
    arguments. The output folder gets checkpoints, log.jsonl, the best model and the final one.
    """
    # Not before they are needed: these take seconds.
    import datasets
    import torch.distributed as dist
    from transformers.utils import logging

    from san_hf.data import DataError
    from san_hf.training.checkpoint import CheckpointError
    from san_hf.training.config import ConfigError, describe, load_config
    from san_hf.training.loop import PeerError, TrainingError
    from san_hf.training.loop import train as run

    status = 0
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        settings = load_config(config, overrides or [])
        if show:
            typer.echo(describe(settings))
            return
        run(settings, resume=resume)
        if dist.is_initialized() and dist.get_backend() == "nccl":  # which asks for it
            dist.destroy_process_group()
    except PeerError:
        status = 2
    except (ConfigError, DataError, TrainingError, CheckpointError) as error:
        typer.echo(f"Error: {error}", err=True)
        status = 2
    except OSError as error:  # a full disk can show anywhere
        where = f" ({error.filename})" if error.filename else ""
        typer.echo(f"Error: {error.strerror or error}{where}. Complete checkpoints are kept: see --resume.", err=True)
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
