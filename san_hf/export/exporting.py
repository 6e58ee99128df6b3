"""A model becomes a folder that other runtimes take: a graph, verified on the spot, and what belongs to it."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from san_hf.files import check_replaceable, json_text, new_folder, write_file
from san_hf.hub.names import EXPORT_FILE
from san_hf.inference.predictor import evaluation_mode
from san_hf.inference.vocabulary import Vocabulary
from san_hf.messages import one_line
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor

from .description import TEXT_FILE, TEXT_PARTS, VOCABULARY_FILE, describe
from .errors import ExportError
from .forms import ClosedForm, OpenForm, sample_inputs, traceable
from .targets import TARGETS, find_target, require
from .verification import Reference, Tensors, agreement, graph_inputs, to_arrays, verify


INT8 = ("weights", "activations")
# By these, openvino-telemetry and NNCF know that nobody is there to be asked.
NO_STATISTICS = {"CI": "true", "NNCF_CI": "1"}


def export_model(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    output: str | Path,
    *,
    target: str,
    form: str = "open",
    vocabulary: Vocabulary | None = None,
    label_maps: bool = False,
    int8: str | None = None,
    images: Sequence[Image.Image] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Exports a model by Transformers' exporters, and compares the result with it over several sizes and batches.

    The folder appears only when the graph is equal to the model. It holds the graph, `san_hf.json`, which says what it
    takes and gives, the processor, and in the open form the text tower and the embeddings of the vocabulary, if any.
    Of several side adapters the active one is exported; LoRA is merged.

    Args:
        model: in float32, on the CPU.
        processor: the model's.
        output: the folder to write.
        target: "onnx", "openvino" or "torch".
        form: "open", which takes `pixel_values` and `class_embeds` and gives the logits of masks and classes; or
            "closed", for one vocabulary, which takes `pixel_values` and gives the logits of a label map.
        vocabulary: of this model; by default the one that it carries, if any. The closed form needs one, without
            synonyms and threshold.
        label_maps: whether the closed form gives label maps, too, at the input's size.
        int8: 8 bits for the "weights" alone, or for weights and "activations".
        images: upright RGB images for `int8`, which show how many labels stay. To OpenVINO, every second one of those
            for activations shows the ranges of values instead.
        overwrite: whether `output` may be an exported folder already, which is then replaced.

    Returns:
        What `san_hf.json` says: with the largest difference under "verification", and under "agreement" the share of
        labels that 8 bits keep.

    Raises:
        ExportError: an unknown target, form or kind of 8 bits; something isn't installed; a model in half precision; no
            vocabulary, or one that the closed form can't have; the graph isn't equal to the model.
        FileExistsError: `output` is there already.
        OSError: it can't be written. What was there before is unchanged.
    """
    exporter = find_target(target)
    check_model(model)
    output = Path(output).resolve()
    check_output(output, overwrite)
    if vocabulary is None and model.config.vocabulary_size:
        vocabulary = Vocabulary.of_model(model)
    graph = build_form(model, form, vocabulary, label_maps)
    reference = Reference(graph, model, processor, vocabulary)
    samples = [graph_sample(image, reference) for image in images]
    calibrating, measuring = split_samples(samples, int8, target)
    facts = describe(model, processor, target, graph, vocabulary)
    with evaluation_mode(model), new_folder(output) as folder:
        inputs, shapes = sample_inputs(graph, model.config)
        with quiet_exporters(), traceable(model):
            try:
                program = exporter.export(graph, inputs, shapes)
            except Exception as error:  # of tracing and converting, which fail in ways of their own
                raise ExportError(f"This model can't be exported to {target}: {one_line(error)}.") from error
            exporter.save(program, folder, json_text(facts))
        del program
        facts["verification"] = verify(exporter.Runner(folder), reference)
        if int8 is not None:
            facts["precision"] = f"int8 {int8}"
            ranges = [to_arrays(graph_inputs(sample)) for sample in calibrating]
            with quiet_exporters():
                exporter.quantize(folder, int8, ranges, json_text(facts))
            if measuring:
                facts["agreement"] = agreement(exporter.Runner(folder), reference, measuring)
        write_file(folder / EXPORT_FILE, json_text(facts, indent=2) + "\n")
        if vocabulary is not None:
            vocabulary.save(folder / VOCABULARY_FILE)
        if form == OpenForm.name:
            save_text(model, processor, folder)
    return facts


