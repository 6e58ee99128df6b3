"""`san-hf video`: what it writes of videos and image sequences, and how it goes on after a stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf.cli import app, video_parts
from san_hf.inference import Predictor, Segmenter, segment_frames
from san_hf.locks import locked
from tests.cli.conftest import run_command
from tests.cli.test_bounds import MEASURE
from tests.videos import noise, read_clip, write_clip


NAMES = ["cat", "grass", "sky"]
COUNT = 11
TICKS = [0, 40, 80, 120, 160, 300, 340, 380, 400, 440, 1000]
ALL_FORMATS = [word for name in ("overlay", "mask", "png-labels", "json") for word in ("-f", name)]


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """`san-hf video` in a new folder with a clip of eleven frames, in parts of four; returns what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(video_parts, "PART_FRAMES", 4)
    monkeypatch.setattr("san_hf.cli.video.PART_FRAMES", 4)
    write_clip(tmp_path / "clip.mkv", noise(COUNT), TICKS, Fraction(1, 1000))

    def run(*arguments, source="clip.mkv", status=0, classes="cat, grass, sky"):
        options = [source, "--model", str(model_folder), "--classes", classes]
        return run_command("video", *options, *arguments, status=status)

    return run


@pytest.fixture
def encoded(monkeypatch):
    """The number of frames that went through the model."""
    counts, encode = [], Predictor.encode

    def count(self, images):
        counts.extend(images)
        return encode(self, images)

    monkeypatch.setattr(Predictor, "encode", count)
    return counts


def labels(folder="outputs/clip.labels") -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())}


