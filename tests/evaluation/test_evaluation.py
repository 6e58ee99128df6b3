"""Evaluation of the embedded checkpoint on drawn scenes: its metrics, its files, and what goes wrong."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.colors import OTHER_COLOR, name_colors
from san_hf.data import DataError, SegmentationDataset, load_segmentation_dataset
from san_hf.evaluation import evaluator
from san_hf.evaluation.evaluator import EvaluationError, draw_examples, evaluate
from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.evaluation.predictions import PredictionWriter, category_ids, encode_predictions, merge_predictions
from san_hf.hub import from_pretrained
from san_hf.inference import Predictor, Segmenter, Vocabulary
from san_hf.inference.predictor import AUGMENTATION_SCALES
from san_hf.inference.vocabulary import split_synonyms
from san_hf.locks import locked
from san_hf.picture_book.objects import CLASS_NAMES
from san_hf.picture_book.scenes import draw_scene
from san_hf.visualization import (
    COMPARISON_SIZE,
    ERROR_COLOR,
    UNLABELLED_COLOR,
    Comparison,
    draw_comparisons,
)
from san_hf.vocabularies import load_class_ids, load_vocabulary
from tests.forks import Run


ROOT = Path(__file__).parents[2]
NUM_IMAGES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven scenes of three sizes, with unlabelled pixels, the names of the classes in another order."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    (folder / "validation" / "images").mkdir(parents=True)
    (folder / "validation" / "labels").mkdir()
    for index in range(NUM_IMAGES):
        scene = draw_scene(index, [(96, 64), (64, 96), (64, 64)][index % 3])
        label_map = len(CLASS_NAMES) - 1 - scene.label_map
        label_map[:5] = 255
        scene.image.save(folder / "validation" / "images" / f"{index:012}.png")
        Image.fromarray(label_map).save(folder / "validation" / "labels" / f"{index:012}.png")
    (folder / "classes.txt").write_text("\n".join(CLASS_NAMES[::-1]))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return load_segmentation_dataset(folder, "validation")


@pytest.fixture(scope="module")
def loaded():
    return from_pretrained("picture-book")


@pytest.fixture(scope="module")
def expected(loaded, data):
    """What a single process finds."""
    return evaluate(*loaded, data, workers=0, worst=2)


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    """Runs `san-hf evaluate` on the scenes: never with a stack trace."""

    def run(*arguments, dataset=folder, status=0):
        arguments = ["evaluate", "-d", str(dataset), "--device", "cpu", *map(str, arguments)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return run


def assert_same(got, expected):
    """Every count of pixels, hence every figure."""
    assert got.num_images == expected.num_images
    assert repr(got.per_class) == repr(expected.per_class)  # nan is nan
    assert got.metrics == expected.metrics
    assert got.worst == expected.worst


def test_figures_are_those_of_the_label_maps(loaded, data, expected):
    """Catches other preprocessing, class names, sizes or pixels than those of `segment` and of the data set."""
    segmenter = Segmenter(*loaded, data.class_names)
    metrics = ConfusionMatrixMetrics(len(data.class_names), 255)
    scores = []
    for image, label_map, _ in data:
        prediction = segmenter(image).label_map
        metrics.update(prediction, label_map)
        alone = ConfusionMatrixMetrics(len(data.class_names), 255)
        alone.update(prediction, label_map)
        scores.append(alone.compute().metrics["mIoU"])
    by_hand = metrics.compute(data.class_names)
    assert repr(expected.per_class) == repr(by_hand.per_class)
    assert expected.metrics == by_hand.metrics
    assert by_hand.metrics["pACC"] > 50, "the checkpoint isn't at work"
    order = sorted(range(NUM_IMAGES), key=lambda index: scores[index])
    assert expected.worst == [(index, scores[index]) for index in order[:2]]


def test_a_vocabulary_file(loaded, data, expected, command, folder, tmp_path):
    """Catches a file whose embeddings aren't used, names in another order, and colours that get lost."""
    vocabulary = Vocabulary.encode(*loaded, data.class_names, colors={data.class_names[0]: "lime"})
    vocabulary.save(tmp_path / "names.safetensors")
    got = evaluate(*loaded, data, vocabulary=tmp_path / "names.safetensors", workers=0, worst=2)
    assert_same(got, expected)
    assert got.colors == {data.class_names[0]: (0, 255, 0)}
    turned = Vocabulary.encode(*loaded, data.class_names[::-1])
    with pytest.raises(ValueError, match="expected the vocabulary of the data's class names, in their order"):
        evaluate(*loaded, data, vocabulary=turned)
    with pytest.raises(ValueError, match="Only class names that are given"):
        evaluate(*loaded, data, vocabulary=vocabulary, synonyms=True)
    lost = evaluate(*loaded, data, threshold=1.0, limit=2, workers=0)
    assert lost.metrics["pACC"] < evaluate(*loaded, data, limit=2, workers=0).metrics["pACC"]

    (tmp_path / "set").mkdir()
    shutil.copytree(folder / "validation", tmp_path / "set" / "validation")
    command(
        *("--classes", tmp_path / "names.safetensors", "-o", tmp_path / "out", "--limit", 2, "--pictures", 1),
        *("--colors", "sky=skyblue"),
        dataset=tmp_path / "set",
    )
    (results,) = (tmp_path / "out").rglob("results.json")
    assert json.loads(results.read_text())["settings"]["vocabulary"] == "names.safetensors"


