"""`san-hf segment`."""

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from san_hf.ahead import run_ahead
from san_hf.cli.console import explain, fail, quiet_libraries, show, show_error
from san_hf.cli.options import (
    AverageSynonymsOption,
    ColorsOption,
    DeviceOption,
    ExpandOption,
    ModelOption,
    OutputFolderOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    SynonymsOption,
    TemplatesOption,
    ThresholdOption,
)
from san_hf.cli.processes import add_up, join_processes, leave_processes, on_main_process, part_of_process
from san_hf.cli.segment_journal import Journal, model_facts, parse_shard
from san_hf.cli.segment_options import (
    AllowUrlsOption,
    BandsOption,
    ClassesFileOption,
    ClassesOption,
    ImagesArgument,
    OtherOption,
    OverlapOption,
    RangeOption,
    RuntimeOption,
    SaveVocabularyOption,
    ShardOption,
    TileOption,
    raster_of_options,
)
from san_hf.cli.segment_sources import find_images, open_source, report_missing
from san_hf.cli.vocabulary_options import (
    class_facts,
    class_names_of_options,
    colors_of_options,
    expansion_of_option,
    templates_of_options,
)
from san_hf.hub.names import EMBEDDED_MODEL, EMBEDDED_NOTE
from san_hf.inference.writers import FORMATS, output_files
from san_hf.messages import join_some, printable
from san_hf.paths import expand_path, paths_for
from san_hf.progress import PlainConsole, progress_bar, row_progress
from san_hf.vocabularies.files import is_vocabulary_file


if TYPE_CHECKING:
    from concurrent.futures import Future

    from rich.progress import Progress

    from san_hf.inference import Segmentation, Segmenter

# What an image, a model's outputs or a disk may cause; other errors are ours.
EXPECTED_ERRORS = (OSError, ValueError, RuntimeError, MemoryError)

Format = Enum("Format", {name: name for name in FORMATS}, type=str)  # type: ignore[misc]  # dynamic


