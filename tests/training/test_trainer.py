"""SAN in transformers' `Trainer`: examples, metrics, and the example script as it is called."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import EvalPrediction, Trainer, TrainingArguments

from san_hf import from_pretrained
from san_hf.data import load_segmentation_dataset, set_aside
from san_hf.hub import save_pretrained
from san_hf.messages import Notice
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.training import SegmentationCollator, TrainingTransform
from san_hf.training.hf_trainer import EvaluationExamples, SANTrainer, TrainerMetrics, TrainingExamples
from san_hf.training.stream import SampleStream, build_loader
from tests.tiny import segmenting_model, tiny_config, tiny_tokenizer


SCRIPT = Path(__file__).parents[2] / "scripts" / "train_with_trainer.py"
# (height, width), none alike once resized
SIZES = {"train": [(64, 64), (48, 90), (80, 50), (70, 75), (60, 100)], "validation": [(64, 64), (48, 90), (100, 61)]}
COLOURS = np.array([[230, 60, 60], [60, 230, 60], [60, 60, 230]], np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model in model/, and pictures of three colours, named by their classes, in data/."""
    folder = tmp_path_factory.mktemp("trainer")
    rng = np.random.default_rng(0)
    for split, sizes in SIZES.items():
        for kind in ("images", "labels"):
            (folder / "data" / split / kind).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            blocks = Image.fromarray(rng.permutation([0, 1, 2, 0, 1, 2]).reshape(2, 3).astype(np.uint8))
            labels = np.array(blocks.resize((width, height), Image.Resampling.NEAREST))
            Image.fromarray(COLOURS[labels]).save(folder / "data" / split / "images" / f"{i}.png")
            labels[:4] = 255
            Image.fromarray(labels).save(folder / "data" / split / "labels" / f"{i}.png")
    (folder / "data" / "classes.txt").write_text("red\ngreen\nblue\n")
    torch.manual_seed(0)
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    processor = SANProcessor(image_processor=image_processor, tokenizer=tiny_tokenizer())
    save_pretrained(SANForSemanticSegmentation(tiny_config()), processor, folder / "model")
    return folder


def data_of(folder: Path, split: str):
    return load_segmentation_dataset(folder / "data", split)


# --- examples


def test_order_of_examples(folder):
    """Every pass has every image once, each pass in another order, each draw augmented anew."""
    data = data_of(folder, "train")
    seen = []

    class Recorder:
        def __call__(self, image, label_map, rng):
            seen.append((image.size, rng.integers(2**40)))
            return np.asarray(image), label_map

    examples = TrainingExamples(data, Recorder(), length=33, seed=4)
    assert len(examples) == 33
    for position in range(33):
        examples[position]
    passes = [[size for size, _ in seen[start : start + 5]] for start in range(0, 30, 5)]
    assert all(Counter(one) == Counter((width, height) for height, width in SIZES["train"]) for one in passes)
    assert len({tuple(one) for one in passes}) > 3
    assert len({number for _, number in seen}) == 33


def test_examples_depend_on_seed_and_position_only(folder):
    """Asked for in any order, by any number of workers: resuming relies on it."""
    data = data_of(folder, "train")
    transform = TrainingTransform(crop_size=32)
    examples = TrainingExamples(data, transform, length=12, seed=4)
    expected = [examples[position] for position in range(12)]

    backwards = TrainingExamples(data, transform, length=12, seed=4)
    by_workers = torch.utils.data.DataLoader(examples, batch_size=None, num_workers=2)
    for others in ([backwards[position] for position in reversed(range(12))][::-1], list(by_workers)):
        for example, other in zip(expected, others):
            np.testing.assert_array_equal(example["image"], other["image"])
            np.testing.assert_array_equal(example["label_map"], other["label_map"])

    reseeded = TrainingExamples(data, transform, length=12, seed=5)
    assert any((expected[position]["image"] != reseeded[position]["image"]).any() for position in range(12))


