"""The app's server, asked as the page asks it, and as somebody asks who means no good. Needs the extra `app`."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from san_hf.app.limits import Limits
from san_hf.app.requests import MOST_BYTES, names_no_upload
from san_hf.hub.names import EMBEDDED_MODEL, EMBEDDED_NOTE
from san_hf.inference import Segmenter
from tests.app.visitor import Visitor


pytest.importorskip("gradio", reason="needs gradio: pip install 'san_hf[app]'")

from san_hf.app.interface import build_interface, launched


LIMITS = Limits(pixels=100 * 64, upload=50_000, names=10)


@pytest.fixture
def page(models):
    with launched(models, LIMITS) as page:
        yield page


def shown(visitor: Visitor, values: list) -> np.ndarray:
    """The result's pixels."""
    answer = visitor.http.get(f"/gradio_api/file={values[0]['path']}")
    assert answer.status_code == 200
    (file := Path(os.environ["GRADIO_TEMP_DIR"]) / "shown.png").write_bytes(answer.content)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_what_the_embedded_model_is_for(models, predictor):
    """Catches visitors who give it photographs, and take the answer for the method's."""
    assert EMBEDDED_NOTE not in str(build_interface(models, LIMITS).get_config_file())
    models.add(EMBEDDED_MODEL, predictor)
    config = str(build_interface(models, LIMITS).get_config_file())
    assert EMBEDDED_NOTE in config and "Example, for the words: blue bird, orange house" in config


def test_a_visit(page, predictor, pictures, passes):
    """Catches an answer that isn't the segmenter's, words that need a vision pass, and files of something else."""
    visitor = Visitor(page.local_url)
    picture = visitor.upload(pictures[0])
    names = ["a", "b", "c", "d", "e"]
    segmenter = Segmenter(predictor.model, predictor.processor, names, confidence=True)
    visitor.ask(picture, ["f", "g"])
    values = visitor.ask(picture, ["a, b", "c", "d", "e"])
    assert passes["images"] == 1 and "vision passes for this picture: 1" in values[2]
    expected = segmenter(pictures[0])
    mask = shown(visitor, values)
    for entry in expected.legend():
        if entry["pixels"]:
            (color,) = np.unique(mask[expected.label_map == entry["label"]], axis=0)
            assert "#{:02x}{:02x}{:02x}".format(*color) in values[1] and f"{entry['share']:.1%}" in values[1]
    assert set(values[4]["names"]) == {entry["name"] for entry in expected.legend() if entry["pixels"]}
    # Without words there is nothing to show; the same words again show the same.
    assert visitor.call("segment_if_complete", picture, [], "", "", 0, "tiny", "mask", 0.5) == [None, "", "", "", None]
    again = visitor.ask(picture, ["a, b", "c", "d", "e"])
    assert (again[1], again[2], again[4]) == (values[1], values[2], values[4])
    assert np.array_equal(shown(visitor, again), mask) and passes["images"] == 2  # one is the segmenter's
    (files,) = visitor.call("download")
    by_name = {Path(file["path"]).name.partition(".")[2]: file for file in files}
    assert sorted(by_name) == ["coco.json", "geojson", "json", "labels.png", "overlay.png"]
    coco = visitor.http.get(f"/gradio_api/file={by_name['coco.json']['path']}").json()
    assert [category["name"] for category in coco["categories"]] == names
    labels = visitor.http.get(f"/gradio_api/file={by_name['labels.png']['path']}").content
    (pictures[0].parent / "labels.png").write_bytes(labels)
    assert np.array_equal(np.asarray(Image.open(pictures[0].parent / "labels.png")), expected.label_map)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ({"path": "http://169.254.169.254/a.png"}, "403: Addresses and contents"),
        ({"path": "HTTPS://example.com/a.png", "is_stream": True}, "403: Addresses and contents"),
        ({"path": "a.png", "url": "data:image/png;base64,AAAA"}, "403: Addresses and contents"),
        ({"path": "/etc/passwd"}, "None|isn't here"),
        ({"path": "../../../../etc/passwd"}, "None|isn't here"),
        ({"path": "no/such/file.png", "is_stream": True}, "None|isn't here"),
        ({"path": str(Path(__file__))}, "None|isn't here"),
        ("http://example.com/a.png", "None|isn't here"),
        (None, "There is no picture yet"),
    ],
)
def test_nothing_but_uploads(page, picture, message, passes):
    """Catches a server that reads a file of its own, or fetches an address, for whoever asks."""
    visitor = Visitor(page.local_url)
    marked = {**picture, "meta": {"_type": "gradio.FileData"}} if isinstance(picture, dict) else picture
    for value in (picture, marked):
        with pytest.raises(RuntimeError, match=message):
            visitor.ask(value, ["sky"])
    assert passes["images"] == 0
    for url in ("/gradio_api/file=/etc/passwd", f"/gradio_api/file={__file__}", "/monitoring", "/gradio_api/runs"):
        assert visitor.http.get(url).status_code in (403, 404)
    assert visitor.http.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_refusals_are_sentences(page, pictures, tmp_path):
    """Catches a stack trace, or nothing, where a visitor did something that the app can't do."""
    visitor = Visitor(page.local_url)
    picture = visitor.upload(pictures[0])
    for tags, options, message in (
        ([], {}, r"^Name what to look for"),
        (["x" * 300], {}, r"300 letters, expected a few words, at most 200\.$"),
        ([f"n{number}" for number in range(11)], {}, r"Got 11 class names, expected at most 10\.$"),
        (["sky"], {"model": "/etc"}, r"There is no model .*/etc.* here"),
        (["sky"], {"preset": "/etc/passwd"}, "There is no preset"),
        (["sky"], {"threshold": "high"}, "reload the page"),
        (["sky"], {"threshold": 7}, "expected a confidence between 0 and 1"),
        ([["sky"]], {}, "reload the page"),
        (["sky"], {"expansion": {"a": 1}}, "reload the page"),
        (["sky"], {"view": "x-ray"}, "Got the view"),
    ):
        with pytest.raises(RuntimeError, match=message):
            visitor.ask(picture, tags, **options)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(RuntimeError, match=r"^The file is no picture"):
        visitor.ask(visitor.upload(tmp_path / "broken.png"), ["sky"])
    Image.new("RGB", (101, 64)).save(tmp_path / "large.png")
    with pytest.raises(RuntimeError, match="6,464 pixels, expected at most 6,400: scale it down"):
        visitor.ask(visitor.upload(tmp_path / "large.png"), ["sky"])
    with pytest.raises(RuntimeError, match="Nothing is segmented yet"):
        visitor.call("download")
    assert visitor.ask(picture, ["sky"])[0] is not None


