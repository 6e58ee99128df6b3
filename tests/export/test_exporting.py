"""Exported folders: complete and equal to the model, or not there at all."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from san_hf import from_pretrained
from san_hf.export import ExportError, export_model
from san_hf.export.targets import TARGETS
from san_hf.inference import Predictor
from san_hf.picture_book.measure import TEST_SEED
from san_hf.picture_book.objects import CLASS_NAMES
from san_hf.picture_book.scenes import draw_scene
from tests.export.conftest import NAMES, skip_without
from tests.tiny import relative_difference, segmenting_model


# Tracing takes half a minute of an idle processor.
pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow


class FakeRunner:
    """Runs what the fake target below has saved, in torch."""

    scale = 1.0
    graph = None

    def __init__(self, folder):
        assert (folder / "graph").is_file()

    def __call__(self, inputs, outputs):
        with torch.no_grad():
            results = self.graph(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return [results[name].numpy() * (1 if name == "labels" else self.scale) for name in outputs]


@pytest.fixture
def fake(monkeypatch):
    """A target that exports nothing and costs nothing: what surrounds a target is the same for all."""

    def export(form, inputs, shapes):
        FakeRunner.graph = form
        return form

    def save(program, folder, description):
        (folder / "graph").write_text(description)

    target = SimpleNamespace(
        EXTRA=None, PACKAGES=(), EXPORTER="json", export=export, save=save, Runner=FakeRunner, GRAPH="graph"
    )
    monkeypatch.setitem(TARGETS, "fake", target)
    monkeypatch.setattr(FakeRunner, "scale", 1.0)
    return target


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_graph_that_differs_is_not_written(model, processor, vocabulary, fake, tmp_path, monkeypatch):
    """Catches a graph of other numbers that is written, or leaves files."""
    facts = export_model(model, processor, tmp_path / "same", target="fake")
    assert facts["verification"]["largest_difference"] < 1e-5
    assert {"graph", "san_hf.json", "text.safetensors", "config.json"} < set(left_behind(tmp_path / "same"))
    monkeypatch.setattr(FakeRunner, "scale", 1.002)
    for form, difference in (("open", "2.0e-03"), ("closed", ".*")):
        with pytest.raises(ExportError, match=f"isn't the model: .* differ by {difference}"):
            export_model(model, processor, tmp_path / "out", target="fake", form=form, vocabulary=vocabulary)
    monkeypatch.setattr(FakeRunner, "scale", float("nan"))
    with pytest.raises(ExportError, match="differ by nan"):
        export_model(model, processor, tmp_path / "same", target="fake", overwrite=True)
    assert left_behind(tmp_path) == ["same"]
    assert json.loads((tmp_path / "same" / "san_hf.json").read_text()) == facts


def test_labels_are_compared(model, processor, vocabulary, fake, tmp_path, monkeypatch):
    """Catches label maps that nobody looks at: of a closed graph whose logits are right."""
    run = FakeRunner.__call__
    monkeypatch.setattr(
        FakeRunner, "__call__", lambda self, inputs, outputs: [run(self, inputs, ["logits"])[0], labels(self, inputs)]
    )

    def labels(self, inputs):
        right = run(self, inputs, ["labels"])[0]
        right[:, 3, 5] = (right[:, 3, 5] + 1) % len(NAMES)
        return right

    with pytest.raises(ExportError, match="of its labels for pixel_values 1x3x32x32 are others"):
        export_model(
            model, processor, tmp_path / "x", target="fake", form="closed", vocabulary=vocabulary, label_maps=True
        )
    assert not left_behind(tmp_path)


def test_an_interrupted_export_leaves_nothing(model, processor, fake, tmp_path):
    """Catches half a folder, a model that has lost its text tower, or its training mode."""

    def interrupted(form, inputs, shapes):
        raise KeyboardInterrupt

    fake.export = interrupted
    model.train()
    with pytest.raises(KeyboardInterrupt):
        export_model(model, processor, tmp_path / "out", target="fake")
    assert not left_behind(tmp_path) and model.training
    model.eval()
    assert Predictor(model, processor).vocabulary(NAMES).class_names == tuple(NAMES)


def test_the_closed_form_has_the_labels_of_post_processing(model, processor, fake, images, tmp_path):
    """Catches an "other" of an expansion that is left out, and label maps that post-processing doesn't give."""
    vocabulary = Predictor(model, processor).vocabulary(NAMES[:2], expand=NAMES[2:])
    facts = export_model(
        model, processor, tmp_path / "x", target="fake", form="closed", vocabulary=vocabulary, label_maps=True
    )
    assert facts["class_names"] == [*NAMES[:2], "other"] and facts["outputs"] == ["logits", "labels"]
    image = images[1].resize((96, 64))  # neither resized nor padded
    pixels = processor(images=image)["pixel_values"].numpy()
    logits, labels = FakeRunner(tmp_path / "x")({"pixel_values": pixels}, ["logits", "labels"])
    (expected,) = Predictor(model, processor)([image], vocabulary)
    assert logits.shape == (1, 3, 8, 12) and len(expected.unique()) > 1
    assert (labels[0] != expected.numpy()).mean() < 0.005