def test_training_goes_on(loaded, data, expected):
    """Catches an evaluation in training mode, and training that goes on in evaluation mode or without frozen parts."""
    model, processor = loaded
    model.train()
    model.text_model.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    try:
        got = evaluate(model, processor, data, limit=2)
        assert {name: module.training for name, module in model.named_modules()} == before
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert got.num_images == 2
    assert_same(got, evaluate(model, processor, data, limit=2))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_change_nothing(loaded, data, expected, batch_size):
    """Catches images padded to the size of others, and images of a last, smaller batch that are lost."""
    got = evaluate(*loaded, data, batch_size=batch_size, workers=1, worst=2)
    assert got.num_images == NUM_IMAGES
    for row, other in zip(got.per_class, expected.per_class):
        # A sum of floats may differ in its last digit, and a pixel for that.
        assert row["predicted"] == pytest.approx(other["predicted"], abs=2)


def test_streamed(loaded, folder, expected):
    """Catches streamed data of which rows are skipped."""
    streamed = load_segmentation_dataset(folder, "validation", streaming=True)
    assert_same(evaluate(*loaded, streamed, worst=2), expected)
    assert evaluate(*loaded, streamed, limit=3).num_images == 3


def launch(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # The CPU is found where there is nothing else; what is set for Accelerate is not for the figures.
    command += ["-m", "san_hf.cli", "evaluate", *map(str, arguments)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_MIXED_PRECISION": "bf16"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, timeout=250)


def fork(processes, *arguments):
    """The ranks that `launch` starts, without the launcher."""
    outcomes = Run(by_command, "evaluate", *map(str, arguments), processes=processes).outcomes()
    return SimpleNamespace(returncode=max(outcomes), stderr="")


def by_command(*arguments: str) -> int:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        app(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize(("start", "processes"), [(fork, 2), pytest.param(launch, 3, marks=pytest.mark.slow)])
def test_processes_change_nothing(command, folder, tmp_path, start, processes):
    """Catches samples that are counted twice to fill uneven shards, or lost, and predictions out of order."""
    options = ["--predictions", "--pictures", 1]
    finished = start(processes, "-d", folder, "-o", tmp_path / "many", *options)
    assert finished.returncode == 0, finished.stderr
    command("-o", tmp_path / "one", *options)
    many, one = (tmp_path / name / "scenes" for name in ("many", "one"))
    for name in ("results.json", "predictions.json", "pictures.png"):
        assert (many / name).read_bytes() == (one / name).read_bytes(), name
    assert json.loads((one / "results.json").read_text())["images"] == NUM_IMAGES
    assert sorted(path.name for path in many.glob("progress/*.pt")) == [f"{rank}.pt" for rank in range(processes)]


def killed(*arguments: str) -> int:
    """The command, killed when it comes to the sixth image."""
    example = SegmentationDataset.example

    def deadly(self, row, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return example(self, row, index)

    SegmentationDataset.example = deadly
    return by_command(*arguments)


def test_resume_after_a_kill(command, folder, tmp_path, monkeypatch):
    """Catches images that are counted twice or lost, and predictions torn in the middle."""
    options = ["--predictions", "--save-every", "2", "--pictures", "1", "--workers", "0"]
    part, whole = tmp_path / "part", tmp_path / "whole"
    arguments = ["evaluate", "-d", folder, "-o", part, "--device", "cpu", *options]
    run = Run(killed, *map(str, arguments))
    assert run.outcomes() == [None] and run.processes[0].exitcode == -signal.SIGKILL
    assert not (part / "scenes" / "predictions.json").exists()
    with open(part / "scenes" / "progress" / "0.jsonl", "ab") as file:
        file.write(b'[4, [{"image_')  # written, but not noted
    assert "--resume" in command("-o", part, *options, status=2).output
    asked = []
    example = type(load_segmentation_dataset(folder, "validation")).example
    monkeypatch.setattr(
        "san_hf.data.SegmentationDataset.example",
        lambda self, row, index: asked.append(index) or example(self, row, index),
    )
    command("-o", part, *options, "--resume")
    assert asked[:4] == [0, 4, 5, 6], asked  # 0: whether there are labels at all
    command("-o", whole, *options)
    for name in ("results.json", "predictions.json", "pictures.png"):
        assert (part / "scenes" / name).read_bytes() == (whole / "scenes" / name).read_bytes(), name

    asked.clear()
    command("-o", part, *options[:-4], "--pictures", "1", "--resume")
    assert len(asked) <= 6, "a finished evaluation was done again"
    assert "the synonyms differs; it was False and is True now" in command(
        "-o", part, *options, "--synonyms", "--resume", status=2
    ).output.replace("\n", " ")


def test_augmentation_is_the_average(loaded, data):
    """Catches views at other sizes, mirrored views that aren't turned back, and scores that aren't averaged."""
    model, processor = loaded
    image = data[0][0]
    names = data.class_names[:12]
    predictor = Predictor(model, processor, augment=True)
    (got,) = predictor([predictor.prepare(image)], predictor.vocabulary(names))
    total = torch.zeros(len(names), image.height, image.width)
    tokens = processor(text=names)
    for scale in AUGMENTATION_SCALES:
        for mirrored in (False, True):
            view = ImageOps.mirror(image) if mirrored else image
            inputs = processor(images=view, size={"shortest_edge": round(160 * scale), "longest_edge": 1120})
            with torch.inference_mode():
                outputs = model(**inputs, **tokens)
            (result,) = processor.post_process_semantic_segmentation(
                outputs, target_sizes=[(image.height, image.width)], return_segmentation_scores=True
            )
            scores = result.segmentation_scores
            total += scores.flip(-1) if mirrored else scores
    expected = total.argmax(0)
    assert len(expected.unique()) > 2
    assert (got != expected).sum() <= 2
    single = Predictor(model, processor)
    assert (single([image], single.vocabulary(names))[0] != expected).sum() > 20, "augmentation changes nothing here"


def test_augmentation_at_the_published_sizes():
    """Catches other sizes than the published ones."""
    assert [round(640 * scale) for scale in AUGMENTATION_SCALES] == [320, 480, 640, 800, 960, 1120]
    assert 2560 * max(AUGMENTATION_SCALES) == 4480


def test_synonyms(loaded, data):
    """Catches synonyms that aren't split, whose scores are summed, or that move later classes' labels."""
    assert split_synonyms("television, tv; telly ,") == ["television", "tv", "telly"]
    model, processor = loaded
    names = ["sky", "red boat, striped boat", "water", "yellow tree, Sky, purple tree"]
    image = data[0][0]
    predictor = Predictor(model, processor)
    (got,) = predictor([image], predictor.vocabulary(names, synonyms=True))

    words = ["sky", "red boat", "striped boat", "water", "yellow tree", "purple tree"]
    with torch.inference_mode():
        outputs = model(**processor(images=image, text=words))
    logits = outputs.class_queries_logits
    groups = [[0], [1, 2], [3], [4, 0, 5], [6]]
    outputs.class_queries_logits = torch.stack([logits[..., group].amax(-1) for group in groups], dim=-1)
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[got.shape])
    assert torch.equal(got, expected)
    assert (got == 0).any()  # "sky" goes to the first class that has it
    with pytest.raises(ValueError, match="Class 1, ';', has no word"):
        predictor.vocabulary(["sky", ";"], synonyms=True)
    assert not torch.equal(predictor([image], predictor.vocabulary(names))[0], got)


def test_expansion_is_a_miss(loaded, data):
    """Catches predictions beyond the classes that count for one of them, or don't count at all."""
    model, processor = loaded
    options = {"expand": "coco", "templates": ["a photo of a {}."]}
    got = evaluate(model, processor, data, **options)
    segmenter = Segmenter(model, processor, data.class_names, **options)
    metrics = ConfusionMatrixMetrics(len(data.class_names), 255)
    for image, label_map, _ in data:
        metrics.update(segmenter(image).label_map, label_map)
    by_hand = metrics.compute(data.class_names)
    assert got.metrics == by_hand.metrics
    labelled, predicted = (sum(row[key] for row in got.per_class) for key in ("ground_truth", "predicted"))
    assert predicted < labelled == sum(int((label_map != 255).sum()) for _, label_map, _ in data)


def test_predictions(loaded, data, tmp_path):
    """Catches transposed codes, labels under another class's id, and images that can't be told apart."""
    evaluate(*loaded, data, output=tmp_path, predictions=True)
    entries = json.loads((tmp_path / "predictions.json").read_text())
    segmenter = Segmenter(*loaded, data.class_names)
    for index, (image, _, name) in enumerate(data):
        label_map = np.full((image.height, image.width), -1)
        for entry in (entry for entry in entries if entry["file_name"] == name):
            assert entry["image_id"] == index  # the number that the file's name is
            label_map[coco_mask.decode(entry["segmentation"]) == 1] = entry["category_id"]
        np.testing.assert_array_equal(label_map, segmenter(image).label_map)
    coco = load_vocabulary("coco-stuff")
    assert category_ids(coco) == load_class_ids("coco-stuff") != list(range(171))
    assert category_ids(["a", "b"]) == [0, 1]
    (entry,) = encode_predictions(np.array([[1, 2, 2]]), [7, 8], "photo.jpg")  # 2 is none of the classes
    assert entry["category_id"] == 8


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["000139.jpg", "000285.jpg", "000632.jpg"], [139, 285, 632]),
        (["1.png", "2.png", "a.png"], [0, 1, 2]),
        (["a/1.png", "b/1.png", "b/2.png"], [0, 1, 2]),
        (["1.png", "01.png", "5.png"], [0, 1, 2]),
    ],
)
def test_prediction_ids(tmp_path, names, expected):
    """Catches two images with one id: names that are numbers beside others, and numbers that occur twice."""
    parts = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for rank, part in enumerate(parts):
        writer = PredictionWriter(part)
        for index in range(rank, len(names), 2):
            writer.write(index, encode_predictions(np.array([[0, 1]]), [7, 8], names[index]))
        writer.flush()
        writer.close()
    merge_predictions(parts, tmp_path / "predictions.json")
    entries = json.loads((tmp_path / "predictions.json").read_text())
    assert [(entry["image_id"], entry["file_name"]) for entry in entries[::2]] == list(zip(expected, names))
    assert [entry["image_id"] for entry in entries[1::2]] == expected


