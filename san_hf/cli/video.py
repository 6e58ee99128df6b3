"""`san-hf video`."""

from collections.abc import Iterator
from enum import Enum
from fractions import Fraction
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from san_hf.ahead import run_ahead
from san_hf.cli.console import explain, fail, show, show_error
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
from san_hf.cli.segment import load_segmenter, make_folder, print_legend, show_notes
from san_hf.cli.segment_journal import image_facts, model_facts
from san_hf.cli.segment_options import ClassesFileOption, ClassesOption, OtherOption, RuntimeOption
from san_hf.cli.video_parts import PART_FRAMES, VideoParts
from san_hf.cli.vocabulary_options import (
    class_facts,
    class_names_of_options,
    colors_of_options,
    expansion_of_option,
    templates_of_options,
)
from san_hf.files import json_text
from san_hf.hub.names import EMBEDDED_MODEL
from san_hf.messages import printable
from san_hf.paths import expand_path, folder_name
from san_hf.progress import progress_bar


if TYPE_CHECKING:
    from san_hf.inference import FrameSegmenter, Segmentation, Segmenter
    from san_hf.video import Frame, Frames


class Format(str, Enum):
    """What can be written of a video."""

    overlay = "overlay"
    mask = "mask"
    png_labels = "png-labels"
    json = "json"


def video(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help='A video file; or an image sequence: a folder, or a pattern in quotes, "shots/*.png".',
        ),
    ],
    classes: ClassesOption = None,
    classes_file: ClassesFileOption = None,
    model: ModelOption = EMBEDDED_MODEL,
    smooth: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="WEIGHT",
            help="Against flicker: how much the class scores of each earlier frame count in the average of which a "
            "label is chosen, compared with the next one's. 0.5 calms most of it. Nothing is carried over a cut.",
        ),
    ] = 0.0,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Segment every N-th frame only.")] = 1,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="FPS",
            show_default=False,
            help="Frames per second of an image sequence: its overlays become a video. Without, they stay images.",
        ),
    ] = None,
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
            help="What to write; may be repeated. overlay: the video, tinted, with a legend. mask: the regions in "
            "plain colours. png-labels: an image for each frame, one number per pixel, and the json that explains "
            "them. json: names, shares of pixels and colours, and a line for each frame.",
        ),
    ] = [Format.overlay],  # noqa: B006  # not changed
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was stopped, after the last whole part.")
    ] = False,
    templates: TemplatesOption = None,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = None,
    dtype: PrecisionOption = Precision.float32,
) -> None:
    """
    Segment a video, or a sequence of images, by class names in plain words.

    For example: `san-hf video street.mp4 --classes "car, road, sky" --model san-vit-b-16 --smooth 0.5`

    Sound is left out. Times of frames, also irregular ones, are kept.

    Ends with status 0 if all of it was segmented, 1 if the video breaks off before its end, 2 if nothing was done.
    """
    class_names = class_names_of_options(classes, classes_file)
    given_colors = colors_of_options(colors)
    options: dict[str, Any] = {
        "expand": expansion_of_option(expand),
        "templates": templates_of_options(templates),
        "threshold": threshold,
        "other": other,
        "synonyms": synonyms,
        "average_synonyms": average_synonyms,
    }
    wanted = sorted({choice.value for choice in formats})
    settings = {"the model": model_facts(expand_path(model)), "the class names": class_facts(class_names), **options}
    settings |= {"the formats": wanted, "the dtype": dtype.value, "the colours": given_colors}
    settings |= {"smooth": smooth, "every": every, "fps": fps}
    if runtime is not None:
        options["runtime"] = settings["the runtime"] = runtime.value
    parts = open_parts(expand_path(source), output, fps, wanted, settings)
    existing = parts.existing()
    if existing and not (overwrite or resume):
        fail(
            f"'{printable(existing[0])}' exists already, of an earlier run. Use --resume to go on with it, --overwrite "
            "to replace what it wrote, or another --output."
        )
    make_folder(output)
    with parts.open(resume) as done:
        if done is None:
            show(f"All of '{printable(source)}' is done already.")
            return
        if done:
            show(f"{done * PART_FRAMES} frames are done already.")
        from san_hf.inference import FrameSegmenter
        from san_hf.visualization import MAX_FRAME_LEGEND

        where = {**options, "colors": given_colors}
        segmenter = FrameSegmenter(load_segmenter(model, class_names, device, dtype.value, where), smooth)
        show_notes(segmenter.segmenter, model, wanted)
        if "overlay" in wanted and len(segmenter.segmenter.class_names) > MAX_FRAME_LEGEND:
            show(f"No legend in the overlay of more than {MAX_FRAME_LEGEND} classes: --format json has their colours.")
        with parts.begin(resume):
            segment_parts(parts, done, segmenter, every, {"video": printable(source), "model": model})


