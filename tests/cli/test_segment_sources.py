"""`san-hf segment` of what is no file: standard input and addresses."""

import io
import json
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from san_hf import fetch
from tests.cli.conftest import run_command


@pytest.fixture
def run(model_folder, photo, tmp_path, monkeypatch):
    """`san-hf segment` in a folder with photo.png; returns what it says."""
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")

    def run(*arguments, status=0, stdin=None):
        options = ["--model", str(model_folder), "--classes", "cat, grass, sky", "-f", "png-labels"]
        return run_command("segment", *arguments, *options, status=status, stdin=stdin)

    return run


@pytest.fixture
def address(tmp_path):
    """A server of the folder's files; what was asked for is in `requested`."""
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            requested.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


def same_labels(name: str) -> bool:
    return Path(f"outputs/{name}.labels.png").read_bytes() == Path("outputs/photo.labels.png").read_bytes()


def test_standard_input(run, monkeypatch):
    """Catches an image in a pipe that is read otherwise than the file, and errors that don't say what came."""
    run("photo.png")
    run("-", stdin=Path("photo.png").read_bytes())
    assert same_labels("stdin") and json.loads(Path("outputs/stdin.json").read_text())["image"] == "-"
    assert "the file is empty" in run("-", "--overwrite", stdin=b"", status=2)
    assert "not an image" in run("-", "--overwrite", stdin=b"text", status=2)
    monkeypatch.setattr(fetch, "MOST_BYTES", 100)
    assert "it has more than" in run("-", "--overwrite", stdin=Path("photo.png").read_bytes(), status=2)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_terminal_is_no_image(tmp_path):
    """Catches a command that waits for a terminal for ever."""
    ours, theirs = os.openpty()
    try:
        command = [sys.executable, "-m", "san_hf", "segment", "-", "--classes", "cat", "-o", str(tmp_path / "out")]
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=100)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2 and "which is a terminal" in done.stderr


def test_addresses(run, address):
    """Catches images that are fetched unasked, another image than the file, and passwords in what is said."""
    server, requested = address
    output = run(f"{server}/photo.png", status=2)
    assert "is an address: images are fetched with --allow-urls" in output and not requested
    assert "secret" not in run("https://me:secret@127.0.0.1/photo.png", status=2)
    run("photo.png")
    output = run(
        f"{server}/photo.png?size=large", "photo.png", f"{server}/none.png", "--allow-urls", "--overwrite", status=1
    )
    assert same_labels("photo-2") and f"{server}/photo.png?size=large -> " in output
    assert f"Error: {server}/none.png: it can't be fetched: the server answers 404" in output
    assert json.loads(Path("outputs/photo.json").read_text())["image"] == f"{server}/photo.png?size=large"
    output = run("https://me:secret@127.0.0.1/a.png", "--allow-urls", status=2)
    assert "without a user's name" in output and "secret" not in output


def test_addresses_are_fetched_again(run, address):
    """Catches a resumed job that takes an image for done which may have changed since."""
    server, requested = address
    Image.new("RGB", (40, 32)).save("other.png")
    arguments = [f"{server}/other.png", "photo.png", "--allow-urls"]
    run(*arguments)
    requested.clear()
    assert "1 of 2 images are done already" in run(*arguments, "--resume")
    assert len(requested) == 1


def test_a_raster_at_an_address(run, address):
    """Catches an address that is opened as a file of this machine, or by GDAL."""
    server, _ = address
    file = io.BytesIO()
    Image.open("photo.png").save(file, format="tiff")
    Path("photo.tif").write_bytes(file.getvalue())
    run("photo.png")
    run(f"{server}/photo.tif", "--allow-urls", "-o", "outputs/fetched")
    assert same_labels("fetched/photo")
