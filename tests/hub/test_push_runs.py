"""A finished training on the Hub: the same complete folder by each way, with a card of the run."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import CLIPModel, TrainingArguments
from typer.testing import CliRunner

from san_hf import from_pretrained
from san_hf.cards import result_files
from san_hf.cli import app
from san_hf.data import SegmentationDataset, load_segmentation_dataset
from san_hf.training import SegmentationCollator, TrainingTransform
from san_hf.training.config import ConfigError
from san_hf.training.config_file import load_config
from san_hf.training.hf_trainer import EvaluationExamples, SANTrainer, TrainerMetrics, TrainingExamples
from san_hf.training.loop import train
from san_hf.training.run_card import measured
from tests.training.training_runs import configure, read_log, write_root


TOKEN = "hf_thisisverysecret"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("private"), 6, 5)


def test_a_run_goes_to_the_hub(hub, root, tmp_path):
    """
    Catches a pushed card that has lost training, results or licence, that names this machine, and a training that
    pushes something else than the command.
    """
    output = tmp_path / "runs" / "mine"
    options = ["training.steps=2", "training.batch_size=2", "evaluation.every=1", "evaluation.pictures=2"]
    hub_options = ["hub.repo=someone/mine", "hub.license=cc-by-4.0", "hub.private=true", "hub.picture=true"]
    train(configure(root, output, *options, *hub_options))
    files = hub.repositories["someone/mine"][-1]
    assert hub.private["someone/mine"] and len(hub.repositories["someone/mine"]) == 2
    for name, content in files.items():
        for place in (root, tmp_path, root.parent):
            assert str(place).encode() not in content, name
    assert files["prediction.png"] == (output / "pictures" / "best.png").read_bytes()
    card = ModelCard(files["README.md"].decode())
    evaluations = {line["step"]: line["validation"] for line in read_log(output) if "validation" in line}
    best = max(evaluations, key=lambda step: evaluations[step]["mIoU"])
    row = evaluations[best]
    miou, paper = round(row["mIoU"], 2), round(row["mIoU_over_present_or_predicted"], 2)
    assert card.data.license == "cc-by-4.0" and card.data.get("base_model") is None and card.data.datasets is None
    assert [result.metric_value for result in card.data.eval_results] == [miou]
    assert f"| data validation | 5 | {miou} | {paper} |" in card.text
    for fact in (
        f"Started from model and trained for {best} of 2 steps",
        "on data (train)",
        "3 classes that it was trained on: sky, road, tree.",
        "The whole model, CLIP included",
        "- **mIoU (paper)**: ",
        'from_pretrained("someone/mine"',
        "](prediction.png)",
    ):
        assert fact in card.text, fact
    assert not any(name.startswith(".eval_results") for name in files)  # the data are on no Hub
    assert from_pretrained("someone/mine")[0].config.vocabulary_size == 3

    # The command uploads the same; the picture only where it is asked for.
    result = CliRunner().invoke(app, ["push", str(output), "someone/again"])
    assert result.exit_code == 0, result.output
    again = hub.repositories["someone/again"][-1]
    assert set(files) - set(again) == {"prediction.png"} and "](prediction.png)" not in again["README.md"].decode()
    assert all(again[name] == files[name] for name in again if name != "README.md")
    picture = ["--picture", str(output / "pictures" / "best.png")]
    assert CliRunner().invoke(app, ["push", str(output), "someone/again", *picture]).exit_code == 0
    shown = hub.repositories["someone/again"][-1]["README.md"].decode()
    assert shown == files["README.md"].decode().replace("someone/mine", "someone/again")

    # The final model was measured, too: an evaluation follows the last step.
    final = (output / "final" / "README.md").read_text(encoding="utf-8")
    assert f"| {round(evaluations[2]['mIoU'], 2)} |" in final
    # A run that went on after its last evaluation still knows what was measured.
    for folder in ("final", "best"):
        for path in sorted((output / folder).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (output / folder).rmdir()
    train(configure(root, output, *options, *hub_options), resume=True)
    assert (output / "final" / "README.md").read_text(encoding="utf-8") == final
    assert ModelCard(hub.repositories["someone/mine"][-1]["README.md"].decode()).data.eval_results


def new_trainer(root, output, **options):
    """A training of two steps, with an evaluation after each."""
    model, processor = from_pretrained(root / "model")
    train_data, data = (load_segmentation_dataset(root / "data", split) for split in ("train", "validation"))
    model.set_vocabulary(data.class_names, **processor(text=data.class_names, return_tensors="pt"))
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=2, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        eval_strategy="steps", eval_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-3, train_sampling_strategy="sequential", push_to_hub=True, hub_model_id="someone/trained",
        hub_token=TOKEN, **options,
    )  # fmt: skip
    return SANTrainer(
        model,
        arguments,
        SegmentationCollator(processor),
        train_dataset=TrainingExamples(train_data, TrainingTransform(64, scales=(1.0,)), length=2),
        eval_dataset=EvaluationExamples(data, processor),
        compute_metrics=TrainerMetrics(processor, len(data.class_names)),
    )


@pytest.mark.parametrize("strategy", [pytest.param("end", marks=pytest.mark.slow), "every_save"])
def test_trainer_goes_to_the_hub(hub, root, tmp_path, strategy):
    """Catches a model of `Trainer` on the Hub without code, processor or results, or with paths of its arguments."""
    trainer = new_trainer(root, tmp_path / "trained", hub_strategy=strategy)
    trainer.train()
    trainer.push_to_hub(license="cc-by-4.0", dataset="me/streets")
    commits = hub.repositories["someone/trained"][1:]
    assert len(commits) == (1 if strategy == "end" else 3)
    for step, files in enumerate(commits, start=1):
        assert {"config.json", "model.safetensors", "modeling_san.py", "processor_config.json"} <= set(files)
        assert "training_args.bin" not in files and not any("checkpoint" in name for name in files)
        for name, content in files.items():
            assert not any(str(secret).encode() in content for secret in (root, tmp_path, TOKEN)), name
        step = min(step, 2) if strategy == "every_save" else 2
        card = ModelCard(files["README.md"].decode())
        (logged,) = [log for log in trainer.state.log_history if log["step"] == step and "eval_mIoU" in log]
        miou, paper = (round(logged[f"eval_{name}"], 2) for name in ("mIoU", "mIoU_over_present_or_predicted"))
        assert [result.metric_value for result in card.data.eval_results] == [miou]
        assert f"| data validation | 5 | {miou} | {paper} |" in card.text and f"for {step} of 2 steps" in card.text
    assert (card.data.license, card.data.datasets) == ("cc-by-4.0", ["me/streets"])
    assert 'from_pretrained("someone/trained"' in card.text and "sky, road, tree" in card.text
    back = from_pretrained("someone/trained")[0].state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.slow
def test_trainer_that_loads_its_best(hub, root, tmp_path):
    """Catches the last step's results on a card of the best step's weights."""
    trainer = new_trainer(
        root, tmp_path / "trained", hub_strategy="end", load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    trainer.push_to_hub()
    text = hub.repositories["someone/trained"][-1]["README.md"].decode()
    (logged,) = [log for log in trainer.state.log_history if log["step"] == best and "eval_mIoU" in log]
    assert f"for {best} of 2 steps" in text and f"| {round(logged['eval_mIoU'], 2)} |" in text


def test_trainer_that_would_push_its_state(root, tmp_path):
    """Catches optimiser states on the Hub with paths of this machine."""
    with pytest.raises(ValueError, match="hub_strategy is 'all_checkpoints'.*'every_save' or 'end'"):
        new_trainer(root, tmp_path, hub_strategy="all_checkpoints")


def test_results_on_data_of_the_hub():
    """Catches a folder's name that is taken for a data set on the Hub, and one on the Hub that gets no result file."""
    metrics = {"mIoU": 41.237, "mIoU_over_present_or_predicted": 38.0, "fwIoU": 1.0, "mACC": float("nan"), "pACC": 3.0}
    section = ["model.checkpoint=picture-book", "output=x"]
    for source, found in (("me/streets", True), ("/data/streets", False), ("tests/hub", False), ("streets", False)):
        config = load_config(None, [*section, f"data.source={source}", "data.config_name=small"])
        data = SegmentationDataset([], ["a", "b"], 255, "streets", "validation")
        row = measured(config, data, metrics, 7)
        assert row["mIoU"] == 41.24 and row["mIoU (paper)"] == 38.0 and row["images"] == 7 and "mACC" not in row
        files = result_files({"results": [row]})
        assert bool(files) == found
        if found:
            (entry,) = yaml.safe_load(files["streets-validation.yaml"])
            assert entry["dataset"] == {"id": "me/streets", "task_id": "small"} and entry["value"] == 41.24
            assert set(files) == {"streets-validation.yaml", "streets-validation_paper.yaml"}


def test_a_run_of_adapters_that_nobody_could_load(root, tmp_path):
    """Catches a training that finds out at its end that its side adapters can't be shared."""
    model, processor = from_pretrained(root / "model")
    CLIPModel(model.config.clip_config).save_pretrained(tmp_path / "clip")
    processor.tokenizer.save_pretrained(tmp_path / "clip")
    config = json.loads((root / "model" / "config.json").read_text())
    names = ("fusion_layers", "recognition_layer", "deep_supervision_layers", "image_size", "patch_size", "hidden_size")
    fields = json.dumps({name: config[name] for name in (*names, "num_attention_heads", "num_hidden_layers")})
    overrides = [
        "model.checkpoint=null",
        f"model.clip={tmp_path / 'clip'}",
        f"model.san_config={fields}",
        "checkpoints.adapter_only=true",
        "hub.repo=someone/mine",
    ]
    with pytest.raises(ConfigError, match="a folder of this machine.*model.base=owner/name"):
        train(configure(root, tmp_path / "run", *overrides))