def check_model(model: SANForSemanticSegmentation) -> None:
    """
    Raises:
        ExportError: it isn't in float32 on the CPU.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ExportError(
            f"Got a model in {model.dtype} on {model.device}, expected torch.float32 on the CPU: load it with "
            "dtype=torch.float32. Runtimes choose their own precision; int8 makes the graph smaller."
        )


def check_output(output: Path, overwrite: bool) -> None:
    """
    Raises:
        FileExistsError: something is there that is not to be replaced.
    """
    check_replaceable(output, overwrite, EXPORT_FILE, "an exported folder")


def build_form(
    model: SANForSemanticSegmentation, name: str, vocabulary: Vocabulary | None, label_maps: bool
) -> OpenForm | ClosedForm:
    """
    Raises:
        ExportError: an unknown form, or one that this vocabulary, or none, has no place in.
    """
    if name not in (OpenForm.name, ClosedForm.name):
        raise ExportError(f"Got the form {name!r:.40}, expected {OpenForm.name} or {ClosedForm.name}.")
    if name == OpenForm.name:
        if label_maps:
            raise ExportError("Label maps are for the closed form: which labels there are, an open graph doesn't know.")
        return OpenForm(model)
    if vocabulary is None:
        raise ExportError("The closed form is for one vocabulary, and this model carries none: name the classes.")
    if vocabulary.class_of_row is not None or vocabulary.threshold is not None:
        raise ExportError(
            "The closed form has one embedding for each class and no threshold: leave out synonyms (average them) and "
            "threshold, or export the open form."
        )
    return ClosedForm(model, vocabulary.class_embeds, vocabulary.num_labels, label_maps)


def graph_sample(image: Image.Image, reference: Reference) -> dict[str, torch.Tensor]:
    """A graph's inputs for an image, and `image_sizes`."""
    sample = dict(reference.processor(images=image))
    if isinstance(reference.form, OpenForm):
        if reference.vocabulary is None:
            raise ExportError("Labels of images need classes: name them, or leave out the images.")
        sample["class_embeds"] = reference.vocabulary.class_embeds
    return sample


def split_samples(
    samples: Sequence[Tensors], int8: str | None, target: str
) -> tuple[Sequence[Tensors], Sequence[Tensors]]:
    """
    What the ranges of values are taken from, and what labels are compared on.

    Raises:
        ExportError: an unknown kind of 8 bits, a target without, or no images for activations.
    """
    if int8 is None:
        if samples:
            raise ExportError("Got images without int8, expected both or none.")
        return [], []
    if int8 not in INT8:
        raise ExportError(f"Got int8={int8!r:.40}, expected one of {', '.join(INT8)}.")
    exporter = TARGETS[target]
    if not hasattr(exporter, "quantize"):
        raise ExportError(f"The target {target!r} has no 8 bits: expected onnx or openvino.")
    require(exporter.INT8_PACKAGES, exporter.EXTRA, "8 bits")
    if int8 == "weights" or not exporter.RANGES_FROM_IMAGES:
        return [], samples
    if len(samples) < 2:
        raise ExportError(f"Got {len(samples)} images for activations of 8 bits, expected at least 2.")
    return samples[::2], samples[1::2]


def save_text(model: SANForSemanticSegmentation, processor: SANProcessor, folder: Path) -> None:
    """The rest of the model, for new class names: processor, text tower, temperature and no-object embedding."""
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):  # Transformers copies it; what reads an exported folder has it
        code.unlink()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TEXT_PARTS)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TEXT_FILE)
    model.config.save_pretrained(folder)


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """
    Without what torch, Transformers and NNCF print while they trace (versions, progress, their own deprecations), and
    without the statistics of use that OpenVINO and NNCF would send.
    """
    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    environment = {name: os.environ.get(name) for name in NO_STATISTICS}
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    os.environ.update(NO_STATISTICS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logging.disable(disabled)
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