def test_examples_are_those_of_the_own_training(folder):
    """`Trainer` and `san-hf train` see the same images, augmented in the same way, with the same seed."""
    data = data_of(folder, "train")
    _, processor = from_pretrained(folder / "model")
    transform, collator = TrainingTransform(crop_size=32), SegmentationCollator(processor)
    examples = TrainingExamples(data, transform, length=12, seed=4)
    loader = iter(build_loader(SampleStream(data, 4, batch_size=3), transform, collator, workers=0))
    for start in range(0, 12, 3):
        expected, batch = next(loader), collator([examples[position] for position in range(start, start + 3)])
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
        torch.testing.assert_close(batch["labels"], expected["labels"], rtol=0, atol=0)


def test_evaluation_examples_are_what_the_processor_makes(folder):
    """Collated, they are the processor's own batch: another resize or normalisation would measure another model."""
    _, processor = from_pretrained(folder / "model")
    data = data_of(folder, "validation")
    examples = EvaluationExamples(data, processor)
    batch = SegmentationCollator(processor)([examples[index] for index in range(len(examples))])
    images, label_maps, _ = zip(*(data[index] for index in range(len(data))))
    expected = processor(images=list(images), segmentation_maps=list(label_maps), return_tensors="pt")
    assert len(examples) == 3
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
    torch.testing.assert_close(batch["labels"], expected["labels"])


# --- metrics


def test_metrics_batch_by_batch(folder):
    """
    Batches add up to the figures of all pixels, worked out by hand, and a second evaluation starts from nothing. Lists
    of maps, and rows that `Trainer` added to the labels, count the same.
    """
    _, processor = from_pretrained(folder / "model")
    metrics = TrainerMetrics(processor, num_labels=3, ignore_index=255)
    predictions = torch.tensor([[[0, 0, 1, 1]], [[1, 1, 1, 0]]])
    labels = torch.tensor([[[0, 1, 1, 255]], [[1, 1, 0, 255]]])
    padded = [torch.cat([label_map, torch.full((2, 4), -100)]) for label_map in labels]
    # Class 0: 1 of 1 + 1 + 1; class 1: 3 of 3 + 1 + 1; class 2 is nowhere
    expected = {"mIoU": 100 * (1 / 3 + 3 / 5) / 2, "pACC": 100 * 4 / 6, "mACC": 100 * (1 / 2 + 3 / 4) / 2}
    for first, last in (
        ((predictions[:1], labels[:1]), (predictions[1:], labels[1:])),
        ((predictions[:1], labels[:1]), (list(predictions[1:]), padded[1:])),
    ):
        assert metrics(EvalPrediction(*first), compute_result=False) == {}
        results = metrics(EvalPrediction(*last), compute_result=True)
        assert {name: results[name] for name in expected} == pytest.approx(expected)


def test_label_maps_of_padded_labels(folder):
    """Rows that `Trainer` adds below the labels must not stretch the prediction, nor those that have no label."""
    _, processor = from_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = torch.tensor([[64, 96]] * 2), torch.tensor([[8, 8]] * 2)
    logits = torch.randn(2, 5, 4), 5 * torch.randn(2, 5, 8, 12), *sizes
    metrics = TrainerMetrics(processor, num_labels=3, ignore_index=-100)
    labels = torch.zeros(2, 64, 96, dtype=torch.int64)
    plain = metrics.label_maps(logits, labels)
    assert plain.shape == (2, 64, 96) and len(plain.unique()) == 3
    padded = torch.cat([labels, torch.full((2, 32, 96), -100)], dim=1)
    assert (metrics.label_maps(logits, padded) == plain).all()
    labels[:, :, 0] = -100
    assert (metrics.label_maps(logits, labels) == plain).all()
    with pytest.raises(ValueError, match="no labels"):
        metrics.label_maps(logits, None)
    with pytest.raises(ValueError, match="batch_eval_metrics=True"):
        metrics(EvalPrediction(plain, labels))


# --- Trainer


