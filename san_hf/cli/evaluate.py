"""`san-hf evaluate`."""

import os
import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import typer
from accelerate import Accelerator
from rich.console import Console

from san_hf.data import DataError, SegmentationDataset, load_segmentation_dataset
from san_hf.data.benchmarks import BENCHMARKS
from san_hf.devices import pick_device
from san_hf.evaluation import evaluator
from san_hf.evaluation.metrics import METRICS
from san_hf.evaluation.report import RESULTS_FILE, Report, class_rows, console_table, percent, write_results
from san_hf.inference.segmenter import EMBEDDED_MODEL, load_model
from san_hf.modeling.prompts_san import PROMPT_TEMPLATES
from san_hf.vocabularies import EXPANSIONS


ALL = "all"
PICTURES_FILE, COMPARED_FOLDER = "pictures.png", "compared"

Expansion = Enum("Expansion", {name: name for name in EXPANSIONS}, type=str)
Templates = Enum("Templates", {name: name for name in PROMPT_TEMPLATES}, type=str)
Precision = Enum("Precision", {name: name for name in ("float32", "bfloat16", "float16")}, type=str)


def evaluate(
    sources: Annotated[
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
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="A folder, or a name as in segment.")
    ] = EMBEDDED_MODEL,
    data_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default=False, help=f"The folder that holds {', '.join(BENCHMARKS)}, once prepared."
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Which part of the set.")] = "validation",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Each set's results go to a folder in here.")
    ] = Path("outputs/evaluation"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; what is finished is not done again.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default=False, help="Only the first N images.")
    ] = None,
    augment: Annotated[
        bool,
        typer.Option("--tta", help="Test-time augmentation: six sizes, each also mirrored. About 17 times the pixels."),
    ] = False,
    boundary: Annotated[bool, typer.Option("--boundary", help="Boundary IoU, too.")] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print the table of the classes, too.")] = False,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="Write predictions.json, in the format of COCO-Stuff.")
    ] = False,
    pictures: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Draw the N worst images and N random ones, with their errors: pictures.png."
        ),
    ] = 0,
    compare_with: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="Evaluate this model as well, and draw it beside, such as the one before fine-tuning.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of random images.")] = 0,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            show_default=False,
            help="The class names in the order of the labels, if the set doesn't say: a file with one a line, or a "
            "benchmark's name.",
        ),
    ] = None,
    expand: Annotated[
        Expansion | None,
        typer.Option(show_default=False, help="Let pixels go elsewhere, too, as in segment: there they are wrong."),
    ] = None,
    synonyms: Annotated[
        bool,
        typer.Option(
            "--synonyms",
            help='Take the name "television, tv" for two words, of which the better one counts. By default names are '
            "put into the prompts as they are, as in SAN's published figures.",
        ),
    ] = False,
    templates: Annotated[
        Templates | None,
        typer.Option(show_default=False, help="The sentences that names are put into; by default the model's own."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(metavar="NAME", show_default=False)] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME", show_default=False)] = None,
    ignore_index: Annotated[
        int | None,
        typer.Option(metavar="LABEL", show_default=False, help="The label of pixels that have none; usually 255."),
    ] = None,
    label_shift: Annotated[
        int, typer.Option(metavar="N", help="Added to the labels; -1 where they start at 1 and 0 means none.")
    ] = 0,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a dataset from the Hub while evaluating, without a download.")
    ] = False,
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken", help="Leave out images that can't be read, and name them, rather than stop."),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of the same size at a time: faster on a GPU.")
    ] = 1,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Threads that read images ahead.")] = 2,
    save_every: Annotated[
        int, typer.Option(min=1, metavar="N", help="After how many images to note the state, for --resume.")
    ] = 100,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Precision to compute in.")] = Precision.float32,
) -> None:
    """
    Measure how well a model segments images with known labels.

    For example: `san-hf evaluate --model san-vit-b-16 --dataset data/voc`

    On several GPUs: `accelerate launch -m san_hf.cli evaluate ...`, which changes no figure.

    Ends with status 0 if all images counted, 1 if some were left out by --skip-broken, 2 if it failed.
    """
    datasets.disable_progress_bars()
    if resume and overwrite:
        raise ValueError("--resume goes on with earlier results, --overwrite drops them: give one of them.")
    if streaming and pictures:
        raise ValueError("--pictures needs to go back to images, which --streaming can't: leave one out.")
    if compare_with is not None and not pictures:
        raise ValueError("--compare-with draws two models side by side: say how many images by --pictures N.")
    if compare_with == model:
        raise ValueError(f"--compare-with is the model itself, {model!r}: expected another one.")
    accelerator = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device not in ("auto", "cpu"):
            raise ValueError(f"Got --device {device} for several processes: each has its own, leave the option out.")
        # Accelerate joins processes without a GPU only if it is told that CPUs are meant. The precision is --dtype's,
        # whatever was set for Accelerate.
        accelerator = Accelerator(cpu=pick_device(device).type == "cpu", mixed_precision="no")
    main = accelerator is None or accelerator.is_main_process
    wait = accelerator.wait_for_everyone if accelerator else lambda: None

    all_data = [
        load_segmentation_dataset(
            source,
            split,
            image_column=image_column,
            label_column=label_column,
            class_names=classes,
            ignore_index=ignore_index,
            label_shift=label_shift,
            streaming=streaming,
        )
        for source in find_datasets(sources, data_root)
    ]
    folders = name_folders([data.name for data in all_data], output)
    for folder in folders:
        check_folder(folder, resume, overwrite)
    wait()  # before any of them begins to write
    if main and overwrite:
        for folder in folders:
            # What this run may not replace; evaluate and write_results replace the rest.
            (folder / PICTURES_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder / COMPARED_FOLDER, ignore_errors=True)

    place = accelerator.device if accelerator else pick_device(device)
    models = {}
    for name in filter(None, (compare_with, model)):
        loaded, processor = load_model(name, getattr(torch, dtype.value))
        models[name] = loaded.to(place).eval(), processor
    options = {
        "expand": expand and expand.value,
        "synonyms": synonyms,
        "templates": templates and templates.value,
        "augment": augment,
    }
    settings = options | {
        "limit": limit,
        "dtype": dtype.value,
        "batch_size": batch_size,
        "label_shift": label_shift,
    }

    reports, broken = [], []
    for data, folder in zip(all_data, folders):
        evaluations = {}
        for name, (loaded, processor) in models.items():
            into = folder if name == model else folder / COMPARED_FOLDER
            evaluation = evaluator.evaluate(
                loaded,
                processor,
                data,
                accelerator=accelerator,
                batch_size=batch_size,
                workers=workers,
                limit=limit,
                boundary=boundary,
                worst=pictures,
                skip_broken=skip_broken,
                output=into,
                save_every=save_every,
                resume=resume,
                predictions=predictions and name == model,
                progress=data.name if len(models) == 1 else f"{data.name}, {Path(name).name}",
                **options,
            )
            evaluations[name] = evaluation
            if main:
                used = {
                    "templates": settings["templates"] or processor.prompt_templates,
                    "ignore_index": data.ignore_index,
                }
                extra = {"left_out": evaluation.broken} if evaluation.broken else {}
                facts = {"model": name, "dataset": data.name, "split": data.split, "settings": settings | used | extra}
                reports.append(write_results(into, evaluation, **facts))
        broken += evaluations[model].broken
        if main and pictures:
            draw_pictures(folder, models, evaluations, data, evaluations[model].worst, pictures, limit, seed, options)
        wait()
    if main:
        print_reports(reports, folders, per_class)
        for message in broken:
            Console(stderr=True, soft_wrap=True).print(f"Left out: {message}", markup=False, highlight=False)
    wait()  # a launcher ends them all when the first ends with status 1
    if accelerator is not None:
        accelerator.end_training()
        accelerator.state.destroy_process_group()
    if broken:
        raise typer.Exit(1)