def test_what_is_refused(model, processor, vocabulary, fake, tmp_path, images, monkeypatch):
    """Catches what would be exported wrongly, and errors that say nothing."""

    def refused(match, error=ExportError, with_model=model, **options):
        with pytest.raises(error, match=match):
            export_model(with_model, processor, tmp_path / "out", **{"target": "fake", **options})
        assert "out" not in left_behind(tmp_path)

    refused("Got the target 'coreml', expected one of onnx, openvino, torch", target="coreml")
    refused("Got the form 'half', expected open or closed", form="half")
    refused("this model carries none", form="closed")
    refused("for the closed form", label_maps=True)
    synonyms = Predictor(model, processor).vocabulary(["cat, kitten", "sky"], synonyms=True)
    refused("one embedding for each class", form="closed", vocabulary=synonyms)
    refused("torch.bfloat16 on cpu, expected torch.float32", with_model=segmenting_model().bfloat16())
    refused("images without int8", images=images, vocabulary=vocabulary)
    refused("Got int8='all', expected one of weights, activations", int8="all")
    refused("has no 8 bits", int8="weights")
    refused("Labels of images need classes", int8="weights", images=images)
    monkeypatch.setattr("san_hf.export.targets.find_spec", lambda name: None)
    refused(r"needs onnx, onnxscript, onnxruntime, not installed here: pip install 'san_hf\[onnx\]'", target="onnx")
    refused("has no exporter for the target 'torch'", target="torch")