def test_predictions_of_an_earlier_run(loaded, data, folder, tmp_path):
    """Catches predictions of other settings that stay beside new figures, as the states that told are gone."""
    evaluate(*loaded, data, output=tmp_path, predictions=True, limit=2)
    shutil.rmtree(tmp_path / "progress")
    evaluate(*loaded, data, output=tmp_path, predictions=True, limit=4, resume=True)
    entries = json.loads((tmp_path / "predictions.json").read_text())
    assert {entry["image_id"] for entry in entries} == {0, 1, 2, 3}


@pytest.fixture
def broken(folder, tmp_path):
    """The scenes, one of which isn't whole."""
    copy = tmp_path / "broken"
    for kind in ("validation/images", "validation/labels"):
        (copy / kind).mkdir(parents=True)
        for path in (folder / kind).iterdir():
            (copy / kind / path.name).write_bytes(path.read_bytes())
    (copy / "classes.txt").write_bytes((folder / "classes.txt").read_bytes())
    image = copy / "validation" / "images" / f"{4:012}.png"
    image.write_bytes(image.read_bytes()[:300])
    return copy


def test_broken_image(command, broken, loaded, data, tmp_path):
    """Catches a broken image that is not named, loses the work before it, is counted, or is passed over in silence."""
    output = tmp_path / "out"
    result = command("-o", output, dataset=broken, status=2)
    assert f"{4:012}.png" in result.output and "Traceback" not in result.output
    assert not (output / "broken" / "results.json").exists()
    state = torch.load(output / "broken" / "progress" / "0.pt")["state"]
    assert state["done"] == 4 == int(state["metrics"]["num_images"])
    result = command("-o", output, "--resume", "--skip-broken", dataset=broken, status=1)
    assert f"{4:012}.png" in result.output
    results = json.loads((output / "broken" / "results.json").read_text())
    assert results["images"] == NUM_IMAGES - 1
    assert len(results["settings"]["left_out"]) == 1
    got = evaluate(*loaded, load_segmentation_dataset(broken, "validation"), skip_broken=True)
    others = data.dataset.select([index for index in range(NUM_IMAGES) if index != 4])
    rest = type(data)(others, data.class_names, 255, data.name, data.split)
    assert got.metrics == evaluate(*loaded, rest).metrics
    assert len(got.broken) == 1
    with pytest.raises(DataError, match=f"{4:012}.png"):
        evaluate(*loaded, load_segmentation_dataset(broken, "validation"), workers=3)
    rest = type(data)(others.select([]), data.class_names, 255, data.name, data.split)
    with pytest.raises(EvaluationError, match="none of the images"):
        evaluate(*loaded, rest)