def find_datasets(sources: Sequence[str], root: Path | None) -> list[str]:
    """
    The sets that are meant: benchmarks by name are in `root`.

    Raises:
        ValueError: a benchmark that isn't there, or a set twice.
    """
    found = []
    for source in sources:
        for name in BENCHMARKS if source == ALL else [source]:
            if root is not None and name in BENCHMARKS:
                found.append(str(root / name))
            elif name in BENCHMARKS and not os.path.isdir(name):
                raise ValueError(f"Where is the benchmark {name}? Give the folder that holds it by --data-root.")
            else:
                found.append(name)
    if missing := [
        folder for folder in found if root is not None and Path(folder).parent == root and not os.path.isdir(folder)
    ]:
        raise ValueError(
            f"There is no folder {', '.join(missing)}. Make it by `san-hf prepare {Path(missing[0]).name} --source DIR "
            f"--output {missing[0]}`."
        )
    if twice := {source for source in found if found.count(source) > 1}:
        raise ValueError(f"Got {', '.join(sorted(twice))} twice, expected each set once.")
    return found


def name_folders(names: Sequence[str], output: Path) -> list[Path]:
    """For each set a folder below `output`, none twice: a number is added."""
    folders: list[Path] = []
    for name in names:
        tidy = name.strip("/").replace("/", "--")
        folder, number = output / tidy, 1
        while folder in folders:
            number += 1
            folder = output / f"{tidy}-{number}"
        folders.append(folder)
    return folders


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """
    Before anything is computed: nothing is lost by writing.

    Raises:
        ValueError: there are results, or a part of them.
    """
    if resume or overwrite:
        return
    for name, what in ((RESULTS_FILE, "results"), ("progress", "an interrupted run")):
        if (folder / name).exists():
            raise ValueError(
                f"'{folder}' holds {what}. Go on with them by --resume, replace them by --overwrite, or choose another "
                "--output."
            )


