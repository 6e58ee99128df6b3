"""`san-hf evaluate`."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from san_hf.cli.console import quiet_libraries, show, table_console
from san_hf.cli.evaluate_folders import (
    COMPARED_FOLDER,
    PICTURES_FILE,
    open_folders,
    remove_drawings,
)
from san_hf.cli.evaluate_options import (
    AugmentOption,
    BatchSizeOption,
    BoundaryOption,
    ClassesOption,
    ColumnOption,
    CompareOption,
    DataRootOption,
    IgnoreIndexOption,
    LabelShiftOption,
    LimitOption,
    OutputOption,
    PaletteOption,
    PerClassOption,
    PicturesOption,
    PredictionsOption,
    ResumeOption,
    SaveEveryOption,
    SeedOption,
    SkipBrokenOption,
    SourcesOption,
    SplitOption,
    StreamingOption,
    ValidationShareOption,
    WorkersOption,
)
from san_hf.cli.options import (
    AverageSynonymsOption,
    ColorsOption,
    DeviceOption,
    ExpandOption,
    ModelOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    SynonymsOption,
    TemplatesOption,
    ThresholdOption,
)
from san_hf.cli.processes import join_processes, leave_processes
from san_hf.cli.vocabulary_options import colors_of_options, expansion_of_option, templates_of_options
from san_hf.data.benchmarks import BENCHMARKS
from san_hf.hub.names import EMBEDDED_MODEL
from san_hf.messages import join_some
from san_hf.paths import expand_path, paths_for
from san_hf.vocabularies.files import is_vocabulary_file


if TYPE_CHECKING:
    from accelerate import Accelerator

    from san_hf.data import SegmentationDataset
    from san_hf.evaluation.evaluator import Evaluation
    from san_hf.evaluation.report import Report
    from san_hf.modeling import SANForSemanticSegmentation, SANProcessor

    Models = dict[str, tuple[SANForSemanticSegmentation, SANProcessor]]

ALL = "all"


def evaluate(
    sources: SourcesOption,
    model: ModelOption = EMBEDDED_MODEL,
    data_root: DataRootOption = None,
    split: SplitOption = "validation",
    validation_split: ValidationShareOption = None,
    output: OutputOption = Path("outputs/evaluation"),
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    limit: LimitOption = None,
    augment: AugmentOption = False,
    boundary: BoundaryOption = False,
    per_class: PerClassOption = False,
    predictions: PredictionsOption = False,
    pictures: PicturesOption = 0,
    compare_with: CompareOption = None,
    seed: SeedOption = 0,
    classes: ClassesOption = None,
    expand: ExpandOption = None,
    synonyms: SynonymsOption = False,
    average_synonyms: AverageSynonymsOption = False,
    threshold: ThresholdOption = None,
    templates: TemplatesOption = None,
    colors: ColorsOption = None,
    image_column: ColumnOption = None,
    label_column: ColumnOption = None,
    ignore_index: IgnoreIndexOption = None,
    label_shift: LabelShiftOption = 0,
    label_palette: PaletteOption = None,
    streaming: StreamingOption = False,
    skip_broken: SkipBrokenOption = False,
    batch_size: BatchSizeOption = 1,
    workers: WorkersOption = 2,
    save_every: SaveEveryOption = 100,
    device: DeviceOption = "auto",
    dtype: PrecisionOption = Precision.float32,
) -> None:
    """
    Measure how well a model segments images with known labels.

    For example: `san-hf evaluate --model san-vit-b-16 --dataset data/voc`

    On several GPUs: `accelerate launch -m san_hf.cli evaluate ...`, which changes no metric.

    Ends with status 0 if all images counted, 1 if some were left out by --skip-broken, 2 if it failed.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with earlier results, --overwrite drops them: give one of them.")
    if streaming and pictures:
        raise ValueError("--pictures needs to go back to images, which --streaming can't: leave one out.")
    if compare_with is not None and not pictures:
        raise ValueError("--compare-with draws two models side by side: say how many images by --pictures N.")
    if compare_with == model:
        raise ValueError(f"--compare-with is the model itself, {model!r}: expected another one.")
    quiet_libraries()
    from san_hf.hub.load import check_name

    names = [model] if compare_with is None else [model, compare_with]
    for name in names:
        check_name(name)
    accelerator = join_processes(device, "evaluate")
    reading_options = {
        "image_column": image_column,
        "label_column": label_column,
        "class_names": classes,
        "ignore_index": ignore_index,
        "label_shift": label_shift,
        "label_palette": label_palette,
        "streaming": streaming,
    }
    # What changes the metrics, for results.json.
    settings = {
        "expand": expansion_of_option(expand),
        "synonyms": synonyms,
        "average_synonyms": average_synonyms,
        "threshold": threshold,
        "templates": templates_of_options(templates),
        "augment": augment,
        "limit": limit,
        "batch_size": batch_size,
    }
    evaluation = Evaluations(
        model=model,
        compare_with=compare_with,
        accelerator=accelerator,
        settings=settings
        | ({"vocabulary": Path(classes).name} if classes and is_vocabulary_file(classes) else {})
        | {"dtype": dtype.value, "label_shift": label_shift, "label_palette": label_palette},
        options=settings
        | {"boundary": boundary, "skip_broken": skip_broken, "workers": workers}
        | {"save_every": save_every, "resume": resume, "seed": seed},
        pictures=pictures,
        predictions=predictions,
        vocabulary=expand_path(classes) if classes and is_vocabulary_file(classes) else None,
        colors=colors_of_options(colors),
    )
    all_data = load_data(find_datasets(sources, data_root), split, reading_options)
    if validation_split is not None:
        from san_hf.data import set_aside

        all_data = [set_aside(data, validation_split, seed)[1] for data in all_data]
    folders = paths_for([(data.name,) for data in all_data], output)
    with ExitStack() as locks:
        open_folders(folders, resume, overwrite, accelerator, locks)
        models = load_models(names, device, dtype.value, accelerator)
        if overwrite and evaluation.is_main:
            remove_drawings(folders)
        for data, folder in zip(all_data, folders):
            evaluation.measure(models, data, folder)
    if evaluation.is_main:
        print_reports(evaluation.reports, folders, per_class)
        for message in evaluation.broken:
            show(f"Left out: {message}", error=True)
    leave_processes(accelerator)
    if evaluation.broken:
        raise typer.Exit(1)


