"""Many images by workers: the class that engines make one of in each process."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from san_hf.inference import SegmentationWorker, Segmenter, list_jobs
from tests.pages import blocks, run_in_a_fork


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "san_hf" / "inference" / "README.md"
NAMES = ["sky", "grass", "house"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images in two folders, two of one name, and a file that is none."""
    (tmp_path / "in" / "öst").mkdir(parents=True)
    for number, name in enumerate(["a.png", "a.bmp", "b.png", "öst/a.png", "öst/c d.png"]):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"none")
    return tmp_path / "in"


def columns(rows):
    # As Ray Data gives them: arrays, not lists.
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_worker(folder, tmp_path):
    """Results of another image, of one of the same name, or none without an error; a broken file that ends the job."""
    jobs = list_jobs(folder, tmp_path / "out")
    assert len(jobs) == 6 and len({job["output"] for job in jobs}) == 6
    worker = SegmentationWorker(class_names=NAMES, formats=["png-labels", "confidence"])
    manifest = worker(columns(jobs))
    assert manifest["image"] == [job["image"] for job in jobs]
    segmenter = Segmenter.from_pretrained(class_names=NAMES)
    for image, written, error in zip(*manifest.values(), strict=True):
        if image.endswith("broken.png"):
            assert written == [] and "not an image" in error
        else:
            assert error == "" and len(written) == 3 and all(map(os.path.isfile, written))
            found = np.asarray(Image.open(next(file for file in written if file.endswith(".labels.png"))))
            np.testing.assert_array_equal(found, segmenter(image).label_map)
    # Given again, as after a kill; outputs within the folder are no images of the job.
    assert worker(columns(jobs)) == manifest
    assert list_jobs(folder, folder / "a") == list_jobs(folder, folder / "a")
    before = [job["image"] for job in list_jobs(folder, folder / "out")]
    worker(columns(list_jobs(folder, folder / "out")))
    assert [job["image"] for job in list_jobs(folder, folder / "out")] == before
    assert worker({"image": [], "output": []}) == {"image": [], "files": [], "error": []}


class Mortal(SegmentationWorker):
    """Is killed once, in the middle of the job, as by a system that has no memory left."""

    def __call__(self, batch):
        mark = Path(os.environ["MARK"])
        if any(str(image).endswith("3.png") for image in batch["image"]) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.mark.slow
def test_ray_with_a_killed_worker(tmp_path, monkeypatch):
    """An image that is lost, or twice in the manifest, after a worker was killed."""
    ray = pytest.importorskip("ray", reason="needs ray[data]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    (tmp_path / "in").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    ray.init(
        num_cpus=4,  # two workers, and what feeds them
        include_dashboard=False,
        runtime_env={"env_vars": {"MARK": str(tmp_path / "killed"), "PYTHONPATH": str(ROOT)}},
    )
    try:
        jobs = list_jobs(tmp_path / "in", tmp_path / "out")
        rows = (
            ray.data.from_items(jobs)
            .repartition(4)
            .map_batches(Mortal, fn_constructor_kwargs={"class_names": NAMES}, batch_size=2, concurrency=2)
            .take_all()
        )
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    assert sorted(row["image"] for row in rows) == [job["image"] for job in jobs]
    assert all(row["error"] == "" and all(map(os.path.isfile, row["files"])) for row in rows)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    (tmp_path / "photos").mkdir()
    for name in ("1.png", "2.png"):
        shutil.copy(str(files("san_hf") / "checkpoints" / "picture-book" / "sample.png"), tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs(photos):
    """Code on the page that no longer works."""
    marked = blocks(PAGE)
    assert all(mark for mark, language, _ in marked if language in ("bash", "python"))
    for mark, language, code in marked:
        if language == "python" and mark == "run":
            run_in_a_fork(code, photos)
        elif language == "python":
            compile(code, "page", "exec")
    assert {file.name for file in (photos / "by-worker").iterdir()} == {
        f"{number}.{ending}" for number in (1, 2) for ending in ("labels.png", "json")
    }


@pytest.mark.slow
def test_commands_of_the_page_run(photos):
    """torchrun's processes that don't share, or that end with a trace."""
    command = photos / "torchrun"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{photos}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for mark, language, code in blocks(PAGE):
        if (mark, language) == ("run", "bash"):
            done = subprocess.run(["bash", "-euc", code], env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {file.name for file in (photos / "labels").glob("*.png")} == {"1.labels.png", "2.labels.png"}
