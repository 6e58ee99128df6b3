"""`san-hf export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from san_hf.cli.console import fail, quiet_libraries, show
from san_hf.cli.options import ExpandOption, OverwriteOption, TemplatesOption
from san_hf.cli.segment_options import ClassesFileOption, ClassesOption
from san_hf.cli.vocabulary_options import class_names_of_options, expansion_of_option, templates_of_options
from san_hf.messages import join_some, printable
from san_hf.paths import expand_path, list_images


class Target(str, Enum):
    """What a model can be exported to."""

    onnx = "onnx"
    openvino = "openvino"
    torch = "torch"


class Form(str, Enum):
    """What an exported graph takes and gives."""

    open = "open"
    closed = "closed"


class Int8(str, Enum):
    """What becomes integers of 8 bits."""

    weights = "weights"
    activations = "activations"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", show_default=False, help="A folder, a released model or a repository, as in segment."
        ),
    ],
    to: Annotated[Target, typer.Option("--to", show_default=False, help="What to export to.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", show_default=False, help="The folder to write.")
    ],
    form: Annotated[
        Form,
        typer.Option(
            help="open: the graph is given embeddings of any classes, and gives masks and their classes. closed: it "
            "has the classes inside, and gives scores of pixels."
        ),
    ] = Form.open,
    classes: ClassesOption = None,
    classes_file: ClassesFileOption = None,
    expand: ExpandOption = None,
    templates: TemplatesOption = None,
    label_maps: Annotated[
        bool, typer.Option("--label-maps", help="With --form closed: give label maps at the input's size, too.")
    ] = False,
    int8: Annotated[
        Int8 | None,
        typer.Option(
            show_default=False,
            help="Not with --to torch: 8 bits, for weights alone, or for weights and activations. How many labels stay "
            "is printed.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="With --int8: a few images of the kind to expect, on which labels are compared with those of float32. "
            "To OpenVINO, every second one for activations shows the ranges of values instead.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Export a model as a graph for another runtime, and compare it with the model on the spot.

    For example: `san-hf export san-vit-b-16 --to openvino --output san-openvino`

    One vocabulary: `san-hf export san-vit-b-16 --to onnx --form closed --classes voc --label-maps --output san-voc`
    """
    class_names = class_names_of_options(classes, classes_file)
    options: dict[str, Any] = {"expand": expansion_of_option(expand), "templates": templates_of_options(templates)}
    if class_names is None and any(options.values()):
        fail("--expand and --templates are for class names that --classes gives.")
    import torch

    from san_hf.export import export_model
    from san_hf.export.exporting import check_output
    from san_hf.export.targets import find_target
    from san_hf.hub.load import load_model
    from san_hf.images import load_image
    from san_hf.inference import Predictor

    quiet_libraries()
    find_target(to.value)
    check_output(output.resolve(), overwrite)
    pictures = [load_image(path) for path in list_images(images).files] if images is not None else []
    if images is not None and not pictures:
        fail(f"There is no image in the folder '{printable(images)}'.")
    loaded, processor = load_model(expand_path(model), torch.float32)
    vocabulary = None
    if class_names is not None:
        vocabulary = Predictor(loaded, processor).vocabulary(class_names, **options)
    facts = export_model(
        loaded,
        processor,
        output,
        target=to.value,
        form=form.value,
        vocabulary=vocabulary,
        label_maps=label_maps,
        int8=None if int8 is None else int8.value,
        images=pictures,
        overwrite=overwrite,
    )
    show(f"Wrote {printable(output)}: {facts['form']}, {facts['target']}, {facts['precision']}")
    if facts["class_names"]:
        show(f"Classes: {printable(join_some(facts['class_names'], 10))}")
    checked = facts["verification"]
    show(
        f"Verified in float32 on {len(checked['inputs'])} batches: largest difference "
        f"{checked['largest_difference']:.1e} of the largest value, labels alike."
    )
    if kept := facts.get("agreement"):
        show(
            f"Of 8 bits: the same label as in float32 for {kept['mean']:.1%} of pixels, {kept['worst']:.1%} in the "
            f"worst of {kept['images']} images."
        )
    elif int8 is not None:
        show("How many labels 8 bits keep was not measured: give --images.")