def equal_points(*size: int, **kwargs) -> torch.Tensor:
    """Instead of torch.rand: the same points for every mask, wherever it stands in a batch."""
    return (torch.arange(size[-2] * size[-1]) * 0.618 % 1).reshape(size[-2:]).expand(size).clone()


def first_step(folder: Path, tmp_path: Path, monkeypatch, size: int, parts: int) -> tuple[float, float]:
    """The loss and the norm of the gradient of a step with `parts` batches of `size` images."""
    model, processor = from_pretrained(folder / "model")
    data = data_of(folder, "train")
    model.set_vocabulary(data.class_names, **processor(text=data.class_names, return_tensors="pt"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    transform = TrainingTransform(64, scales=(1.0,), color_jitter=False, flip=False)
    monkeypatch.setattr(torch, "rand", equal_points)
    trainer = SANTrainer(
        model, arguments, SegmentationCollator(processor), train_dataset=TrainingExamples(data, transform, length=4)
    )
    trainer.train()
    monkeypatch.undo()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry["loss"], entry["grad_norm"]


def test_accumulation_is_the_larger_batch(folder, tmp_path, monkeypatch):
    """Each batch divided by its own masks: another loss and another gradient than the same images in one batch."""
    # One image shows a single class, so that batches differ in their masks.
    shutil.copytree(folder, tmp_path / "copy")
    label = tmp_path / "copy" / "data" / "train" / "labels" / "0.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(label)
    whole = first_step(tmp_path / "copy", tmp_path, monkeypatch, size=4, parts=1)
    for size in (1, 2):
        parts = first_step(tmp_path / "copy", tmp_path, monkeypatch, size, parts=4 // size)
        assert parts == pytest.approx(whole, rel=1e-5)


def evaluated(folder: Path, tmp_path: Path, trainer_class=SANTrainer, ignore_index=255, collator_index=None, **options):
    """What `Trainer` says of a model that gives more than one label."""
    model, processor = segmenting_model(), from_pretrained(folder / "model")[1]
    data = load_segmentation_dataset(folder / "data", "validation")
    model.set_vocabulary(data.class_names, **processor(text=data.class_names, return_tensors="pt"))
    model.config.semantic_loss_ignore_index = ignore_index
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=1, **options
    )
    trainer = trainer_class(
        model,
        arguments,
        SegmentationCollator(processor, ignore_index if collator_index is None else collator_index),
        eval_dataset=EvaluationExamples(data, processor),
        compute_metrics=(metrics := TrainerMetrics(processor, 3, ignore_index)),
        **({} if trainer_class is SANTrainer else {"preprocess_logits_for_metrics": metrics.label_maps}),
    )
    return trainer.evaluate()


def test_evaluates_as_it_is(folder, tmp_path):
    """
    Nothing to be set by hand, and nothing silently empty: transformers takes the labels from SAN's own signature, in
    its own `Trainer`, too.
    """
    ours = evaluated(folder, tmp_path)
    plain = evaluated(folder, tmp_path, Trainer, remove_unused_columns=False, batch_eval_metrics=True)
    for name in ("eval_loss", "eval_mIoU", "eval_pACC"):
        assert np.isfinite(ours[name]) and plain[name] == pytest.approx(ours[name], rel=0.2 if "loss" in name else 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but SAN classifies masks"),
        ({"collator_index": 7}, "semantic_loss_ignore_index is 255, data_collator.ignore_index is 7"),
        ({"trainer_class": Trainer}, "remove_unused_columns=False"),
        ({"trainer_class": Trainer, "remove_unused_columns": False, "label_names": ["mask"]}, "label_names=."),
        (
            {"trainer_class": Trainer, "remove_unused_columns": False, "label_smoothing_factor": 0.1},
            "leave label_smoothing_factor at 0",
        ),
        ({"ignore_index": 2}, "ignore index 2 is also one of the 3 classes"),
    ],
)
def test_trainer_says_what_to_set(folder, tmp_path, options, message):
    """A KeyError from the depths, an evaluation without metrics, or one that counts unlabelled pixels."""
    with pytest.raises(ValueError, match=message):
        evaluated(folder, tmp_path, **options)


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_optimizers_that_an_engine_drops(tmp_path, monkeypatch, engine):
    """An optimiser and a schedule that `Trainer` replaces under DeepSpeed, and the learning rate quietly is another."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    if engine == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        arguments.deepspeed_plugin = object()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=f"optimizers were given, but with {engine}"):
        SANTrainer(model, arguments, optimizers=(optimizer, None))


def test_plain_trainer_does_not_accumulate(folder, tmp_path):
    """transformers' own `Trainer` can't tell the model of the other batches: refused, not another loss."""
    model, processor = from_pretrained(folder / "model")
    data = data_of(folder, "train")
    model.set_vocabulary(data.class_names, **processor(text=data.class_names, return_tensors="pt"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=2, report_to="none", use_cpu=True,
        remove_unused_columns=False, per_device_train_batch_size=1,
    )  # fmt: skip
    examples = TrainingExamples(data, TrainingTransform(32), length=2)
    trainer = Trainer(model, arguments, SegmentationCollator(processor), train_dataset=examples)
    with pytest.raises(ValueError, match="use san_hf.training.SANTrainer in place of Trainer"):
        trainer.train()


def test_augmentation_and_collator_fit(folder):
    """What the transform gives, the collator takes; a transform that pads with another label is refused."""
    _, processor = from_pretrained(folder / "model")
    data = data_of(folder, "train")
    image, label_map, _ = data[0]
    pair = TrainingTransform(32)(image, label_map, np.random.default_rng(0))
    as_dictionary = {"image": pair[0], "label_map": pair[1]}
    batches = [SegmentationCollator(processor)([example, example]) for example in (pair, as_dictionary)]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert torch.equal(batches[0]["labels"], batches[1]["labels"]) and batches[0]["labels"].shape == (2, 32, 32)
    with pytest.raises(ValueError, match=r"pads with the label 254, .*TrainingTransform\(..., ignore_index=255\)"):
        TrainingExamples(data, TrainingTransform(32, ignore_index=254), length=2)
    with pytest.raises(ValueError, match="the image first"):
        TrainingTransform(32)(label_map, image, np.random.default_rng(0))
    with pytest.raises(ValueError, match="Example 0 has no label_map"):
        SegmentationCollator(processor)([{"image": pair[0]}])


# --- the script

OPTIONS = ["--crop-size", "64", "--learning-rate", "0.01", "--max-grad-norm", "1", "--num-workers", "0"]


def load_script():
    specification = importlib.util.spec_from_file_location("train_with_trainer", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


def run_main(*arguments: str):
    return load_script().main(list(arguments))


def measure(folder: Path, data) -> dict[str, float]:
    """mIoU and pixel accuracy, image by image, counted with NumPy, at the size that the model sees."""
    model, processor = from_pretrained(folder)
    confusion = np.zeros((3, 3))
    for image, label_map, _ in data:
        inputs = processor(images=image, segmentation_maps=label_map, return_tensors="pt")
        labels = inputs.pop("labels")[0]
        with torch.no_grad():
            outputs = model(**inputs)
        height, width = inputs["image_sizes"][0].tolist()
        prediction = processor.post_process_semantic_segmentation(outputs)[0]
        labels = labels[:height, :width]
        np.add.at(confusion, (labels[labels != 255].numpy(), prediction[labels != 255].numpy()), 1)
    correct = confusion.diagonal()
    iou = correct / (confusion.sum(0) + confusion.sum(1) - correct)
    return {"eval_mIoU": 100 * iou.mean(), "eval_pACC": 100 * correct.sum() / confusion.sum()}


@pytest.fixture(scope="module")
def trained(folder) -> tuple[Path, dict[str, float]]:
    """The folder of a model that the script has trained, and what it has reported of it."""
    torch.manual_seed(0)
    results = run_main(
        *("--model", str(folder / "model"), "--data", str(folder / "data"), "--output", str(folder / "trained")),
        *("--batch-size", "4", "--steps", "30", "--eval-steps", "10", *OPTIONS),
    )
    return folder / "trained", results


def test_trains_and_evaluates(folder, trained):
    """
    A few steps through the script: what Trainer reports is what the saved model gives by hand, the rate follows the
    recipe's course, the loss falls, and CLIP stays as it was.
    """
    output, results = trained
    by_hand = measure(output, data_of(folder, "validation"))
    assert by_hand["eval_mIoU"] > 30  # more than one class is found
    assert {name: results[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-9)

    history = json.loads((output / "checkpoint-30" / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [10, 20, 30]
    assert evaluations[2]["eval_loss"] < evaluations[0]["eval_loss"] - 1
    (training,) = [entry for entry in history if "learning_rate" in entry]
    # Of the step that was just made, the 20th: the first is made at the full rate.
    assert training["learning_rate"] == pytest.approx(0.01 * (1 - 19 / 30) ** 0.9, rel=1e-6)

    before, after = (from_pretrained(place)[0] for place in (folder / "model", output))
    assert after.config.id2label == {0: "red", 1: "green", 2: "blue"}
    trained = dict(after.named_parameters())
    changed = {name for name, parameter in before.named_parameters() if not torch.equal(parameter, trained[name])}
    frozen = {name for name, parameter in before.named_parameters() if not parameter.requires_grad}
    assert not changed & frozen
    assert {"no_object_embed", "model.vision_model.embeddings.position_embedding.weight"} <= changed


def test_resumes(folder, tmp_path):
    """Interrupted after three of six steps and resumed: the same weights as in one go."""
    common = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--batch-size", "2", *OPTIONS]
    common += ["--steps", "6", "--eval-steps", "3"]
    run_main(*common, "--output", str(tmp_path / "whole"))
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    run_main(*common, "--output", str(tmp_path / "part"), "--resume")
    whole, part = (from_pretrained(tmp_path / name)[0].state_dict() for name in ("whole", "part"))
    for name, values in whole.items():
        torch.testing.assert_close(part[name], values, rtol=0, atol=0, msg=f"{name} differs")


def lora_trainer(folder: Path, output: Path, **options) -> SANTrainer:
    """A training of four steps with LoRA on CLIP, and a checkpoint after each second."""
    model, processor = from_pretrained(folder / "model")
    data = data_of(folder, "train")
    model.set_vocabulary(data.class_names, **processor(text=data.class_names, return_tensors="pt"))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to="none",
        use_cpu=True, learning_rate=1e-2, max_grad_norm=1.0, disable_tqdm=True,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    examples = TrainingExamples(data, TrainingTransform(32), length=8)
    evaluated = EvaluationExamples(data_of(folder, "validation"), processor)
    collator = SegmentationCollator(processor)
    return SANTrainer(model, arguments, collator, train_dataset=examples, eval_dataset=evaluated)


def test_resumes_with_lora(folder, tmp_path):
    """LoRA weights that start anew where a training goes on: Trainer doesn't look for them where SAN saves them."""
    whole = lora_trainer(folder, tmp_path)
    whole.train()
    resumed = lora_trainer(folder, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, values in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], values), name


