"""Frames out of video files and image sequences, and into video files."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from san_hf.messages import Notice
from san_hf.video import PART_FORMAT, VideoError, VideoWriter, join_videos, open_frames
from tests.videos import av, noise, read_clip, write_clip


def pixels(frames) -> list[np.ndarray]:
    return [np.asarray(frame.image) for frame in frames]


def test_frames_and_times(tmp_path):
    """Catches frames that are lost, doubled or out of order, and times that are made up from a mean rate."""
    images, ticks = noise(5), [100, 140, 150, 290, 300]
    path = write_clip(tmp_path / "clip.mkv", images, ticks, Fraction(1, 1000))
    frames = open_frames(path)
    for _ in range(2):  # each reading begins anew
        read = list(frames)
        assert [frame.time for frame in read] == [Fraction(tick - 100, 1000) for tick in ticks]
        assert [frame.name for frame in read] == [f"{number:06d}" for number in range(5)]
        assert all(np.array_equal(frame.image, image) for frame, image in zip(read, images))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation(tmp_path, rotation):
    """Catches a phone's upright video that is segmented lying, or turned the wrong way."""
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("needs PyAV 17.1 or later, to write a display matrix")
    image = noise(1)[0]
    path = write_clip(tmp_path / "clip.mov", [image], codec="png", pix_fmt="rgb24", rotation=rotation)
    (frame,) = open_frames(path)
    assert np.array_equal(frame.image, image.rotate(rotation, expand=True))


def test_transparent_and_deep_pixels(tmp_path):
    """Catches transparent pixels that turn black, as no image's do, and 10-bit frames that aren't read."""
    image = noise(1)[0].convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]).repeat(24), (32, 1))))
    path = write_clip(tmp_path / "clip.mov", [image], codec="png", pix_fmt="rgba")
    (frame,) = pixels(open_frames(path))
    assert (frame[:, :24] == 255).all() and np.array_equal(frame[:, 24:], np.asarray(image)[:, 24:, :3])
    grey = Image.new("RGB", (48, 32), (90, 140, 200))
    path = write_clip(tmp_path / "deep.mkv", [grey], codec="ffv1", pix_fmt="yuv420p10le")
    (frame,) = pixels(open_frames(path))
    assert np.abs(frame.astype(int) - np.asarray(grey)).max() <= 3
    options = {"color_trc": "smpte2084"}
    path = write_clip(tmp_path / "hdr.mkv", [grey], codec="ffv1", pix_fmt="yuv420p10le", options=options)
    with pytest.warns(Notice, match="high dynamic range"):
        list(open_frames(path))


def test_sequences(tmp_path):
    """Catches 10.png before 2.png, the results of an earlier run as frames, and one name for two frames' results."""
    for number, image in zip((1, 2, 10), noise(3)):
        image.save(tmp_path / f"{number}.png")
    noise(4)[3].save(tmp_path / "2.bmp")
    (tmp_path / "out").mkdir()
    noise(1)[0].save(tmp_path / "out" / "1.png")
    frames = list(open_frames(tmp_path, exclude=tmp_path / "out"))
    assert [frame.source.name for frame in frames] == ["1.png", "2.bmp", "2.png", "10.png"]
    assert [frame.name for frame in frames] == ["1", "2", "2-2", "10"]
    assert {frame.time for frame in frames} == {None}
    timed = list(open_frames(str(tmp_path / "*.png"), rate=Fraction(5)))
    assert [(frame.source.name, frame.time) for frame in timed] == [
        ("1.png", 0),
        ("2.png", Fraction(1, 5)),
        ("10.png", Fraction(2, 5)),
    ]