def segment(
    images: ImagesArgument,
    classes: ClassesOption = None,
    classes_file: ClassesFileOption = None,
    model: ModelOption = EMBEDDED_MODEL,
    expand: ExpandOption = None,
    threshold: ThresholdOption = None,
    other: OtherOption = None,
    synonyms: SynonymsOption = False,
    average_synonyms: AverageSynonymsOption = False,
    colors: ColorsOption = None,
    output: OutputFolderOption = Path("outputs"),
    formats: Annotated[
        list[Format],
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="What to write; may be repeated. overlay: the image, tinted, with names and a legend. mask: the "
            "regions in plain colours. json: names, shares of pixels and colours. png-labels: one number per pixel, "
            "and the json that explains them; npy: the same for NumPy. confidence: how sure each pixel's name is, "
            "16-bit grey, 65535 for 1. coco: run-length codes. geojson: polygons. geotiff: one number per pixel, with "
            "its colours and its place on the map.",
        ),
    ] = [Format.overlay],  # type: ignore[attr-defined]  # noqa: B006  # dynamic
    tile: TileOption = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    value_range: RangeOption = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where the same command was stopped: images whose files are complete are skipped, unless they "
            "have changed since.",
        ),
    ] = False,
    allow_urls: AllowUrlsOption = False,
    shard: ShardOption = None,
    templates: TemplatesOption = None,
    save_vocabulary: SaveVocabularyOption = None,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = None,
    dtype: PrecisionOption = Precision.float32,
) -> None:
    """
    Segment images by class names in plain words.

    For example: `san-hf segment photo.jpg --classes "cat, grass, sky" --model san-vit-b-16`

    Several processes, started by torchrun or `accelerate launch -m san_hf segment ...`, share the images.

    Ends with status 0 if all images were segmented, 1 if some were not, 2 if none was.
    """
    class_names = class_names_of_options(classes, classes_file)
    given_colors = colors_of_options(colors)
    accelerator = join_processes(device, "segment")
    part = part_of_process(parse_shard(shard), accelerator)
    is_main = accelerator is None or accelerator.is_main_process
    # One list for all processes, whatever is added to a folder meanwhile.
    named = on_main_process(accelerator, lambda: find_images(images, output, allow_urls))
    sources = report_missing(named, classes, quiet=not is_main)
    missing = len(named) - len(sources)
    wanted = [choice.value for choice in formats]
    stems = paths_for([(*name.parts[:-1], name.stem) for _, name in sources], output)
    # The names are those of all images, whatever the part.
    jobs = [(source, stem) for (source, _), stem in zip(sources, stems)][part[0] - 1 :: part[1]]
    if not jobs and accelerator is None:
        fail(f"There are no images for --shard {shard}: there are {len(sources)} in all.")
    options: dict[str, Any] = {
        "expand": expansion_of_option(expand),
        "templates": templates_of_options(templates),
        "threshold": threshold,
        "other": other,
        "synonyms": synonyms,
        "average_synonyms": average_synonyms,
        "tile": tile,
        "overlap": overlap,
    }
    raster = raster_of_options(bands, value_range)
    settings = {"the model": model_facts(expand_path(model)), "the class names": class_facts(class_names), **options}
    settings |= {"the formats": sorted(wanted), "the dtype": dtype.value, "the colours": given_colors}
    if raster is not None:
        options["raster"], settings["the raster"] = raster, [bands, value_range]
    if runtime is not None:
        options["runtime"] = settings["the runtime"] = runtime.value
    journal = Journal(output, part, settings)
    done = journal.resume() if resume else {}
    remaining = [job for job in jobs if not journal.is_done(done, *job, output_files(job[1], wanted))]
    check_outputs(
        [source for source, _ in jobs],
        [stem for _, stem in remaining],
        wanted,
        overwrite or (resume and journal.begun()),
    )
    if save_vocabulary is not None and is_main:
        check_vocabulary_file(save_vocabulary, overwrite or resume)
    make_folder(output)
    total, left = add_up(accelerator, len(jobs), len(remaining))
    if left < total and is_main:
        show(f"{total - left} of {total} images are done already.")
    if not left:
        raise typer.Exit(1 if missing else 0)
    failed = 0
    if remaining:
        options |= {"colors": given_colors, "confidence": "confidence" in wanted}
        where = device if accelerator is None else str(accelerator.device)
        segmenter = load_segmenter(model, class_names, where, dtype.value, options)
        if is_main:
            show_notes(segmenter, model, wanted)
            if save_vocabulary is not None:
                segmenter.vocabulary.with_options(colors=given_colors).save(save_vocabulary)
                show(f"Wrote {printable(save_vocabulary)}")
        with journal.open(keep=resume) if total > 1 else nullcontext() as opened:
            failed = segment_all(
                segmenter, remaining, wanted, model, opened, len(jobs), hidden=total == 1 or not is_main
            )
    failed = missing + add_up(accelerator, failed)[0]
    if failed and is_main:
        show(f"{failed} of {total + missing} images could not be segmented.", error=True)
    leave_processes(accelerator)
    if failed:
        raise typer.Exit(2 if failed == total + missing else 1)


def segment_all(
    segmenter: "Segmenter",
    jobs: list[tuple[str, Path]],
    formats: list[str],
    model: str,
    journal: Journal | None,
    total: int,
    hidden: bool,
) -> int:
    """Segments images, of which others may be done already; how many could not be."""
    failed, done = 0, total - len(jobs)
    with progress_bar(hidden) as bar:
        task = bar.add_task("Segmenting", total=total, completed=done, speed="")
        try:
            rows = None if journal is None else bar
            for path, stem, segmentation, files in segmented_and_saved(segmenter, jobs, formats, model, rows):
                if isinstance(segmentation, Exception):
                    show_error(segmentation, f"{printable(path)}: {explain(segmentation)}")
                    failed += 1
                else:
                    show(f"{printable(path)} -> {', '.join(map(printable, files))}")
                    print_legend(segmentation.legend(), short=journal is not None)
                    done += 1
                    if journal is not None:
                        journal.add(path, stem)
                bar.advance(task)
        except KeyboardInterrupt:
            bar.stop()
            advice = "" if journal is None else " The same command with --resume goes on."
            show(f"Interrupted: {done} of {total} images are done.{advice}", error=True)
            raise typer.Exit(130) from None
    return failed


