"""`san-hf push`."""

from pathlib import Path
from typing import Annotated

import typer

from san_hf.cli.console import quiet_libraries, show


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            show_default=False,
            help="A training's output folder, whose best/ or else final/ is pushed; or a model's folder.",
        ),
    ],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="REPO", show_default=False, help="owner/name on the Hub, or name. It is made if it isn't there."
        ),
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", show_default=False, help="What a new repository is. By default as the account has it."
        ),
    ] = None,
    adapter_only: Annotated[
        bool | None,
        typer.Option(
            "--adapter-only/--whole",
            show_default=False,
            help="Without its CLIP, which others then get from where it is; or with it. By default as the folder is.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="For a side adapter: the CLIP under it on the Hub, if the folder names a place on this machine. Its "
            "tensors are compared.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An image for the card, such as the run's pictures/best.png. None by default: images may be private.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Where to push to, rather than main. It is made if need be.")
    ] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
) -> None:
    """
    Push a finished training, or a model's folder, to the Hub.

    For example: `san-hf push runs/mine me/my-san --private`

    Weights, configuration, code, processor, tokenizer, results and the folder's own README.md go in one commit: all of
    it or nothing. Log in first, by `hf auth login` or the variable HF_TOKEN.
    """
    from san_hf.hub import push_folder

    quiet_libraries()
    commit = push_folder(
        folder,
        repository,
        private=private,
        adapter_only=adapter_only,
        base_model=base,
        picture=picture,
        revision=revision,
        create_pr=pull_request,
        commit_message=message,
    )
    show(f"Pushed to {commit.pr_url or commit.commit_url}")