@dataclass
class Evaluations:
    """
    The evaluations of a command: one for each data set and model.

    Attributes:
        model: what is measured.
        compare_with: another model beside it, if any.
        accelerator: of a run of several processes.
        settings: what results.json says about how it was measured.
        options: of [`san_hf.evaluation.evaluator.EvaluationOptions`], for all of them.
        pictures: how many of the worst and of random images to draw.
        predictions: whether to write the model's predictions.
        reports: of the finished ones; only in the main process.
        broken: examples of `model` that were left out.
    """

    model: str
    compare_with: str | None
    accelerator: "Accelerator | None"
    settings: dict[str, Any]
    options: dict[str, Any]
    pictures: int
    predictions: bool
    vocabulary: str | None = None
    colors: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    reports: "list[Report]" = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def measure(self, models: "Models", data: "SegmentationDataset", folder: Path) -> None:
        """Evaluates all models on a data set, and writes results and pictures."""
        own = self._evaluate(
            models, self.model, data, folder, {"pictures": self.pictures, "predictions": self.predictions}
        )
        titles = {index: f"worst {number}" for number, (index, _) in enumerate(own.worst, start=1)}
        titles |= dict.fromkeys(own.random, "random")
        columns, reports = {self.model: own}, [self._report(self.model, models, data, own, folder)]
        if self.compare_with is not None:
            compared = folder / COMPARED_FOLDER
            other = self._evaluate(models, self.compare_with, data, compared, {"keep": sorted(titles)})
            columns = {self.compare_with: other, self.model: own}
            reports.insert(0, self._report(self.compare_with, models, data, other, compared))
        self.broken += own.broken
        if self.is_main:
            self.reports += [report for report in reports if report is not None]
            if titles:
                draw_pictures(folder / PICTURES_FILE, columns, titles, data, self.colors)
        self.wait()

    def _evaluate(
        self, models: "Models", name: str, data: "SegmentationDataset", folder: Path, options: dict[str, Any]
    ) -> "Evaluation":
        from san_hf.evaluation.evaluator import evaluate

        progress = data.name if len(models) == 1 else f"{data.name}, {Path(name).name}"
        model, processor = models[name]
        return evaluate(
            model,
            processor,
            data,
            accelerator=self.accelerator,
            output=folder,
            progress=progress,
            vocabulary=self.vocabulary,
            **self.options,
            **options,
        )

    def _report(
        self, name: str, models: "Models", data: "SegmentationDataset", evaluation: "Evaluation", folder: Path
    ) -> "Report | None":
        from san_hf.evaluation.report import write_results

        if not self.is_main:
            return None
        settings = self.settings | {
            "templates": self.settings["templates"] or models[name][1].prompt_templates,
            "ignore_index": data.ignore_index,
        }
        if evaluation.broken:
            settings["left_out"] = evaluation.broken
        return write_results(folder, evaluation, model=name, dataset=data.name, split=data.split, settings=settings)