def evaluate_broken(broken: Path, loaded: tuple, processes: int) -> list[str]:
    accelerator = Accelerator(mixed_precision="no") if processes > 1 else None
    data = load_segmentation_dataset(broken, "validation")
    return evaluate(*loaded, data, accelerator=accelerator, skip_broken=True, workers=0).broken


def test_broken_images_of_two_processes(broken, loaded):
    """Catches broken images that are listed in another order for another number of processes."""
    image = broken / "validation" / "images" / f"{1:012}.png"
    image.write_bytes(image.read_bytes()[:300])
    (alone,) = Run(evaluate_broken, broken, loaded, 1).outcomes()
    assert [f"{index:012}.png" in message for index, message in zip((1, 4), alone, strict=True)] == [True, True]
    assert Run(evaluate_broken, broken, loaded, 2, processes=2).outcomes() == [alone, alone]


def test_outputs_that_are_not_finite(loaded, data, tmp_path):
    """Catches figures of a model whose outputs are NaN, and an error that doesn't say at which image."""
    model, processor = loaded
    kept = model.logit_scale.detach().clone()
    try:
        with torch.no_grad():
            model.logit_scale.fill_(torch.nan)
        for augment in (False, True):
            with pytest.raises(EvaluationError, match=rf"{0:012}\.png.*NaN"):
                evaluate(model, processor, data, workers=0, augment=augment)
    finally:
        with torch.no_grad():
            model.logit_scale.copy_(kept)