def test_what_is_there_already(model, processor, fake, tmp_path):
    """Catches a folder that is lost without having been asked for."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for overwrite, match in ((False, "exists already"), (True, "isn't an exported folder")):
        with pytest.raises(FileExistsError, match=match):
            export_model(model, processor, tmp_path / "other", target="fake", overwrite=overwrite)
    for overwrite in (False, True):
        export_model(model, processor, tmp_path / "mine", target="fake", overwrite=overwrite)
    assert left_behind(tmp_path / "other") == ["file"]


@pytest.mark.parametrize(
    ("target", "form"),
    [
        ("openvino", "open"),
        pytest.param("onnx", "open", marks=slow),
        pytest.param("openvino", "closed", marks=slow),
        pytest.param("torch", "open", marks=slow),
        pytest.param("torch", "closed", marks=slow),
    ],
)
def test_graphs_of_any_size(target, form, exported, model, vocabulary):
    """Catches a graph of fixed sizes, numbers or classes; beyond the sizes that the export itself compares."""
    folder = exported(target, form)
    run = TARGETS[target].Runner(folder)
    for batch, height, width, classes in ((1, 40, 136, 4), (4, 96, 48, 9)):
        inputs = {"pixel_values": torch.randn(batch, 3, height, width)}
        embeds = vocabulary.class_embeds
        if form == "open":
            inputs["class_embeds"] = embeds = torch.nn.functional.normalize(torch.randn(classes, 16), dim=-1)
        with torch.inference_mode():
            outputs = model(inputs["pixel_values"], class_embeds=embeds)
        names = ["masks_queries_logits", "class_queries_logits", "mask_embeds"] if form == "open" else ["logits"]
        for name, got in zip(names, run({name: value.numpy() for name, value in inputs.items()}, names)):
            expected = getattr(outputs, name)
            if name == "logits":
                got, expected = np.exp(got), expected.exp()  # scores, of which the smallest decide nothing
            assert relative_difference(torch.from_numpy(got), expected) < 1e-3
    facts = json.loads((folder / "san_hf.json").read_text())
    inside = graph_description(target, folder)
    assert facts["class_names"] == NAMES and facts["target"] == target and facts["form"] == form
    assert inside == {name: fact for name, fact in facts.items() if name != "verification"}


def graph_description(target, folder):
    if target == "onnx":
        import onnx

        (entry,) = [entry for entry in onnx.load(folder / "model.onnx").metadata_props if entry.key == "san_hf"]
        return json.loads(entry.value)
    if target == "openvino":
        from san_hf.export.to_openvino import get_core

        return json.loads(get_core().read_model(folder / "openvino_model.xml").get_rt_info(["san_hf"]).astype(str))
    files = {"san_hf": ""}
    torch.export.load(folder / "model.pt2", extra_files=files)
    return json.loads(files["san_hf"])


@slow
def test_lora_and_the_active_side_adapter(processor, vocabulary, tmp_path):
    """Catches LoRA that is left out or stays merged, and a side adapter that isn't the one in use."""
    skip_without("torch")
    model = segmenting_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model.eval()(pixels, class_embeds=vocabulary.class_embeds).class_queries_logits
        without = segmenting_model()(pixels, class_embeds=vocabulary.class_embeds).class_queries_logits
    assert relative_difference(without, before) > 0.01
    facts = export_model(model, processor, tmp_path / "x", target="torch")
    assert facts["side_adapter"] == "default"
    with torch.inference_mode():
        after = model(pixels, class_embeds=vocabulary.class_embeds).class_queries_logits
    assert torch.equal(before, after) or relative_difference(after, before) < 1e-4
    names = ["class_queries_logits"]
    inputs = {"pixel_values": pixels.numpy(), "class_embeds": vocabulary.class_embeds.numpy()}
    (got,) = TARGETS["torch"].Runner(tmp_path / "x")(inputs, names)
    assert relative_difference(torch.from_numpy(got), before) < 1e-3


@slow
@pytest.mark.parametrize(
    ("target", "kind", "form", "lowest"),
    [
        ("openvino", "weights", "open", 0.98),
        ("openvino", "activations", "closed", 0.9),
        ("onnx", "weights", "closed", 0.98),
        ("onnx", "activations", "open", 0.9),
    ],
)
def test_8_bits(target, kind, form, lowest, tmp_path):
    """Catches 8 bits that aren't, that lose the labels, or whose agreement is of the images that were calibrated on."""
    skip_without(target)
    for package in TARGETS[target].INT8_PACKAGES:
        pytest.importorskip(package, reason=f"needs {package}")
    model, processor = from_pretrained("picture-book")
    vocabulary = Predictor(model, processor).vocabulary(list(CLASS_NAMES))
    pages = [draw_scene([TEST_SEED, page]).image for page in range(12)]
    facts = export_model(
        model, processor, tmp_path / "x", target=target, form=form, vocabulary=vocabulary, int8=kind, images=pages
    )
    kept = facts["agreement"]
    assert kept["images"] == (len(pages) // 2 if (target, kind) == ("openvino", "activations") else len(pages))
    assert lowest < kept["mean"] < 1 and kept["worst"] <= kept["mean"]
    assert facts["precision"] == f"int8 {kind}" == graph_description(target, tmp_path / "x")["precision"]
    pixels = processor(images=pages[0])["pixel_values"]
    inputs = {"pixel_values": pixels.numpy()}
    if form == "open":
        inputs["class_embeds"] = vocabulary.class_embeds.numpy()
    name = facts["outputs"][0]
    (got,) = TARGETS[target].Runner(tmp_path / "x")(inputs, [name])
    with torch.inference_mode():
        expected = getattr(model(pixels, class_embeds=vocabulary.class_embeds), name)
    if form == "closed":
        got, expected = np.exp(got), expected.exp()  # scores, of which the smallest decide nothing
    assert 1e-5 < relative_difference(torch.from_numpy(got), expected) < 0.3