def segmented_and_saved(
    segmenter: "Segmenter", jobs: list[tuple[str, Path]], formats: list[str], model: str, bar: "Progress | None"
) -> "Iterator[tuple[str, Path, Segmentation | Exception, list[Path]]]":
    """
    Segments images and writes their files. While the model is at work on one image, the next is read and the one before
    is written, and nothing else is ahead: at most four images are in memory, with the one whose result was yielded. Of
    an image in strips, `bar` or one of its own shows the rows.

    Yields:
        Image, stem, segmentation and files, in order; of what went wrong, the error in the segmentation's place.
    """
    from san_hf.inference.large import SegmentedFile
    from san_hf.inference.segmenter import LoadedImage

    def segment(loaded: "Iterable[tuple[tuple[str, Path], Future[Any]]]") -> Iterator[tuple[str, Path, Any]]:
        for (path, stem), future in loaded:
            try:
                image = future.result()
                if isinstance(image, LoadedImage):
                    yield path, stem, segmenter(image)
                else:
                    # Too large for memory, and written while it is segmented. As that takes long, what is `None` lets
                    # the results before it go on their way, and then its own.
                    yield path, stem, None
                    facts = {"image": printable(path), "model": model}
                    with row_progress(printable(os.path.basename(path)), bar) as progress:
                        segmented = segmenter.segment_file(image, stem, formats, progress=progress, **facts)
                    yield path, stem, segmented
                    yield path, stem, None
            except EXPECTED_ERRORS as error:
                yield path, stem, error

    def save(segmented: tuple[str, Path, Any]) -> list[Path]:
        path, stem, segmentation = segmented
        if segmentation is None or isinstance(segmentation, Exception):
            return []
        if isinstance(segmentation, SegmentedFile):
            return segmentation.files
        return segmentation.save(stem, formats, image=printable(path), model=model)

    loaded = run_ahead(lambda job: segmenter.load(open_source(job[0])), jobs, 1)
    for (path, stem, segmentation), future in run_ahead(save, segment(loaded), 1):
        try:
            if segmentation is not None:
                yield path, stem, segmentation, future.result()
        except EXPECTED_ERRORS as error:
            yield path, stem, error, []


def show_notes(segmenter: "Segmenter", model: str, formats: list[str]) -> None:
    """What the embedded model is, and the names that overlays replace by numbers."""
    from san_hf.legend import numbered_names, numbers_note

    if model == EMBEDDED_MODEL:
        show(Text(EMBEDDED_NOTE, style="yellow"))
    if "overlay" in formats and (numbered := numbered_names(segmenter.class_names)):
        show(Text(printable(numbers_note(numbered)), style="yellow"))


def check_outputs(images: list[str], stems: list[Path], formats: list[str], overwrite: bool) -> None:
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


def check_vocabulary_file(file: Path, overwrite: bool) -> None:
    """Before anything is computed: the vocabulary's file has the ending that its readers look for, and is a new one."""
    if not is_vocabulary_file(file):
        fail(f"Got --save-vocabulary {printable(file)}, expected a name that ends in .safetensors.")
    if os.path.lexists(file) and not overwrite:
        fail(f"'{printable(file)}' exists already. Use --overwrite to replace it, or another --save-vocabulary.")


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output).close()
    except OSError as error:
        fail(f"Can't write to the folder '{printable(output)}': {error.strerror or error}.")


def load_segmenter(
    model: str, class_names: list[str] | str | None, device: str, dtype: str, options: dict[str, Any]
) -> "Segmenter":
    """The model with its vocabulary, on its device."""
    import torch

    from san_hf.devices import pick_device
    from san_hf.inference import Segmenter
    from san_hf.memory import page_out

    quiet_libraries()
    where = "cpu" if device == "auto" and "runtime" in options else pick_device(device)
    segmenter = Segmenter.from_pretrained(model, class_names, device=where, dtype=getattr(torch, dtype), **options)
    # The names are encoded: images need nothing of it any more.
    page_out(segmenter.predictor.model.text_model)
    return segmenter


def print_legend(legend: list[dict[str, Any]], short: bool) -> None:
    """Classes by their share of pixels: a table, or one line."""
    legend = sorted(legend, key=lambda entry: -entry["pixels"])
    present = [entry for entry in legend if entry["pixels"]]
    absent = [entry["name"] for entry in legend if not entry["pixels"]]
    if short:
        show("    " + ", ".join(f"{entry['name']} {entry['share']:.1%}" for entry in present))
        return
    table = Table("class", "share of pixels", "colour", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.columns[1].justify = "right"
    for entry in present:
        swatch = Text.assemble(("██ ", entry["color"]), entry["color"])
        table.add_row(Text(printable(entry["name"])), f"{entry['share']:.1%}", swatch)
    PlainConsole().print(table)
    if absent:
        show(f"Not found: {join_some(absent, 20)}.")