def test_state_of_another_evaluation(loaded, data, tmp_path):
    """Catches counts of other models or settings that are added up."""
    model, processor = loaded
    evaluate(model, processor, data, limit=3, output=tmp_path)
    with pytest.raises(EvaluationError, match="the data set differs"):
        evaluate(model, processor, data, limit=4, output=tmp_path, resume=True)
    shifted = dataclasses.replace(data, label_shift=-1)
    with pytest.raises(EvaluationError, match="the label shift differs; it was 0 and is -1 now"):
        evaluate(model, processor, shifted, limit=3, output=tmp_path, resume=True)
    with pytest.raises(EvaluationError, match="the batch size differs; it was 1 and is 2 now"):
        evaluate(model, processor, data, limit=3, output=tmp_path, resume=True, batch_size=2)
    others = dataclasses.replace(data, dataset=data.dataset.select(range(NUM_IMAGES - 1, -1, -1)))
    with pytest.raises(EvaluationError, match="the fingerprint of the data set differs"):
        evaluate(model, processor, others, limit=3, output=tmp_path, resume=True)
    kept = model.no_object_embed.detach().clone()
    try:
        with torch.no_grad():
            model.no_object_embed[0, 0] += 1e-3
        with pytest.raises(EvaluationError, match="the model differs"):
            evaluate(model, processor, data, limit=3, output=tmp_path, resume=True)
    finally:
        with torch.no_grad():
            model.no_object_embed.copy_(kept)
    state = tmp_path / "progress" / "0.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(EvaluationError, match="is damaged"):
        evaluate(model, processor, data, limit=3, output=tmp_path, resume=True)
    assert evaluate(model, processor, data, limit=3, output=tmp_path).num_images == 3


