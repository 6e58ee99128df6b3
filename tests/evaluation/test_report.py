"""Results as files and tables, and beside the published results."""

import csv
import io
import json
import math
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.data.benchmarks import BENCHMARKS
from san_hf.evaluation import ConfusionMatrixMetrics, read_results, write_results
from san_hf.evaluation.published import (
    PUBLISHED_MODELS,
    published_images,
    published_results,
    reasons_not_comparable,
)
from san_hf.vocabularies import load_vocabulary


@pytest.fixture
def results():
    """Over VOC's 20 classes: IoU of aeroplane 2/3, of bicycle 2/4; bird and tv are only predicted."""
    metrics = ConfusionMatrixMetrics(20, 255)
    metrics.update(torch.tensor([[0, 0, 2, 1, 1, 0]]), torch.tensor([[0, 0, 0, 1, 255, 255]]))
    metrics.update(torch.tensor([[1]]), torch.tensor([[1]]))
    metrics.update(torch.tensor([[19, 19]]), torch.tensor([[1, 1]]))
    return metrics.compute(load_vocabulary("voc"))


@pytest.fixture
def folder(tmp_path, results):
    settings = {"limit": 3, "expand": None, "augment": True}
    write_results(tmp_path / "voc", results, model="my|san", dataset="voc", split="validation", settings=settings)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["results", *map(str, arguments)])


def test_files(folder, results):
    """Catches figures that change on the way to a file, NaN in JSON, and left-over partial files."""
    assert sorted(file.name for file in (folder / "voc").iterdir()) == ["per_class.csv", "results.json", "results.md"]
    text = (folder / "voc" / "results.json").read_text()
    assert "NaN" not in text
    saved = json.loads(text)
    assert saved["metrics"] == results.metrics and saved["images"] == 3 and saved["settings"]["limit"] == 3
    assert saved["per_class"][5] == {
        "index": 5, "name": "bus", "IoU": None, "ACC": None, "ground_truth": 0, "predicted": 0
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO((folder / "voc" / "per_class.csv").read_text())))
    assert [row["name"] for row in rows] == load_vocabulary("voc")
    assert float(rows[0]["IoU"]) == results.per_class[0]["IoU"] and rows[5]["IoU"] == ""
    (report,) = read_results(folder)
    assert report.metrics == results.metrics and set(report.versions) == {"san_hf", "torch", "transformers"}


def test_markdown(folder):
    """Catches definitions that aren't named, and cells that names break."""
    lines = (folder / "voc" / "results.md").read_text().splitlines()
    assert lines[0] == "# my\\|san on voc"
    assert "| mIoU (over classes in the ground truth) | 58.33 |" in lines
    assert "| mIoU_over_present_or_predicted (over classes in the ground truth or the predictions) | 29.17 |" in lines
    assert "| 0 | aeroplane | 66.67 | 66.67 | 3 | 2 |" in lines
    assert "| 2 | bird | - | - | 0 | 1 |" in lines
    assert "Settings: limit: 3, augment: True." in lines[2]


def test_names_that_markdown_reads(tmp_path):
    """Catches a class name that becomes HTML, emphasis, or a cell of its own."""
    metrics = ConfusionMatrixMetrics(3, 255)
    metrics.update(torch.zeros(4, 4, dtype=int), torch.zeros(4, 4, dtype=int))
    facts = {"model": "m", "dataset": "<i>", "split": "validation", "settings": {}}
    write_results(tmp_path, metrics.compute(["<b>sky", "_a_ `b`", "c|d"]), **facts)
    text = (tmp_path / "results.md").read_text()
    assert all(f"| {cell} |" in text for cell in (r"\<b\>sky", r"\_a\_ \`b\`", r"c\|d")) and "# m on \\<i\\>" in text


@pytest.mark.parametrize("width", [20, 40, 60])
def test_numbers_in_a_narrow_window(folder, monkeypatch, width):
    """Catches numbers that are cut or folded where a window is narrow."""
    monkeypatch.setattr("san_hf.cli.results.table_console", lambda: Console(width=width))
    shown = run(folder, "--per-class").output
    for number in ("58.33", "93.95", "-35.62", "66.67"):
        assert number in shown.split()


def test_beside_the_published_results(folder):
    """Catches a figure beside one of the other definition, a wrong sign, and cautions that aren't given."""
    shown = run(folder)
    assert shown.exit_code == 0
    rows = {tuple(line.split()[:1] + line.split()[2:4]): line.split() for line in shown.output.splitlines() if line}
    assert rows["mIoU", "san-vit-b-16", "log"][4:] == ["93.95", "-35.62"]
    assert rows["mIoU", "san-vit-large-14", "log"][4:] == ["95.18", "-36.85"]
    assert rows["mIoU_over_present_or_predicted", "san-vit-b-16", "paper"][4:] == ["94.00", "-64.83"]
    assert rows["mIoU_over_present_or_predicted", "san-vit-large-14", "paper"][4:] == ["94.60", "-65.43"]
    assert rows["mACC", "san-vit-b-16", "log"][4] == "96.67"
    assert "of 3 images, the validation split has 1,449" in shown.output
    assert "test-time augmentation" in shown.output


