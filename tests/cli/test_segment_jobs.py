"""`san-hf segment` on many images: going on after a stop, parts for several machines, and given colours."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.inference import Segmentation, Segmenter
from san_hf.inference.segmenter import LoadedImage
from tests.forks import Run


COUNT = 6


@pytest.fixture
def job(model_folder, tmp_path, monkeypatch):
    """Runs `san-hf segment in` in a new folder with six images; returns the result and the images it segmented."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"in/{number}.png")
    calls: list[str] = []
    load = Segmenter.load

    def count(self, image):
        if not isinstance(image, LoadedImage):
            calls.append(Path(image).name)
        return load(self, image)

    monkeypatch.setattr(Segmenter, "load", count)

    def run(*arguments, status=0, classes="cat, grass, sky"):
        calls.clear()
        options = ["in", "--model", str(model_folder), "--classes", classes, "-f", "json", "-f", "png-labels"]
        result = CliRunner().invoke(app, ["segment", *options, *arguments], env={"COLUMNS": "300"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result.output, list(calls)

    return run


def labels(folder="outputs"):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.labels.png"))}


@pytest.fixture
def interrupted(job, monkeypatch):
    """The job after Ctrl-C in the fourth image."""
    save = Segmentation.save

    def stop(self, stem, *arguments, **facts):
        if Path(stem).name == "3":
            raise KeyboardInterrupt
        return save(self, stem, *arguments, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "save", stop)
        output, _ = job(status=130)
    assert "Interrupted: 3 of 6 images are done. The same command with --resume goes on." in output
    return job


def test_resume(interrupted):
    """Catches images that are segmented twice or left out, and results that differ from those of an unbroken run."""
    output, done = interrupted("--resume")
    assert done == ["3.png", "4.png", "5.png"] and "3 of 6 images are done already" in output
    output, done = interrupted("--resume")
    assert done == [] and "6 of 6 images are done already" in output
    interrupted("-o", "unbroken")
    assert labels() == labels("unbroken") and len(labels()) == COUNT


def test_resume_sees_what_has_changed(interrupted):
    """Catches results of an image that was replaced, or that are lost, taken for done."""
    shutil.copy("in/5.png", "in/0.png")
    os.remove("outputs/1.labels.png")
    assert interrupted("--resume")[1] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    found = labels()
    assert found["0.labels.png"] == found["5.labels.png"]
    # A new image that takes the name of another one's results.
    Image.new("RGB", (40, 32)).save("in/0.bmp")
    assert interrupted("--resume")[1] == ["0.bmp", "0.png"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": "cat, sky"}, r'the class names was ["cat", "grass", "sky"] and is ["cat", "sky"]'),
        ({"arguments": ["--threshold", "0.5"]}, "threshold was not given and is 0.5"),
        ({"arguments": ["-f", "mask"]}, "the formats was"),
        ({"arguments": ["--dtype", "bfloat16"]}, "the dtype was"),
        ({"arguments": ["--colors", "sky=red"]}, "the colours was"),
    ],
)
def test_other_settings_are_not_mixed(interrupted, change, message):
    """Catches a folder whose label 1 means grass in one file and sky in another."""
    before = labels()
    output, done = interrupted(
        "--resume", *change.get("arguments", []), status=2, classes=change.get("classes", "cat, grass, sky")
    )
    assert message in output and "Resume with those, or use another --output" in output
    assert done == [] and labels() == before


def test_without_resume_nothing_is_replaced(interrupted):
    """Catches a second start that silently goes on, and a damaged journal that is believed."""
    assert "exists already" in interrupted(status=2)[0]
    journal = Path("outputs/.segment.jsonl")
    content = journal.read_bytes()
    journal.write_bytes(content[:-5])  # killed while it was written
    assert interrupted("--resume")[1] == ["2.png", "3.png", "4.png", "5.png"]
    for damaged in (b"\x00" * 50 + b"\n", b"{}\n", b"[]\n", b"\n"):
        journal.write_bytes(damaged)
        output, _ = interrupted("--resume", status=2)
        assert ".segment.jsonl" in output and "--overwrite" in output


def test_shards(job):
    """Catches images in two parts or in none, and outputs of two parts with one name."""
    shutil.copy("in/0.png", "in/0.tiff")
    parts = [job("--shard", f"{number}/3", "-o", "parts")[1] for number in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted(os.listdir("in")) and {len(part) for part in parts} == {2, 3}
    job("-o", "whole")
    assert labels("parts") == labels("whole")
    assert job("--shard", "2/3", "-o", "parts", "--resume")[1] == []


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/2", "²/3"])
def test_shards_that_are_none(job, shard):
    """Catches a part that is empty or all of them."""
    output, done = job("--shard", shard, status=2)
    assert f"Got --shard '{shard}', expected NUMBER/COUNT" in output and done == []


def test_given_colors(job, tmp_path):
    """Catches a colour that the file has and the legend hasn't, or the other way round."""
    Path("colors.txt").write_text("sky=#87ceeb\ngrass=#00ff00\n")
    job("--colors", "colors.txt", "--colors", "grass=#112233", "-f", "mask")
    colors = {entry["name"]: entry["color"] for entry in json.loads(Path("outputs/0.json").read_text())["classes"]}
    assert (colors["sky"], colors["grass"]) == ("#87ceeb", "#112233")
    mask, found = np.asarray(Image.open("outputs/0.mask.png")), np.asarray(Image.open("outputs/0.labels.png"))
    for label, color in ((1, (0x11, 0x22, 0x33)), (2, (0x87, 0xCE, 0xEB))):
        assert (mask[found == label] == color).all()
    assert "expected name=colour" in job("--colors", "sky", "--overwrite", status=2)[0]
    assert "expected three whole numbers" in job("--colors", "sky=blurple", "--overwrite", status=2)[0]


def test_equal_segmentations():
    """Catches `==` that raises for arrays, or is true of other labels, names, colours or images."""
    image, label_map = Image.new("RGB", (3, 2)), np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)
    one = Segmentation(image, label_map, ["sky", "grass"])
    same = Segmentation(image.copy(), label_map.astype(np.uint16), ("sky", "grass"))
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    others = [
        Segmentation(image, 1 - label_map, ["sky", "grass"]),
        Segmentation(image, label_map, ["sky", "tree"]),
        Segmentation(image, label_map, ["sky", "grass"], expanded=True),
        Segmentation(image, label_map, ["sky", "grass"], given_colors={"sky": "red"}),
        Segmentation(Image.new("RGB", (3, 2), (1, 1, 1)), label_map, ["sky", "grass"]),
        Segmentation(image.resize((2, 3)), label_map.reshape(3, 2), ["sky", "grass"]),
    ]
    assert all(one != other for other in others) and one != "sky"


def segment_here(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["segment", "in", *arguments], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_processes_share_the_images(job, model_folder):
    """
    Images of two processes or of none; a process that ends with a status while another is at work, which a launcher
    then kills; a run that goes on in another number of processes from the beginning.
    """
    options = ["--model", str(model_folder), "--classes", "cat, grass, sky", "-f", "json", "-f", "png-labels"]
    job("-o", "whole")
    outcomes = Run(segment_here, *options, "-o", "shared", processes=2).outcomes()
    assert [status for status, _ in outcomes] == [0, 0]
    written = [{line.split(" -> ")[0] for line in output.splitlines() if " -> " in line} for _, output in outcomes]
    assert written == [{f"in/{number}.png" for number in range(first, COUNT, 2)} for first in (0, 1)]
    assert labels("shared") == labels("whole")
    assert job("-o", "shared", "--resume")[1] == []

    Path("in/3.png").write_bytes(b"no image")
    os.remove("shared/0.labels.png")
    assert job("-o", "shared", "--resume", status=1)[1] == ["0.png", "3.png"]
    first, second = Run(segment_here, *options, "-o", "shared", "--resume", processes=2).outcomes()
    assert (first[0], second[0]) == (1, 1)
    assert "5 of 6 images are done already" in first[1] and "1 of 6 images could not be segmented" in first[1]
    assert "in/3.png" in second[1] and "could not be segmented" not in second[1]


def test_processes_with_a_device_for_all():
    """Two processes on one GPU, and the others idle."""
    for error, message in Run(segment_here, "--device", "cuda:0", processes=2).outcomes():
        assert (error, message) == (
            2,
            "Error: Got --device cuda:0 for several processes: each has its own, leave the option out.\n",
        )


def test_a_single_process_for_several(job, monkeypatch):
    """Machines that each segment all images, as accelerate launch starts one process for itself on CPUs."""
    for variable, value in {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(variable, value)
    output, done = job(status=2)
    assert "torchrun --nproc_per_node 2 -m san_hf segment" in output and done == []


def test_reading_and_writing_beside_the_model(job, monkeypatch):
    """
    While the model is at work on an image, the next is read and the one before is written. Catches images that are all
    read at once, which would fill the memory, one that is read twice, and results in another order.
    """
    counts, most, order = {"read": 0, "segmented": 0, "saved": 0}, {"read": 0, "segmented": 0}, []
    threads = {}
    load, call, save = Segmenter.load, Segmenter.__call__, Segmentation.save

    def note(what, earlier):
        counts[what] += 1
        threads.setdefault(what, threading.get_ident())
        most[earlier] = max(most[earlier], counts[earlier] - counts[what])

    def loads(self, image):
        if not isinstance(image, LoadedImage):
            threads.setdefault("read", threading.get_ident())
            counts["read"] += 1
        return load(self, image)

    def segments(self, image):
        note("segmented", "read")
        return call(self, image)

    def saves(self, stem, *arguments, **facts):
        order.append(Path(stem).name)
        files = save(self, stem, *arguments, **facts)
        note("saved", "segmented")
        return files

    monkeypatch.setattr(Segmenter, "load", loads)
    monkeypatch.setattr(Segmenter, "__call__", segments)
    monkeypatch.setattr(Segmentation, "save", saves)
    output, _ = job()
    assert counts == {"read": COUNT, "segmented": COUNT, "saved": COUNT}
    assert most["read"] <= 2 and most["segmented"] <= 2
    assert order == [str(number) for number in range(COUNT)]
    assert len(set(threads.values())) == 3
    positions = [output.index(f"in/{number}.png ->") for number in range(COUNT)]
    assert positions == sorted(positions)


def test_results_are_those_of_one_image_at_a_time(job, model_folder):
    """Catches results that depend on what else is read or written meanwhile."""
    job("-f", "overlay")
    segmenter = Segmenter.from_pretrained(model_folder, ["cat", "grass", "sky"])
    for number in range(COUNT):
        segmenter(f"in/{number}.png").save(f"alone/{number}", ["png-labels", "overlay"])
        for ending in (".labels.png", ".overlay.png"):
            assert Path(f"outputs/{number}{ending}").read_bytes() == Path(f"alone/{number}{ending}").read_bytes()


def test_one_image_that_fails_stops_no_other(job, monkeypatch):
    """Catches an error of a thread that ends the job, is lost, or is told of another image."""
    Path("in/1.png").write_bytes(b"no image")
    save = Segmentation.save

    def fails(self, stem, *arguments, **facts):
        if Path(stem).name == "3":
            raise OSError("the disk is full")
        return save(self, stem, *arguments, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "save", fails)
        output, read = job(status=1)
    assert read == [f"{number}.png" for number in range(COUNT)]
    assert "in/1.png: not an image" in output and "in/3.png: the disk is full" in output
    assert "2 of 6 images could not be segmented" in output
    assert sorted(labels()) == [f"{number}.labels.png" for number in (0, 2, 4, 5)]
    assert job("--resume", status=1)[1] == ["1.png", "3.png"]