@pytest.mark.parametrize("name", ["0.pt", "0.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_progress(loaded, data, tmp_path, name, damage):
    """Catches counts and predictions that were damaged and are gone on with, and torch's advice to trust the file."""
    options = {"output": tmp_path, "workers": 0, "limit": 2, "predictions": True}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluator, "merge_predictions", interrupt)
        evaluate(*loaded, data, **options)
    file = tmp_path / "progress" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(EvaluationError) as raised:
        evaluate(*loaded, data, **options, resume=True)
    message = str(raised.value)
    assert f"'{file}' " in message and "valuate" in message and "from the start" in message
    assert "\n" not in message and "weights_only" not in message


def interrupt(*_):
    raise KeyboardInterrupt


def test_images_that_have_changed(loaded, folder, tmp_path):
    """Catches an evaluation that goes on with other images, and one that a broken image can't be mended for."""
    shutil.copytree(folder, tmp_path / "data")
    images, labels = (sorted((tmp_path / "data" / "validation" / kind).iterdir()) for kind in ("images", "labels"))
    sound = images[1].read_bytes()
    images[1].write_bytes(b"broken")
    data = load_segmentation_dataset(tmp_path / "data", "validation")
    options = {"output": tmp_path / "out", "workers": 0, "limit": 2}
    with pytest.raises(DataError):
        evaluate(*loaded, data, **options)
    images[1].write_bytes(sound)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    whole = evaluate(*loaded, data, workers=0, limit=2)
    assert_same(evaluate(*loaded, data, **options, resume=True), whole)
    labels[0].write_bytes(labels[1].read_bytes())
    with pytest.raises(EvaluationError, match="of other images: of those that were counted already, some have changed"):
        evaluate(*loaded, data, **options | {"output": tmp_path / "again"}, resume=True)


def test_an_evaluation_that_never_began(loaded, folder, tmp_path):
    """Catches a first image that can't be used and leaves a folder that refuses the corrected command."""
    data = dataclasses.replace(load_segmentation_dataset(folder, "validation"), class_names=["thing"])
    with pytest.raises(DataError):
        evaluate(*loaded, data, output=tmp_path / "out", workers=0, predictions=True)
    assert not list((tmp_path / "out").iterdir())


def test_one_evaluation_at_a_time(command, folder, tmp_path):
    """Catches two that write the same counts and results; and deletes nothing of the one that goes on."""
    output = tmp_path / folder.name
    (output / "compared").mkdir(parents=True)
    outcomes = []
    with locked(output / ".lock", "An evaluation"):
        thread = threading.Thread(
            target=lambda: outcomes.append(command("-o", tmp_path, "--limit", 1, "--overwrite", status=2).output)
        )
        thread.start()
        thread.join()
        assert (output / "compared").is_dir()
    assert f"An evaluation in '{output}' is under way already, by process {os.getpid()} on" in outcomes[0]


def test_command(command, loaded, data, expected, tmp_path):
    """Catches a command whose figures aren't the library's, or that overwrites results unasked."""
    result = command("-o", tmp_path, "--pictures", 2, "--boundary", "--per-class")
    assert any(line.split()[1:3] == ["red", "house"] for line in result.output.splitlines())
    assert f"{expected.metrics['mIoU']:.2f}" in result.output
    results = json.loads((tmp_path / "scenes" / "results.json").read_text())
    for name, value in expected.metrics.items():
        assert results["metrics"][name] == pytest.approx(value)
    assert (results["model"], results["split"], results["images"]) == ("picture-book", "validation", NUM_IMAGES)
    assert any("BoundaryIoU" in row for row in results["per_class"])
    picture = Image.open(tmp_path / "scenes" / "pictures.png")
    assert picture.height > 4 * COMPARISON_SIZE * 0.6
    assert "holds results" in command("-o", tmp_path, status=2).output
    (tmp_path / "scenes" / "compared").mkdir()
    command("-o", tmp_path, "--overwrite", "--limit", 1)
    results = json.loads((tmp_path / "scenes" / "results.json").read_text())
    assert results["images"] == 1
    settings = results["settings"]
    assert (settings["templates"], settings["ignore_index"], settings["label_shift"]) == ("vild", 255, 0)
    # Of the run that was replaced.
    assert not (tmp_path / "scenes" / "pictures.png").exists()
    assert not (tmp_path / "scenes" / "compared").exists()


def test_command_compares_two_models(command, loaded, data, tmp_path):
    """Catches a picture or figures of one model under the other's name."""
    model, processor = loaded
    kept = model.no_object_embed.detach().clone()
    try:
        with torch.no_grad():
            model.no_object_embed.neg_()
        model.save_pretrained(tmp_path / "before")
        processor.save_pretrained(tmp_path / "before")
        other = evaluate(model, processor, data, limit=3)
    finally:
        with torch.no_grad():
            model.no_object_embed.copy_(kept)
    result = command("-o", tmp_path / "out", "--pictures", 1, "--compare-with", tmp_path / "before", "--limit", 3)
    files = [tmp_path / "out" / "scenes" / name for name in ("results.json", "compared/results.json")]
    own, compared = (json.loads(file.read_text())["metrics"]["mIoU"] for file in files)
    assert compared == pytest.approx(other.metrics["mIoU"]) != own
    assert f"{own:.2f}" in result.output and f"{compared:.2f}" in result.output
    picture = Image.open(tmp_path / "out" / "scenes" / "pictures.png")
    assert picture.width > 6 * COMPARISON_SIZE


def test_nothing_is_computed_twice(command, tmp_path, passes, monkeypatch):
    """
    Catches images that go through the model again to be drawn, class names that are encoded for that, and examples
    that are decoded again; with one model and with two.
    """
    decoded, decode = [], SegmentationDataset.example
    monkeypatch.setattr(
        SegmentationDataset, "example", lambda self, row, index: decoded.append(index) or decode(self, row, index)
    )
    prompts = len(CLASS_NAMES) * 14
    command("-o", tmp_path / "one", "--pictures", 2)
    # One more example was looked at when the data set was opened, to see whether it has labels.
    assert passes == {"images": NUM_IMAGES, "prompts": prompts} and len(decoded) == NUM_IMAGES + 1
    embedded = ROOT / "san_hf" / "checkpoints" / "picture-book"
    command("-o", tmp_path / "two", "--pictures", 2, "--compare-with", embedded)
    assert passes == {"images": 3 * NUM_IMAGES, "prompts": 3 * prompts} and len(decoded) == 3 * NUM_IMAGES + 2


def test_the_examples_that_are_drawn(loaded, data, tmp_path):
    """Catches other examples than the worst and the first of the random order, and a resumed run that draws others."""
    options = {"pictures": 2, "seed": 3, "output": tmp_path, "save_every": 1}
    whole = evaluate(*loaded, data, **options)
    order = np.random.default_rng(3).permutation(NUM_IMAGES).tolist()
    worst = [index for index, _ in whole.worst]
    assert whole.worst == evaluate(*loaded, data, worst=2).worst
    assert whole.random == [index for index in order if index not in worst][:2]
    assert set(whole.examples) == {*worst, *whole.random}
    again = evaluate(*loaded, data, **options, resume=True)
    assert (again.worst, again.random) == (whole.worst, whole.random)
    for index, example in again.examples.items():
        assert torch.equal(example.prediction, whole.examples[index].prediction)
        assert example.name == data[index][2]
    kept = evaluate(*loaded, data, keep=[4])
    assert set(kept.examples) == {4} and not kept.worst


ERRORS = {
    "no set": (["-d", "nowhere"], "nowhere"),
    "benchmark without a root": (["-d", "voc"], "--data-root"),
    "benchmark that isn't there": (["-d", "all", "--data-root", "."], "san-hf prepare coco-stuff"),
    "no model": (["--model", "nothing"], "nothing"),
    "no device": (["--device", "tpu"], "tpu"),
    "twice": (["-d", "{folder}"], "twice"),
    "resume and overwrite": (["--resume", "--overwrite"], "one of them"),
    "pictures of a stream": (["--streaming", "--pictures", "1"], "--streaming"),
    "comparison without pictures": (["--compare-with", "other"], "--pictures"),
    "output is a file": (["-o", "{folder}/classes.txt"], "classes.txt"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_errors(command, folder, tmp_path, monkeypatch, case):
    """Catches stack traces, and errors that don't name their cause."""
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[case]
    result = command(*(argument.format(folder=folder) for argument in arguments), status=2)
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert message in error, result.output


def test_comparison_pixels():
    """Catches swapped columns, errors where there is no label, and "other" in the colour of a class."""
    image = Image.new("RGB", (40, 40), (200, 100, 0))
    truth = np.zeros((40, 40), dtype=np.int32)
    truth[:, 20:] = 1
    truth[:10] = 255
    prediction = np.zeros((40, 40), dtype=np.int64)
    prediction[30:] = 2  # none of the classes
    comparison = Comparison("one", image, truth, {"model": prediction}, {"model": 50.0})
    picture = np.asarray(draw_comparisons([comparison], ["cat", "grass"], 255))
    colors = name_colors(["cat", "grass"])
    top = 15 * 2 // 3 + 2 * (15 * 3 // 2)

    def pixel(column, x, y):
        return picture[top + y * 8, 10 + column * (COMPARISON_SIZE + 10) + x * 8]

    np.testing.assert_array_equal(pixel(0, 20, 20), (200, 100, 0))
    np.testing.assert_array_equal(pixel(1, 10, 20), colors[0])
    np.testing.assert_array_equal(pixel(1, 30, 20), colors[1])
    np.testing.assert_array_equal(pixel(1, 10, 5), UNLABELLED_COLOR)
    np.testing.assert_array_equal(pixel(2, 30, 20), colors[0])
    np.testing.assert_array_equal(pixel(2, 30, 35), OTHER_COLOR)
    right, wrong, missed = pixel(3, 10, 20).astype(int), pixel(3, 30, 20).astype(int), pixel(3, 10, 35).astype(int)
    assert np.ptp(right) == 0 and wrong[0] > wrong[1] + 80
    np.testing.assert_array_equal(missed, wrong)
    np.testing.assert_array_equal(pixel(3, 10, 5), UNLABELLED_COLOR)
    assert wrong[0] <= max(ERROR_COLOR[0], 255)
    assert picture.shape[1] == 10 + 4 * (COMPARISON_SIZE + 10)
    with pytest.raises(ValueError, match="same size"):
        draw_comparisons(
            [Comparison("one", image, truth[:5], {"model": prediction}, {"model": 50.0})], ["cat", "grass"], 255
        )
    with pytest.raises(ValueError, match="no comparisons"):
        draw_comparisons([], ["cat"], 255)


def test_examples_show_each_model(loaded, data):
    """Catches predictions of one example in another's row."""
    picture = np.asarray(draw_examples({"model": loaded}, data, [2, 5]))
    segmenter = Segmenter(*loaded, data.class_names)
    line = 15 * 3 // 2
    left, top = 10 + 2 * (COMPARISON_SIZE + 10), 10 + 2 * line
    for index in (2, 5):
        expected = name_colors(data.class_names)[segmenter(data[index][0]).label_map]
        height = round(COMPARISON_SIZE * len(expected) / max(expected.shape[:2]))
        assert height == COMPARISON_SIZE  # both are square, 64 pixels a side
        shown = picture[top + 2 : top + height : 5, left + 2 : left + COMPARISON_SIZE : 5]
        np.testing.assert_array_equal(shown, expected)
        top += height + 10 + line


def test_full_disk(loaded, data, tmp_path, monkeypatch):
    """Catches a state that is lost or half written when the disk is full."""
    evaluate(*loaded, data, limit=2, output=tmp_path)
    state = tmp_path / "progress" / "0.pt"
    before = state.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("san_hf.files.os.fsync", full)
    with pytest.raises(EvaluationError, match=f"{tmp_path}.*No space left"):
        evaluate(*loaded, data, limit=2, output=tmp_path, resume=True)
    assert state.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="needs a user other than root")
def test_read_only_output(command, tmp_path):
    """Catches a stack trace where the output can't be written."""
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in command("-o", tmp_path / "locked" / "out", status=2).output