def test_pages_of_others(page):
    """Catches a server of this machine alone that answers under a name that somebody else's page brought along."""
    visitor = Visitor(page.local_url)
    assert visitor.http.get("/config", headers={"Host": "elsewhere.example"}).status_code == 400
    # Nor does it let one read its answers.
    other = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        visitor.http.get("/config", headers=other),
        visitor.http.options("/gradio_api/queue/join", headers=other),
    ):
        assert answer.headers.get("access-control-allow-origin") not in ("*", "http://elsewhere.example")


def test_sizes_are_bounded(page, tmp_path):
    """Catches an upload or a question that fills the disk or the memory."""
    visitor = Visitor(page.local_url)
    (tmp_path / "huge.png").write_bytes(bytes(60_000))
    answer = visitor.http.post("/gradio_api/upload", files={"files": ("a.png", bytes(60_000), "image/png")})
    assert answer.status_code == 413
    with pytest.raises(RuntimeError, match="413: The request is too large"):
        visitor.ask(None, ["x" * MOST_BYTES])


def test_nothing_stays(models, pictures):
    """Catches pictures that are left on the disk when the app ends, or in memory when a tab is closed."""
    with launched(models, LIMITS) as page:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        visitor = Visitor(page.local_url)
        visitor.ask(visitor.upload(pictures[0]), ["sky"])
        assert any(folder.rglob("*.png"))
        assert page.local_url.startswith("http://127.0.0.1:")
    assert not folder.exists()


def test_a_port_in_use(page, models):
    """Catches a stack trace, or another port than the one that was asked for."""
    port = int(page.local_url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"Can't listen at 127.0.0.1, port {port}: .* Choose another --port"):
        with launched(models, LIMITS, port=port):
            pass


def test_files_in_questions():
    """Catches addresses that hide in a question, and uploads that are taken for some."""
    for value in ({"path": "http://a"}, [[{"a": {"path": "file:///etc/passwd"}}]], {"path": "x", "url": "DATA:a"}):
        assert names_no_upload(json.dumps({"data": value}).encode())
    for value in ({"path": "/tmp/a.png", "url": "http://127.0.0.1:7860/gradio_api/file=/tmp/a.png"}, "http://a", None):
        assert not names_no_upload(json.dumps({"data": value}).encode())
    assert not names_no_upload(b"\xff") and not names_no_upload(b"[" * 100_000)


def visit(address: str, file: Path, number: int, until: float, expected: dict[str, str], log: list) -> None:
    """Asks again and again; each answer is noted with whether it is the one for this picture and these words."""
    try:
        visitor = Visitor(address)
        picture = visitor.upload(file)
        while time.monotonic() < until:
            for words, legend in expected.items():
                values = visitor.ask(picture, words.split(","))
                log.append((number, values[1] == legend and values[2].endswith("picture: 1")))
    except Exception as error:
        log.append((number, repr(error)))


def several_visitors(models, pictures, seconds: float, count: int = 8) -> list:
    """What happened to visitors with pictures and words of their own."""
    words = ["a,b,c", "d,e", "house,sky,grass,road"]
    with launched(models, Limits()) as page:
        expected = []
        for file in pictures:
            visitor = Visitor(page.local_url)
            picture = visitor.upload(file)
            expected.append({names: visitor.ask(picture, names.split(","))[1] for names in words})
        assert len({json.dumps(legends) for legends in expected}) == len(pictures)
        log: list = []
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(
                target=visit,
                args=(page.local_url, pictures[n % len(pictures)], n, until, expected[n % len(pictures)], log),
            )
            for n in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
    return log


def test_visitors_are_separate(models, pictures, passes):
    """Catches an answer that is lost, or another visitor's, where three ask at the same time."""
    log = several_visitors(models, pictures[:3], seconds=1, count=3)
    assert all(right is True for _, right in log), log
    assert {number for number, _ in log} == {0, 1, 2}
    assert passes["images"] == 6


@pytest.mark.slow
def test_eight_visitors_for_a_minute(models, pictures, passes):
    """Catches what shows only under load; each picture is encoded once for each visitor, whatever they ask."""
    log = several_visitors(models, pictures, seconds=60)
    assert all(right is True for _, right in log), [entry for entry in log if entry[1] is not True][:5]
    assert {number for number, _ in log} == set(range(8))
    assert passes["images"] == len(pictures) + 8
    print(f"{len(log)} answers to 8 visitors in a minute")