def load_data(sources: Sequence[str], split: str, reading_options: dict[str, Any]) -> "list[SegmentationDataset]":
    from san_hf.data import load_segmentation_dataset

    return [load_segmentation_dataset(source, split, **reading_options) for source in sources]


def load_models(names: Sequence[str], device: str, dtype: str, accelerator: "Accelerator | None") -> "Models":
    """Models by name, in evaluation mode, on their device."""
    import torch

    from san_hf.devices import pick_device
    from san_hf.hub import load_model

    where = accelerator.device if accelerator is not None else pick_device(device)
    models = {}
    for name in names:
        model, processor = load_model(name, getattr(torch, dtype))
        # Transformers' decorator of `to` hides its signature.
        models[name] = model.to(where).eval(), processor  # type: ignore[arg-type]
    return models


def find_datasets(sources: Sequence[str], root: Path | None) -> list[str]:
    """
    The data sets that are named: benchmarks by name are in `root`.

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
    if repeated := sorted({source for source in found if found.count(source) > 1}):
        raise ValueError(f"Got {join_some(repeated)} twice, expected each set once.")
    return found


def draw_pictures(
    file: Path,
    evaluations: "dict[str, Evaluation]",
    titles: dict[int, str],
    data: "SegmentationDataset",
    colors: dict[str, tuple[int, int, int]],
) -> None:
    """Writes the drawing of some examples with the predictions of each model."""
    from san_hf.evaluation.pictures import draw_kept
    from san_hf.files import new_file

    short = {name: Path(name).name for name in evaluations}
    if len(set(short.values())) < len(short):
        short = {name: name for name in evaluations}
    columns = {
        f"{short[name]}: mIoU {evaluation.metrics['mIoU']:.1f}": evaluation.examples
        for name, evaluation in evaluations.items()
    }
    examples = next(iter(columns.values()))
    full_titles = {index: f"{title}: {examples[index].name}" for index, title in titles.items()}
    own = next(iter(evaluations.values())).colors
    picture = draw_kept(columns, full_titles, data.class_names, data.ignore_index, {**own, **colors})
    with new_file(file) as opened:
        picture.save(opened, format="png")


def print_reports(reports: "Sequence[Report]", folders: Sequence[Path], per_class: bool) -> None:
    """The averages of each evaluation in one table, and on demand each one's classes."""
    from san_hf.evaluation.metrics import METRICS
    from san_hf.evaluation.tables import class_rows, console_table, percent

    console = table_console()
    if per_class:
        for report in reports:
            console.print(f"{report.model} on {report.dataset}", style="bold", markup=False, highlight=False)
            console.print(console_table(*class_rows(report)), crop=False)
    rows = [
        [report.dataset, report.model, f"{report.images:,}", *(percent(report.metrics[name]) for name in METRICS)]
        for report in reports
    ]
    console.print(console_table(["dataset", "model", "images", *METRICS], rows), crop=False)
    for folder in folders:
        console.print(f"Wrote {folder}", markup=False, highlight=False, soft_wrap=True)
