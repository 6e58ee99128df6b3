"""The command line: `san-hf segment`, `convert`, `export`, `prepare`."""

import csv
import functools
import glob
import os
import re
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, NoReturn

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from san_hf.cli.evaluate import evaluate
from san_hf.cli.prepare import prepare
from san_hf.cli.train import train
from san_hf.conversion import convert_checkpoint, export_checkpoint
from san_hf.devices import pick_device
from san_hf.evaluation.report import results
from san_hf.hub import resolve
from san_hf.inference import Segmentation, Segmenter
from san_hf.inference.segmenter import EMBEDDED_MODEL
from san_hf.inference.writers import FORMATS, output_files
from san_hf.version import __version__


EMBEDDED_NOTE = (
    "Model: picture-book, a tiny one that comes with the package to prove the pipeline. It knows simple drawn scenes "
    "and nothing else; for photographs use --model san-vit-b-16 or your own."
)

app = typer.Typer(
    name="san-hf",
    help="Open-vocabulary semantic segmentation with SAN: name what to look for, in plain words, and get a label for "
    "every pixel.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Format = Enum("Format", {name: name for name in FORMATS}, type=str)


class Expansion(str, Enum):
    coco = "coco"
    coco_stuff = "coco-stuff"


class Templates(str, Enum):
    vild = "vild"
    imagenet = "imagenet"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def show(text: str | Text = "", *, error: bool = False) -> None:
    """One line on standard output or standard error, as it is: no markup, no wrapping."""
    Console(stderr=error, soft_wrap=True).print(text, markup=False, emoji=False, highlight=False)


def printable(path: str | os.PathLike) -> str:
    """A path for people: line breaks, control characters and bytes that are no text are replaced."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in os.fspath(path))


def fail(message: object) -> NoReturn:
    """Ends the command with a message and the status for "nothing was done"."""
    show(f"Error: {message}", error=True)
    raise typer.Exit(2)


def print_version(wanted: bool) -> None:
    if wanted:
        show(f"san-hf {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Names of classes and files may have letters that a terminal hasn't.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    # What goes wrong is said here, in one line.
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@app.command(no_args_is_help=True)
def segment(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE", show_default=False, help="Image files, folders (with all below them) or patterns."
        ),
    ],
    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help='What to look for, separated by commas: "cat, grass, sky". A name with a comma goes in double '
            "quotes. Every pixel gets one of these names, so name the background, too, or use --expand. Not needed if "
            "the model carries names of its own.",
        ),
    ] = None,
    classes_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to look for, from a text file: one name a line.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="A folder, san-vit-b-16 or san-vit-large-14 (the released models, downloaded once), or a repository "
            "on the Hugging Face Hub. The default is a tiny model that only proves the pipeline.",
        ),
    ] = EMBEDDED_MODEL,
    expand: Annotated[
        Expansion | None,
        typer.Option(
            help="Let pixels go elsewhere, too: to COCO-Stuff's 171 classes (coco) or its 91 kinds of stuff "
            '(coco-stuff). All of these become one "other".'
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where to write. It is made if need be.")
    ] = Path("outputs"),
    formats: Annotated[
        list[Format],
        typer.Option(
            "--format",
            "-f",
            help="What to write; may be repeated. overlay: the picture, tinted, with names and a legend. mask: the "
            "regions in plain colours. json: names, shares of pixels and colours. png-labels: one number per pixel, "
            "and the json that explains them.",
        ),
    ] = [Format.overlay],  # noqa: B006
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
    templates: Annotated[
        Templates | None,
        typer.Option(
            help="The sentences that names are put into: ViLD's 14, or CLIP's 80 for ImageNet. By default, what the "
            "model was trained with."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Precision to compute in.")] = Precision.float32,
) -> None:
    """
    Segment images by class names in plain words.

    For example: `san-hf segment photo.jpg --classes "cat, grass, sky" --model san-vit-b-16`

    Ends with status 0 if all images were segmented, 1 if some were not, 2 if none was.
    """
    class_names = read_class_names(classes, classes_file)
    sources = find_images(images, output)
    wanted = [choice.value for choice in formats]
    stems = name_outputs([name for _, name in sources], output)
    paths = [Path(source) for source, _ in sources]
    check_outputs(paths, stems, wanted, overwrite)
    make_folder(output)
    segmenter = load_segmenter(
        model,
        class_names,
        expand=expand and expand.value,
        templates=templates and templates.value,
        device=device,
        dtype=getattr(torch, dtype.value),
    )
    if model == EMBEDDED_MODEL:
        show(Text(EMBEDDED_NOTE, style="yellow"))

    failed = 0
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=len(paths) == 1,
    )
    with progress:
        for path, stem in progress.track(list(zip(paths, stems)), description="Segmenting"):
            try:
                segmentation = segmenter(path)
                files = segmentation.save(stem, wanted, image=printable(path), model=model)
            except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
                failed += 1
                show(f"Error: {printable(path)}: {explain(error)}", error=True)
                continue
            show(f"{printable(path)} -> {', '.join(map(printable, files))}")
            print_legend(segmentation, short=len(paths) > 1)
    if failed:
        show(f"{failed} of {len(paths)} images could not be segmented.", error=True)
        raise typer.Exit(2 if failed == len(paths) else 1)


def explain(error: Exception) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory: scale the image down, or try --dtype bfloat16 or another --device"
    return str(error) or type(error).__name__


def read_class_names(classes: list[str] | None, file: Path | None) -> list[str] | None:
    """The names of both options in their order; `None` if neither is given."""
    if not classes and file is None:
        return None
    names = []
    for line in classes or []:
        # strict, so that a quote that isn't closed is an error; spaces after a closing quote are not.
        tidy = re.sub(r'"\s+(?=,|$)', '"', line)
        try:
            for row in csv.reader(tidy.splitlines(), skipinitialspace=True, strict=True):
                names += row
        except csv.Error as error:
            fail(f"--classes {line!r}: {error}. A name with a comma goes in double quotes.")
    if file is not None:
        try:
            names += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--classes-file '{printable(file)}' can't be read: {error}")
    names = [name.strip() for name in names if name.strip()]
    garbled = [name for name in names if any("\ud800" <= letter <= "\udfff" for letter in name)]
    if garbled:
        fail(f"The class name '{printable(garbled[0])}' is no text in this terminal's encoding. Expected UTF-8.")
    if not names:
        fail('Got no class name, expected at least one, for example --classes "cat, grass, sky".')
    return names


def find_images(patterns: list[str], output: Path) -> list[tuple[str, Path]]:
    """
    The files that are meant, each once, and for each a relative path to name its outputs after (without extension).

    A file is taken as it is; of a folder, everything below it with an image's ending, except for hidden files and the
    output folder; anything else is a pattern. What doesn't exist stays, to be reported with the others.
    """
    endings = Image.registered_extensions()
    found: dict[str, tuple[str, Path]] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            folder = Path(pattern)
            inside = [
                path
                for path in sorted(folder.rglob("*"))
                if path.suffix.lower() in endings
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(folder).parts)
                and not path.resolve().is_relative_to(output.resolve())
            ]
            if not inside:
                fail(f"There is no image in the folder '{printable(pattern)}'.")
            matches = [(str(path), path.relative_to(folder).with_suffix("")) for path in inside]
        elif not os.path.exists(pattern) and glob.has_magic(pattern):
            files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            matches = [(file, Path(Path(file).stem)) for file in files]
            if not matches:
                fail(f"Nothing matches the pattern '{printable(pattern)}'.")
        else:
            matches = [(pattern, Path(Path(pattern).stem))]
        for match in matches:
            found.setdefault(os.path.realpath(match[0]), match)
    return list(found.values())


def name_outputs(names: list[Path], output: Path) -> list[Path]:
    """For each a path below `output`, none twice (not even where capitals don't count): a number is added."""
    taken, stems = set(), []
    for name in names:
        # File systems allow names of 255 bytes; endings take some of them.
        name = name.with_name(os.fsdecode(os.fsencode(name.name)[:200]))
        stem, number = name, 1
        while str(stem).casefold() in taken:
            number += 1
            stem = name.with_name(f"{name.name}-{number}")
        taken.add(str(stem).casefold())
        stems.append(output / stem)
    return stems


def check_outputs(images: list[Path], stems: list[Path], formats: list[str], overwrite: bool) -> None:
    """Before anything is computed: nothing is lost by writing, and the folder takes files."""
    files = [file for stem in stems for file in output_files(stem, formats)]
    inputs = {os.path.realpath(image) for image in images}
    lost = [file for file in files if os.path.realpath(file) in inputs]
    if lost:
        fail(f"'{printable(lost[0])}' is an image to segment and would be overwritten. Choose another --output.")
    existing = [file for file in files if os.path.lexists(file)]
    if existing and not overwrite:
        fail(
            f"'{printable(existing[0])}' exists already"
            + (f", and {len(existing) - 1} more" if len(existing) > 1 else "")
            + ". Use --overwrite to replace files of an earlier run, or another --output."
        )


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output).close()
    except OSError as error:
        fail(f"Can't write to the folder '{printable(output)}': {error.strerror or error}.")


def load_segmenter(model: str, class_names: list[str] | None, *, device: str, **options) -> Segmenter:
    """The model on its device; whatever prevents that, in words."""
    try:
        return Segmenter.from_pretrained(model, class_names, device=pick_device(device), **options)
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        fail(explain(error))


def print_legend(segmentation: Segmentation, short: bool) -> None:
    """Classes by their share of pixels: a table, or one line."""
    legend = sorted(segmentation.legend(), key=lambda entry: -entry["pixels"])
    present = [entry for entry in legend if entry["pixels"]]
    absent = [entry["name"] for entry in legend if not entry["pixels"]]
    if short:
        show("    " + ", ".join(f"{entry['name']} {entry['share']:.1%}" for entry in present))
        return
    table = Table("class", "share of pixels", "colour", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.columns[1].justify = "right"
    for entry in present:
        swatch = Text.assemble(("██ ", entry["color"]), entry["color"])
        table.add_row(Text(entry["name"]), f"{entry['share']:.1%}", swatch)
    Console().print(table)
    if absent:
        more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
        show(f"Not found: {', '.join(absent[:20])}{more}.")


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="The checkpoint: .pth or .safetensors.")
    ],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False, help="The folder to write.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A saved SANConfig (config.json), for sizes other than the two released models'."
        ),
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of the written weights.")] = Precision.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
) -> None:
    """
    Convert a checkpoint of the original SAN to a Transformers folder.

    For example: `san-hf convert san_vit_b_16.pth san-vit-b-16`
    """
    try:
        folder = convert_checkpoint(source, output, config, dtype=getattr(torch, dtype.value), overwrite=overwrite)
    except (OSError, ValueError) as error:
        fail(error)
    show(f"Wrote {printable(folder)}")


@app.command(no_args_is_help=True)
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", show_default=False, help="A folder, or a name as in segment.")
    ],
    output: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="The .pth file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """
    Export a model to the layout of the original SAN.

    For example: `san-hf export my-san my_san.pth`
    """
    try:
        file = export_checkpoint(resolve(model), output, overwrite=overwrite)
    except (OSError, ValueError) as error:
        fail(error)
    show(f"Wrote {printable(file)}")


def plainly(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose errors end it with a line rather than a stack trace."""

    @functools.wraps(command)
    def run(*args, **kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (OSError, ValueError) as error:
            fail(error)

    return run


app.command(no_args_is_help=True)(plainly(prepare))
app.command(no_args_is_help=True)(train)
app.command(no_args_is_help=True)(plainly(evaluate))
app.command(no_args_is_help=True)(plainly(results))


if __name__ == "__main__":
    app()
