"""`san-hf app`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from san_hf.cli.console import fail, quiet_libraries, show
from san_hf.cli.options import MODEL_HELP, DeviceOption, Precision, PrecisionOption
from san_hf.hub.names import EMBEDDED_MODEL, EMBEDDED_NOTE
from san_hf.messages import printable
from san_hf.paths import list_images


def run_app(
    model: Annotated[
        list[str], typer.Option("--model", "-m", metavar="MODEL", help=f"May be repeated, to choose from. {MODEL_HELP}")
    ] = [EMBEDDED_MODEL],  # noqa: B006  # Typer reads it
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER_OR_REPOSITORY",
            show_default=False,
            help="A side adapter to choose, trained on the CLIP of the first model. May be repeated.",
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default=False, help="Pictures to offer; by default a drawn one."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Where to listen; 0 for any free port.")
    ] = 7860,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="The address to listen at. The default is this machine alone; 0.0.0.0 lets in everybody who can reach "
            "it, without a password.",
        ),
    ] = "127.0.0.1",
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="The largest picture that is taken.")
    ] = 20_000_000,
    device: DeviceOption = "auto",
    dtype: PrecisionOption = Precision.float32,
) -> None:
    """
    Segment pictures in the browser: change the words, and the answer comes without looking at the picture again.

    For example: `san-hf app --model san-vit-b-16`
    """
    from san_hf.extras import import_extra

    # Before a model is loaded; it is imported when it has been told of its folder.
    if find_spec("gradio") is None:
        import_extra("gradio", "app", "The app")
    if EMBEDDED_MODEL in model:
        show(Text(EMBEDDED_NOTE, style="yellow"))
    show(f"Loading {printable(', '.join([*model, *(adapter or [])]))} ...")
    import torch

    from san_hf.app.interface import serve
    from san_hf.app.limits import Limits
    from san_hf.app.models import Models
    from san_hf.devices import pick_device

    quiet_libraries()
    offered = [str(path) for path in list_images(examples).files[:24]] if examples else None
    if offered == []:
        fail(f"There is no image in the folder '{printable(examples)}'.")  # type: ignore[arg-type]  # it is given
    models = Models.load(model, adapter or [], device=pick_device(device), dtype=getattr(torch, dtype.value))
    serve(models, Limits(pixels=max_pixels), offered, host=host, port=port, ready=show_address)


def show_address(address: str) -> None:
    """Where the page is."""
    show(f"Open {address} in a browser; Ctrl-C ends the app.")