def draw_pictures(
    folder: Path,
    models: dict[str, tuple],
    evaluations: dict[str, evaluator.Evaluation],
    data: SegmentationDataset,
    worst: Sequence[tuple[int, float]],
    count: int,
    limit: int | None,
    seed: int,
    options: dict[str, Any],
) -> None:
    """Writes the picture of the worst images and of `count` random others; it appears at once when complete."""
    titles = {index: f"worst {number}" for number, (index, _) in enumerate(worst, start=1)}
    for index in np.random.default_rng(seed).permutation(min(len(data), limit or len(data))).tolist():
        if len(titles) == len(worst) + count:
            break
        if index not in titles:
            try:
                data[index]
            except DataError:  # said already
                continue
            titles[index] = "random"
    if not titles:
        return
    short = {name: Path(name).name for name in models}
    if len(set(short.values())) < len(short):
        short = {name: name for name in models}
    picture = evaluator.draw_examples(
        {f"{short[name]}: mIoU {evaluations[name].metrics['mIoU']:.1f}": models[name] for name in models},
        data,
        list(titles),
        [f"{title}: {data[index][2]}" for index, title in titles.items()],
        **options,
    )
    partial = folder / f".{PICTURES_FILE}.part"
    try:
        picture.save(partial, format="png")
        os.replace(partial, folder / PICTURES_FILE)
    finally:
        partial.unlink(missing_ok=True)


def print_reports(reports: Sequence[Report], folders: Sequence[Path], per_class: bool) -> None:
    # Where the output goes to a file there is no width to keep.
    console = Console() if Console().is_terminal else Console(width=200)
    if per_class:
        for report in reports:
            console.print(f"{report.model} on {report.dataset}", style="bold", markup=False, highlight=False)
            console.print(console_table(*class_rows(report)))
    rows = [
        [report.dataset, report.model, f"{report.images:,}", *(percent(report.metrics[name]) for name in METRICS)]
        for report in reports
    ]
    console.print(console_table(["dataset", "model", "images", *METRICS], rows))
    for folder in folders:
        console.print(f"Wrote {folder}", markup=False, highlight=False, soft_wrap=True)