def same(first, second) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("smooth", [0, 0.5])
def test_a_video(run, model_folder, smooth):
    """Catches labels other than those of the library, lost frames and times, and numbers that don't add up."""
    output = run(*ALL_FORMATS, "--smooth", str(smooth))
    segmenter = Segmenter.from_pretrained(model_folder, NAMES)
    expected = list(segment_frames(segmenter, noise(COUNT), smooth))
    if smooth == 0:
        assert [one.label_map.tolist() for one in expected] == [
            one.label_map.tolist() for one in segmenter(noise(COUNT))
        ]
    found = labels()
    assert list(found) == [f"{number:06d}.png" for number in range(COUNT)]
    assert all(np.array_equal(label_map, one.label_map) for label_map, one in zip(found.values(), expected))
    lines = [json.loads(line) for line in Path("outputs/clip.frames.jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == [tick / 1000 for tick in TICKS]
    for line, one in zip(lines, expected):
        assert line["pixels"] == {entry["name"]: entry["pixels"] for entry in one.legend() if entry["pixels"]}
    legend = json.loads(Path("outputs/clip.json").read_text())
    assert legend["frames"] == COUNT and legend["video"] == "clip.mkv"
    for label, entry in enumerate(legend["classes"]):
        assert entry["pixels"] == sum(one.pixels[label] for one in expected)
        assert entry["share"] == pytest.approx(entry["pixels"] / (COUNT * 48 * 32))
        assert entry["color"] == expected[0].legend()[label]["color"]
        assert f"{entry['share']:.1%}" in output
    overlay, mask = (read_clip(Path(f"outputs/clip.{name}.mp4")) for name in ("overlay", "mask"))
    for frames in (overlay, mask):
        assert [time for time, _ in frames] == pytest.approx([tick / 1000 for tick in TICKS])
    assert mask[0][1].shape == (32, 48, 3)
    # The legend below is the same in every frame, of all classes; above is the tinted frame.
    assert overlay[0][1].shape[0] > 32
    legends = np.stack([frame[38:] for _, frame in overlay]).astype(int)
    assert np.abs(legends - legends[0]).mean() < 1 and legends.std() > 30
    for (_, drawn), (_, plain), one in zip(overlay, mask, expected):
        assert np.abs(plain.astype(int) - np.asarray(one.mask())).mean() < 25
        tinted = Image.blend(one.image, one.mask(), 0.5)
        assert np.abs(drawn[:32, :48].astype(int) - np.asarray(tinted)).mean() < 25


def test_image_sequences(run, tmp_path):
    """Catches overlays of single images that become a video unasked, or none when asked, and lost names."""
    os.mkdir("shots")
    for number, image in zip((1, 2, 10), noise(3)):
        image.save(f"shots/{number}.png")
    run("-f", "overlay", "-f", "png-labels", source="shots")
    assert sorted(os.listdir("outputs/shots.labels")) == sorted(os.listdir("outputs/shots.overlay"))
    assert sorted(os.listdir("outputs/shots.labels")) == ["1.png", "10.png", "2.png"]
    run("--fps", "5", "-o", "video", source="shots/*.png")
    assert [time for time, _ in read_clip(Path("video/shots.overlay.mp4"))] == pytest.approx([0, 0.2, 0.4])
    assert "frame rate of its own" in run("--fps", "5", "-o", "none", status=2)


def test_every_nth_frame(run):
    """Catches other frames than asked for, and times that shrink with their number."""
    run("--every", "3", *ALL_FORMATS)
    assert list(labels()) == [f"{number:06d}.png" for number in range(0, COUNT, 3)]
    times = [time for time, _ in read_clip(Path("outputs/clip.overlay.mp4"))]
    assert times == pytest.approx([tick / 1000 for tick in TICKS[::3]])


@pytest.fixture
def interrupted(run, monkeypatch):
    """The command after Ctrl-C in the seventh frame, in the second part."""
    draw = video_parts.Drawings.draw

    def stop(self, name, segmentation, counts=[]):  # noqa: B006  # counts the frames
        counts.append(name)
        if counts.count("labels") == 7:
            raise KeyboardInterrupt
        return draw(self, name, segmentation)

    with monkeypatch.context() as patch:
        patch.setattr(video_parts.Drawings, "draw", stop)
        output = run(*ALL_FORMATS, "--smooth", "0.5", status=130)
    assert "Interrupted: 4 frames are done. The same command with --resume goes on." in output
    return run


def test_resume(interrupted, encoded):
    """Catches a run that goes on with other labels or another video than an unbroken one, or does all again."""
    options = [*ALL_FORMATS, "--smooth", "0.5"]
    assert not Path("outputs/clip.overlay.mp4").exists()
    output = interrupted(*options, "--resume")
    # The four frames whose scores are carried into the fifth go through the model again.
    assert "4 frames are done already" in output and len(encoded) == COUNT - 4 + 4
    encoded.clear()
    assert "is done already" in interrupted(*options, "--resume") and not encoded
    interrupted(*options, "-o", "unbroken")
    assert same(labels(), labels("unbroken/clip.labels"))
    for name in ("clip.overlay.mp4", "clip.mask.mp4", "clip.json", "clip.frames.jsonl"):
        assert Path("outputs", name).read_bytes() == Path("unbroken", name).read_bytes(), name


def test_resume_sees_what_is_missing(run, encoded):
    """Catches label frames that were lost and taken for done."""
    run("-f", "png-labels")
    before = labels()
    os.remove("outputs/clip.labels/000005.png")
    encoded.clear()
    run("-f", "png-labels", "--resume")
    assert same(labels(), before) and len(encoded) == COUNT - 4


@pytest.mark.parametrize(
    "change, message",
    [
        (["--smooth", "0.2"], "smooth was 0.5 and is 0.2"),
        (["--every", "2"], "every was 1 and is 2"),
        (["--threshold", "0.5"], "threshold was not given and is 0.5"),
    ],
)
def test_other_settings_are_not_mixed(interrupted, change, message):
    """Catches a video of which one half was made otherwise than the other."""
    output = interrupted(*ALL_FORMATS, "--smooth", "0.5", "--resume", *change, status=2)
    assert message in output and "Resume with those" in output


def test_another_video_of_the_same_name(interrupted):
    """Catches the parts of a video that was replaced taken for those of its successor."""
    write_clip(Path("clip.mkv"), noise(COUNT, seed=1), TICKS, Fraction(1, 1000))
    assert "the source was" in interrupted(*ALL_FORMATS, "--smooth", "0.5", "--resume", status=2)


def test_nothing_is_replaced_unasked(interrupted):
    """Catches results that are lost by a second start, and frames of an earlier, longer run that stay."""
    before = labels()
    assert "--resume to go on with it" in interrupted(*ALL_FORMATS, status=2)
    assert same(labels(), before)
    interrupted("-f", "png-labels", "--every", "5", "--overwrite")
    assert list(labels()) == ["000000.png", "000005.png", "000010.png"]
    assert "exists already" in interrupted("-f", "png-labels", "--every", "5", status=2)


def test_a_run_that_cannot_begin(run, monkeypatch):
    """Catches results that are gone before their successors can be made, and traces that look like a begun run."""
    run("-f", "png-labels")
    before = labels()
    for options in (["--model", "nowhere"], ["--classes", "cat, cat"]):
        run("-f", "png-labels", "--overwrite", *options, status=2)
        assert same(labels(), before) and "done already" in run("-f", "png-labels", "--resume")
        run("-f", "png-labels", "-o", "new", *options, status=2)
        assert not os.listdir("new")
    with locked(Path("outputs/.clip.video/.lock"), "A test"):
        results: list = []
        thread = threading.Thread(target=lambda: results.append(run("--overwrite", "-f", "png-labels", status=2)))
        thread.start()
        thread.join()
    assert "is under way already" in results[0] and same(labels(), before)


def test_a_large_vocabulary_has_no_legend(run):
    """Catches a legend larger than the video."""
    names = [f"thing {number}" for number in range(33)]
    assert "No legend in the overlay of more than 32" in run(classes=", ".join(names))
    assert read_clip(Path("outputs/clip.overlay.mp4"))[0][1].shape == (32, 48, 3)


def test_segment_says_what_to_use(run):
    """Catches an error that leaves those alone who segment a video as an image."""
    result = CliRunner().invoke(app, ["segment", "clip.mkv", "--classes", "cat"], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and "a video, not an image: san-hf video segments those" in result.output


def test_a_video_that_breaks_off(run):
    """Catches a broken file that is taken for whole, loses what could be read, or shows a stack trace."""
    options = {"movflags": "faststart"}
    path = write_clip(Path("broken.mp4"), noise(60), codec="libx264", pix_fmt="yuv420p", container_options=options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    output = run(*ALL_FORMATS, source="broken.mp4", status=1)
    assert "Error: broken.mp4" in output and "Traceback" not in output
    count = json.loads(Path("outputs/broken.json").read_text())["frames"]
    assert 20 < count < 60 and f"{count} frames -> outputs/broken.overlay.mp4" in output
    assert len(labels("outputs/broken.labels")) == len(read_clip(Path("outputs/broken.overlay.mp4"))) == count
    # Nothing of it is taken for the end.
    assert "seems to be cut off" in output or "can't be decoded" in output
    assert run(*ALL_FORMATS, "--resume", source="broken.mp4", status=1).count("frames ->") == 5


def test_sources_that_cannot_be_read(run):
    """Catches errors without a sentence, and folders that are left by runs that did nothing."""
    Path("text.mp4").write_text("no video")
    for source, message in {
        "missing.mp4": "there is no such file",
        "text.mp4": "can't be read as a video",
        "none*.png": "Nothing matches",
    }.items():
        assert message in run(source=source, status=2)
    os.mkdir("shots")
    assert "There is no image in the folder" in run(source="shots", status=2)
    Path("shots/1.png").write_text("no image")
    assert "not an image" in run(source="shots", status=2)
    noise(1)[0].save("shots/0.png")
    assert "1 frame -> outputs/shots.overlay" in run("--overwrite", source="shots", status=1)
    noise(1, (64, 32))[0].save("shots/1.png")
    assert "must be of one size" in run("--overwrite", "--fps", "5", "-f", "mask", source="shots", status=2)


def test_without_pyav(run, monkeypatch):
    """Catches a stack trace where the extra isn't installed, and image sequences that need it."""
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'san_hf[video]'" in run(status=2)
    os.mkdir("shots")
    noise(1)[0].save("shots/0.png")
    run(source="shots")
    assert "pip install 'san_hf[video]'" in run("--fps", "5", "-o", "timed", source="shots", status=2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow(model_folder, tmp_path):
    """Catches frames, label maps or packets that are kept: of ten times as many frames, the peak of memory."""
    peaks = []
    for count in (100, 1000):
        clip = write_clip(tmp_path / f"{count}.mkv", noise(count, (320, 240)))
        command = [sys.executable, "-S", "-c", MEASURE, sys.executable, "-m", "san_hf", "video", clip]
        command += ["--model", model_folder, "--classes", "cat, sky", *ALL_FORMATS, "--smooth", "0.5", "-o", tmp_path]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
        status, peak = map(int, process.stdout.split()[-2:])
        assert status == 0, process.stderr
        peaks.append(peak / 1024)
    # A frame of this size has 0.2 MB.
    assert peaks[1] < peaks[0] + 40, peaks


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on(model_folder, tmp_path):
    """Catches results that a kill -9 in the middle changes: real processes, parts of the real size."""
    clip = write_clip(tmp_path / "clip.mkv", noise(200, (96, 64)))
    command = [sys.executable, "-m", "san_hf", "video", clip, "--model", model_folder, "--classes", "cat, sky"]
    command += [*ALL_FORMATS, "--smooth", "0.5", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*map(str, command), str(tmp_path / "killed")], env=environment)
    journal = tmp_path / "killed" / ".clip.video" / ".segment.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "clip.overlay.mp4").exists()
    for arguments in (["killed", "--resume"], ["whole"]):
        words = [*map(str, command), str(tmp_path / arguments[0]), *arguments[1:]]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert same(labels(tmp_path / "killed" / "clip.labels"), labels(tmp_path / "whole" / "clip.labels"))
    killed, whole = (read_clip(tmp_path / name / "clip.overlay.mp4") for name in ("killed", "whole"))
    assert len(whole) == 200 and [time for time, _ in killed] == [time for time, _ in whole]
    assert all(np.array_equal(first, second) for (_, first), (_, second) in zip(killed, whole))