def open_parts(
    source: str, output: Path, fps: float | None, formats: list[str], settings: dict[str, Any]
) -> VideoParts:
    """The video's frames, and what its results are called."""
    from san_hf.video import open_frames, pyav_version

    frames = open_frames(source, None if fps is None else Fraction(fps).limit_denominator(1001), exclude=output)
    path = Path(source)
    if not path.is_file():
        path = (path if path.is_dir() else path.parent).resolve()
    name = folder_name(path.stem if path.is_file() else path.name)
    facts = json_text([image_facts(file) for file in frames.files])
    settings = {**settings, "the source": facts if path.is_file() else sha256(facts.encode("utf-8")).hexdigest()}
    if frames.rate is not None and {"overlay", "mask"} & {*formats}:
        # Parts that another encoder wrote can't be joined.
        settings["PyAV's version"] = pyav_version()
    return VideoParts(frames, output / name, formats, settings)


def segment_parts(parts: VideoParts, done: int, segmenter: "FrameSegmenter", every: int, facts: dict[str, Any]) -> None:
    """Segments what follows the parts that are done, and makes the results."""
    from san_hf.images import ImageError
    from san_hf.video import VideoError

    number, broken = done, None
    with progress_bar() as bar:
        total = -(-parts.frames.count // every) or None
        task = bar.add_task("Segmenting", total=total, completed=done * PART_FRAMES, speed="")

        def until_error() -> "Iterator[tuple[Frame, Segmentation]]":
            """What can't be read is the end."""
            nonlocal broken
            try:
                for segmented in segment_from(parts.frames, done * PART_FRAMES, segmenter, every):
                    yield segmented
                    bar.advance(task)
            except (VideoError, ImageError) as error:
                broken = error

        segmented = until_error()
        try:
            while broken is None and (first := list(islice(segmented, 1))):
                parts.write(number, chain(first, islice(segmented, PART_FRAMES - 1)))
                if broken is None:
                    parts.note(number)
                number += 1
        except VideoError as error:  # of what is written
            broken = error
        except KeyboardInterrupt:
            bar.stop()
            show(
                f"Interrupted: {number * PART_FRAMES} frames are done. The same command with --resume goes on.",
                error=True,
            )
            raise typer.Exit(130) from None
    if broken is not None:
        show_error(broken, explain(broken))
    if number:
        count, legend = parts.join(number, blank_legend(segmenter.segmenter), facts)
        if broken is None:
            parts.finish(number)
        for path in (*parts.files, *parts.folders.values()):
            show(f"{count} frame{'s' if count != 1 else ''} -> {printable(path)}")
        print_legend(legend, short=False)
    elif broken is None:
        fail("There is no frame to segment.")
    if broken is not None:
        raise typer.Exit(1 if number else 2)


def segment_from(
    frames: "Frames", first: int, segmenter: "FrameSegmenter", every: int
) -> "Iterator[tuple[Frame, Segmentation]]":
    """
    The segmentations of every n-th frame from the `first` of these on, as if all before had been segmented, too. While
    the model is at work on one, the next is converted.
    """
    begin = max(0, first - segmenter.carried_frames)
    wanted = islice(frames, begin * every, None, every)
    loaded = run_ahead(lambda frame: segmenter.segmenter.load(frame.image), wanted, 1)
    for index, (frame, future) in enumerate(loaded, begin):
        if index < first:
            segmenter.pass_over(future.result())
        else:
            yield frame, segmenter(future.result())


def blank_legend(segmenter: "Segmenter") -> list[dict[str, Any]]:
    """All classes with their colours."""
    import torch
    from PIL import Image

    from san_hf.inference.segmenter import as_segmentation
    from san_hf.modeling.label_maps_san import LabelledPixels

    pixels = LabelledPixels(torch.zeros(1, 1, dtype=torch.uint8))
    return as_segmentation(Image.new("RGB", (1, 1)), pixels, segmenter.vocabulary, segmenter.colors).legend()