def test_formats_agree(folder):
    """Catches a format that leaves out a model, a metric or a class."""
    entry = json.loads(run(folder, "--format", "json").output)[0]
    rows = list(csv.DictReader(io.StringIO(run(folder, "--format", "csv").output)))
    assert [(row["metric"], row["published for"]) for row in rows] == [
        (row["metric"], row["published for"]) for row in entry["comparison"]
    ]
    assert [float(row["difference"]) for row in rows] == [row["difference"] for row in entry["comparison"]]
    assert len(entry["not comparable"]) == 2 and "per_class" not in entry["report"]
    assert "| pACC | 57.14 | san-vit-b-16 | log | 97.16 | -40.02 |" in run(folder, "--format", "markdown").output
    one = run(folder, "--published", "san-vit-large-14", "--format", "markdown", "--per-class").output
    assert "san-vit-b-16" not in one and "| pACC | 57.14 | - | - | - | - |" in one and "| 19 | tv |" in one
    classes = list(csv.DictReader(io.StringIO(run(folder, "--format", "csv", "--per-class").output)))
    assert [row["name"] for row in classes] == load_vocabulary("voc")


def test_several_results(folder, results):
    """Catches results with boundaries beside some without, and a set for which nothing is published."""
    metrics = ConfusionMatrixMetrics(2, 255, boundary=True)
    metrics.update(torch.zeros(4, 4, dtype=int), torch.zeros(4, 4, dtype=int))
    facts = {"model": "my-san", "dataset": "garden", "split": "validation", "settings": {}}
    write_results(folder / "garden", metrics.compute(["grass", "sky"]), **facts)
    shown = run(folder)
    assert shown.exit_code == 0 and "nothing is published for garden" in shown.output
    assert shown.output.index("my-san on garden") < shown.output.index("my|san on voc")
    rows = list(csv.DictReader(io.StringIO(run(folder, "--format", "csv", "--per-class").output)))
    assert len(rows) == 22 and rows[0]["dataset"] == "garden" and rows[0]["BoundaryIoU"] != ""
    assert rows[2]["BoundaryIoU"] == ""


def test_published_results():
    """Catches a benchmark that lost its metrics, or figures of the other definition (PC-459's differ most)."""
    assert published_results("san-vit-b-16", "pascal-context-459") == {
        "mIoU": 16.71, "mIoU_over_present_or_predicted": 12.6, "fwIoU": 55.25, "mACC": 32.77, "pACC": 64.43
    }  # fmt: skip
    for model in PUBLISHED_MODELS:
        for dataset in BENCHMARKS:
            found = published_results(model, dataset)
            assert "mIoU" in found and ("mIoU_over_present_or_predicted" in found) == (dataset != "coco-stuff")
    assert published_results("san-vit-b-16", "garden") == {}
    with pytest.raises(ValueError, match="san-vit-b-16, san-vit-large-14"):
        published_results("san", "voc")


def test_reasons_not_comparable():
    """Catches a result of other settings that passes for comparable, and a comparable one that doesn't."""
    plain = {"limit": None, "expand": None, "synonyms": False, "templates": None, "augment": False, "dtype": "float32"}
    names = load_vocabulary("voc")
    assert reasons_not_comparable("voc", "validation", 1449, names, plain) == []
    assert reasons_not_comparable("voc", "validation", 1449, names, plain | {"templates": "vild"}) == []
    changes = [{"expand": "coco"}, {"synonyms": True}, {"templates": "imagenet"}, {"augment": True}]
    for change in [*changes, {"templates": ["a {}.", "one {}."]}]:
        (reason,) = reasons_not_comparable("voc", "validation", 1449, names, plain | change)
        assert reason
    assert "2 of the model's own" in reason
    (reason,) = reasons_not_comparable("voc", "train", 10582, names, plain)
    assert "split train" in reason
    (reason,) = reasons_not_comparable("voc", "validation", 1448, names, plain)
    assert "1,448 images" in reason
    (reason,) = reasons_not_comparable("voc", "validation", 1449, ["plane", *names[1:]], plain)
    assert reason == "its classes have other names: 'plane' for 'aeroplane'"
    (reason,) = reasons_not_comparable("voc", "validation", 1449, names[1:], plain)
    assert "19 classes" in reason


@pytest.mark.parametrize("dataset", ["pascal-context-59", "pascal-context-459"])
def test_both_releases_of_pascal_context(dataset):
    """Catches a result on all 5,104 images of the published ones that is called incomparable, and one on other images
    that is compared without a word."""
    names = load_vocabulary(dataset)
    for images, words in ((5104, "on the same images"), (5105, "other images: .* of the 5,104 .*, these of 5,105")):
        assert reasons_not_comparable(dataset, "validation", images, names, {}) == []
        assert re.search(words, published_images(dataset, images) or "")
    (reason,) = reasons_not_comparable(dataset, "validation", 5103, names, {})
    assert "5,103 images, the validation split has 5,105 or 5,104 (of the merged JSON file)" in reason
    assert published_images("voc", 1449) is None and published_images("garden", 3) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Invalid JSON"), ("{}", "at 'model'"), (None, "no results.json"), ('{"images": "3"}', "results.json")],
)
def test_wrong_files(tmp_path, text, message):
    """Catches a stack trace, or an error that doesn't name the file."""
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    shown = run(tmp_path)
    assert shown.exit_code == 2
    assert message in shown.stderr and str(tmp_path) in shown.stderr and "Traceback" not in shown.output


def test_no_folder_to_write(tmp_path, results):
    """Catches a figure that is lost without a word."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_results(tmp_path / "file", results, model="m", dataset="d", split="s", settings={})
    assert not math.isnan(results.metrics["mIoU"])
