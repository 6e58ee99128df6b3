"""Small files that ask for a lot: what a command takes of memory before it refuses them."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss is in other units elsewhere")
MODEL = Path(str(files("san_hf"))) / "checkpoints" / "picture-book"
IMAGE = MODEL / "sample.png"
LETTERS = "a" * 1_000_000
# A file of at most 8 MB each, by name; those of a model's folder take the place of its own.
CLASSES = {
    "letters.txt": f"sky\n{LETTERS}\n",
    "words.txt": "sky\n" + "word " * 200_000,
    "letters.json": json.dumps(["sky", LETTERS]),
    "mapping.json": json.dumps({"0": "sky", "1": LETTERS}),
    "deep.json": "[" * 100_000 + "]" * 100_000,
    "digits.json": '{"0": ' + "9" * 100_000 + "}",
    "names.txt": "\n".join(f"class {number}" for number in range(600_000)),
    "names.json": json.dumps([f"class {number}" for number in range(400_000)]),
    "vocabulary.safetensors": (10**12).to_bytes(8, "little") + b"{}",
}


def in_config(**changes):
    return json.dumps(json.loads((MODEL / "config.json").read_text()) | changes)


def in_images(size):
    content = json.loads((MODEL / "processor_config.json").read_text())
    content["image_processor"]["size"] = size
    return json.dumps(content)


def in_text_tower(**changes):
    clip = json.loads((MODEL / "config.json").read_text())["clip_config"]
    return in_config(clip_config=clip | {"text_config": clip["text_config"] | changes})


FOLDERS = {
    "wide": ("config.json", lambda: in_config(hidden_size=8192, num_attention_heads=8, num_hidden_layers=256)),
    "tokens": ("config.json", lambda: in_text_tower(vocab_size=9_999_999, hidden_size=8192)),
    "letters": ("config.json", lambda: in_config(id2label={"0": LETTERS, "1": "b"})),
    "deep": ("config.json", lambda: '{"a":' * 100_000 + "1" + "}" * 100_000),
    "image": ("processor_config.json", lambda: in_images({"shortest_edge": 10**9, "longest_edge": 4 * 10**9})),
    "tokenizer": ("tokenizer.json", lambda: '{"a":' * 100_000 + "1" + "}" * 100_000),
    "header": ("model.safetensors", lambda: "\0\x10\xa5\xd4\xe8\0\0\0{}"),
}


# A process starts with the peak of the one that it was forked from, so a small one stands between.
MEASURE = "import os, sys; _, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0); \
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)"


def refuse(*arguments) -> int:
    """Runs a command, which has to end with one error in one line; the peak of its memory in bytes."""
    command = [sys.executable, "-S", "-c", MEASURE, sys.executable, "-m", "san_hf", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    status, peak = map(int, process.stdout.split()[-2:])
    error = process.stderr
    assert status == 2 and "Traceback" not in error, (status, error[-2000:])
    errors = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and len(error) < 2000, error[:2000]
    return peak * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_class_lists(name, tmp_path):
    """Names, or numbers of them, that are encoded before anybody asks whether they can be meant."""
    content = CLASSES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert (tmp_path / name).stat().st_size < 10_000_000
    assert refuse("segment", IMAGE, "--classes-file", tmp_path / name, "--output", tmp_path / "out") < 1.5e9


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_model_folders(name, tmp_path):
    """Sizes that are believed, and allocated, before they are compared with what is there."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    file, content = FOLDERS[name]
    (folder / file).write_text(content(), encoding="latin-1")
    arguments = ("--classes", "sky, grass", "--model", folder, "--output", tmp_path / "out")
    assert refuse("segment", IMAGE, *arguments) < 1.5e9


@pytest.mark.slow
def test_a_compressed_checkpoint(tmp_path):
    """Tensors that a file of kilobytes is unpacked to."""
    torch.save({"model": {"a": torch.zeros(1 << 28)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "small.pth", "w") as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    (tmp_path / "plain.pth").unlink()
    assert (tmp_path / "small.pth").stat().st_size < 10_000_000
    assert refuse("convert", tmp_path / "small.pth", tmp_path / "out") < 1.0e9