def test_best_model_with_lora(folder, tmp_path):
    """The best step's side adapter with the last one's LoRA weights."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = lora_trainer(folder, tmp_path, load_best_model_at_end=True, per_device_eval_batch_size=1, **options)
    trainer.train()
    best = from_pretrained(trainer.state.best_model_checkpoint)[0].state_dict()
    assert trainer.state.best_global_step == 2 and any(".lora_B" in name for name in best)
    for name, values in trainer.model.state_dict().items():
        assert torch.equal(best[name], values), name


def test_two_processes(folder, trained, tmp_path):
    """
    Images of different sizes on two processes, one of which gets an image twice: the figure is that of the saved model
    on every image once.
    """
    model = trained[0]  # which finds more than one class
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(SCRIPT)]
    command += ["--model", str(model), "--data", str(folder / "data"), "--output", str(tmp_path / "out")]
    command += ["--batch-size", "1", "--steps", "1", "--eval-steps", "1", *OPTIONS, "--learning-rate", "1e-5"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "MASTER_PORT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout[done.stdout.rindex("{\n") :])
    by_hand = measure(tmp_path / "out", data_of(folder, "validation"))
    assert by_hand["eval_mIoU"] > 30
    assert {name: results[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere/to/be/found"], "Error: .*nowhere/to/be/found"),
        (["--eval-split", "test"], "Error: .*test"),
        (["--model", "no-such-model"], "Error: .*no-such-model"),
        (["--eval-split", "train"], "Error: 5 of the 5 validation images of data .* are training images, too"),
        (["--train-split", "train[:4]", "--eval-split", "train[3:]"], "Error: 1 of the 2 validation images"),
        (["--eval-split", "1.5"], r"(?s)Error: .*validation_split is 1\.5, expected a split's name, or a number"),
        (["--label-palette", "nowhere.txt"], r"Error: .*nowhere\.txt"),
    ],
)
def test_says_what_is_wrong(folder, tmp_path, arguments, message):
    """A sentence rather than a stack trace."""
    given = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--output", str(tmp_path), *arguments]
    with pytest.raises(SystemExit, match=message):
        run_main(*given)


def test_reads_data_as_the_command_does(folder, tmp_path):
    """Label maps in colours, and a share set aside: another division or other labels than those of `san-hf train`."""
    shutil.copytree(folder / "data", tmp_path / "data")
    colors = np.zeros((256, 3), np.uint8)
    colors[:3] = 255 * np.eye(3)
    for file in (tmp_path / "data" / "train" / "labels").iterdir():
        Image.fromarray(colors[np.asarray(Image.open(file))]).save(file)
    (tmp_path / "palette.txt").write_text("255 0 0 red\n0 255 0 green\n0 0 255 blue\n0 0 0 ignore\n")
    script = load_script()
    given = ["--data", str(tmp_path / "data"), "--output", "x", "--label-palette", str(tmp_path / "palette.txt")]
    training, validation = script.read_data(script.parse_arguments([*given, "--eval-split", "0.34"]))
    expected = set_aside(data_of(folder, "train"), 0.34, seed=0)
    for ours, theirs in zip((training, validation), expected):
        assert ours.class_names == ["red", "green", "blue"] and len(ours) == len(theirs)
        for (_, labels, name), (_, other_labels, other_name) in zip(ours, theirs):
            assert name == other_name and np.array_equal(labels, other_labels)
    with pytest.warns(Notice, match="training images, too"):
        options = [*given, "--eval-split", "train", "--shared-images", "warn"]
        training, validation = script.read_data(script.parse_arguments(options))
    assert len(training) == len(validation)


@pytest.mark.parametrize("workers", [0, 1])
def test_names_a_broken_image(folder, tmp_path, workers):
    """Also when it is a worker process that meets it; by its file name, and without that process's stack trace."""
    shutil.copytree(folder / "data", tmp_path / "data")
    broken = tmp_path / "data" / "train" / "images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    given = ["--model", str(folder / "model"), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^Error: data: 3\.png \(train\[3\]\): the image can't be read"):
        run_main(*given, "--batch-size", "2", "--steps", "3", *OPTIONS, "--num-workers", str(workers))


@pytest.mark.slow
def test_benchmark():
    """The training benchmark's own command, recipe and log keys: they belong to other files, and may move away."""
    command = [sys.executable, str(SCRIPT.parent / "benchmarks" / "training.py"), "--tiny"]
    command += ["--steps", "3", "--warmup", "1", "--batch-size", "2", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 <= result["waiting_for_data"] < 1 and result["images_per_second"] > 0 and result["memory_gib"] > 0.1