def test_what_is_no_video(tmp_path):
    """Catches stack traces, and errors that don't say which file and why."""
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        file.mux(stream.encode(frame))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    cases = {
        tmp_path / "missing.mp4": "there is no such file",
        text: "can't be read as a video: Invalid data found",
        sound: "has no video stream",
        playlist: "can't be read|has no video",
        tmp_path / "no*.png": "Nothing matches the pattern",
        "http://127.0.0.1:9/a.mp4": "there is no such file",
    }
    for source, message in cases.items():
        with pytest.raises(VideoError, match=message):
            list(open_frames(source))
    with pytest.raises(VideoError, match="has a frame rate of its own"):
        open_frames(text, rate=Fraction(5))
    with pytest.raises(VideoError, match="expected more than 0"):
        (tmp_path / "one").mkdir()
        noise(1)[0].save(tmp_path / "one" / "1.png")
        open_frames(tmp_path / "one", rate=Fraction(-1))


def test_a_name_with_a_colon(tmp_path, monkeypatch):
    """Catches a file's name taken for a protocol of FFmpeg's."""
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.mkv"), noise(2)).rename("concat:clip.mkv")
    assert len(list(open_frames("concat:clip.mkv"))) == 2


def test_files_that_are_cut_off(tmp_path):
    """Catches a half video taken for a whole one, and what could be read being lost."""
    options = {"movflags": "faststart"}
    images = noise(60)
    path = write_clip(tmp_path / "clip.mp4", images, codec="libx264", pix_fmt="yuv420p", container_options=options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    read = []
    with pytest.raises(VideoError, match="can't be decoded|seems to be cut off"):
        for frame in open_frames(path):
            read.append(frame.image)
    assert 20 < len(read) < 60


@pytest.mark.parametrize("size, rate", [((48, 32), 25), ((47, 31), 25), ((48, 32), 1000)])
def test_writing_in_parts(tmp_path, size, rate):
    """Catches joined parts that are encoded again, lose frames or times, or have other colours; odd sizes refused."""
    images = noise(6, size)
    times = [Fraction(tick, 1000) for tick in (0, 40, 50, 190, 200, 1000)]
    parts = []
    for first in (0, 4):
        parts.append(tmp_path / f"{first}.part")
        with open(parts[-1], "wb") as file, VideoWriter(file, Fraction(1, 1000), Fraction(rate), PART_FORMAT) as writer:
            for image, time in list(zip(images, times))[first : first + 4]:
                writer.write(image, time)
    with open(tmp_path / "joined.mp4", "wb") as file:
        join_videos(parts, file)
    joined = read_clip(tmp_path / "joined.mp4")
    separate = [pixels for part in parts for _, pixels in read_clip(part)]
    assert [time for time, _ in joined] == pytest.approx([float(time) for time in times])
    assert all(np.array_equal(frame, part) for (_, frame), part in zip(joined, separate))
    for (_, frame), image in zip(joined, images):
        assert frame.shape == (32, 48, 3)
        assert np.abs(frame[: size[1], : size[0]].astype(int) - np.asarray(image)).mean() < 12
        assert np.abs(frame[size[1] - 1, : size[0]].astype(int) - frame[-1, : size[0]]).mean() < 12


def test_written_colours(tmp_path):
    """Catches a matrix of colours other than the one that the file names, which players of large frames go by."""
    with open(tmp_path / "flat.mp4", "wb") as file, VideoWriter(file, Fraction(1, 25), Fraction(25)) as writer:
        writer.write(Image.new("RGB", (1280, 720), (200, 90, 40)), Fraction(0))
    ((_, frame),) = read_clip(tmp_path / "flat.mp4")
    assert np.abs(frame.astype(int) - (200, 90, 40)).max() <= 3
    with av.open(str(tmp_path / "flat.mp4")) as file:
        assert next(file.decode(video=0)).colorspace == 1  # BT.709


def test_writing_another_size():
    """Catches frames that are stretched without a word."""
    with VideoWriter(io.BytesIO(), Fraction(1, 25), Fraction(25)) as writer:
        writer.write(noise(1)[0], Fraction(0))
        with pytest.raises(VideoError, match="A frame is 64 x 32, those before are 48 x 32"):
            writer.write(noise(1, (64, 32))[0], Fraction(1, 25))
