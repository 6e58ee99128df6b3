"""`san-hf segment`, from arguments to files, with a tiny model of random weights."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.colors import OTHER_COLOR, name_colors
from san_hf.inference.segmenter import Segmenter
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.vocabularies import EXPANSIONS, load_vocabulary
from tests.forks import Run, printing
from tests.tiny import tiny_config


ROOT = Path(__file__).parents[2]
CLASSES = ["cat", "grass", "sky"]


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """Runs `san-hf segment` in a new folder: `run("a.png", classes=...)`; without a stack trace, whatever happens."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, classes="cat, grass, sky", model=model_folder, status=0):
        options = ["--model", str(model)] + (["--classes", classes] if classes is not None else [])
        result = CliRunner().invoke(app, ["segment", *map(str, arguments), *options], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        return result

    return run


def list_files(folder) -> list[str]:
    """Without hidden ones, such as what `--resume` reads."""
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_labels_are_the_models(run, photo, model_folder):
    """Catches preprocessing, text or post-processing of the command that differ from the library's."""
    photo.save("photo.png")
    run("photo.png", "--format", "png-labels", "--templates", "imagenet")
    processor = SANProcessor.from_pretrained(model_folder)
    model = SANForSemanticSegmentation.from_pretrained(model_folder).eval()
    with torch.inference_mode():
        outputs = model(**processor(images=photo, text=CLASSES, prompt_templates="imagenet"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 96)])
    labels = labels_of("outputs/photo.labels.png")
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels, expected.numpy())


def test_json_and_class_order(run, photo):
    """Catches class indices that depend on anything but the caller's order, and shares that aren't those of the map."""
    photo.save("photo.png")
    for folder, classes in (("there", "cat, grass, sky"), ("back", "sky, grass, cat")):
        run("photo.png", "-f", "json", "-f", "png-labels", "-o", folder, classes=classes)
    there, back = (json.loads(Path(folder, "photo.json").read_text()) for folder in ("there", "back"))
    assert [entry["name"] for entry in there["classes"]] == CLASSES
    assert [entry["name"] for entry in back["classes"]] == CLASSES[::-1]
    assert (there["width"], there["height"], there["image"]) == (96, 64, "photo.png")
    labels = labels_of("there/photo.labels.png")
    np.testing.assert_array_equal(labels, 2 - labels_of("back/photo.labels.png"))
    for entry in there["classes"]:
        assert entry["pixels"] == (labels == entry["label"]).sum()
        assert entry["share"] == pytest.approx(entry["pixels"] / (96 * 64))
        assert entry["color"] == "#{:02x}{:02x}{:02x}".format(*name_colors(CLASSES)[entry["label"]])


def test_overlay_mask_and_legend(run, photo):
    """Catches formats that are mixed up, and a legend on screen that isn't the map's."""
    photo.save("photo.png")
    result = run("photo.png", "-f", "overlay", "-f", "mask", "-f", "png-labels")
    labels = labels_of("outputs/photo.labels.png")
    np.testing.assert_array_equal(np.asarray(Image.open("outputs/photo.mask.png")), name_colors(CLASSES)[labels])
    overlay = Image.open("outputs/photo.overlay.png")
    assert overlay.width == 7 * 96 and overlay.height > 7 * 64
    for name, count in zip(CLASSES, np.bincount(labels.ravel(), minlength=3)):
        expected = f"{count / labels.size:.1%}" if count else "Not found"
        assert any(name in line and expected in line for line in result.output.splitlines()), result.output
    assert sorted(os.listdir("outputs")) == [
        f"photo.{end}" for end in ("json", "labels.png", "mask.png", "overlay.png")
    ]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation(run, photo, orientation):
    """Catches label maps that lie on their side."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save("upright.png")
    photo.transpose(undo[orientation]).save("turned.png", exif=exif)
    run("upright.png", "turned.png", "-f", "png-labels")
    np.testing.assert_array_equal(labels_of("outputs/turned.labels.png"), labels_of("outputs/upright.labels.png"))


def test_kinds_of_pixels(run, photo):
    """Catches 16-bit pixels cut off at 255, palette indices taken for colours, and colours hidden by transparency."""
    grey = np.asarray(photo.convert("L"))
    rgb = np.asarray(photo).copy()
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, :48] = 0
    on_white = rgb.copy()
    on_white[:, :48] = 255
    palette = photo.quantize(16)
    twins = {
        "16bit": (Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)),
        "palette": (palette, palette.convert("RGB")),
        "rgba": (Image.fromarray(np.dstack([rgb, alpha])), Image.fromarray(on_white)),
        "bilevel": (photo.convert("1"), photo.convert("1").convert("RGB")),
        "grey": (photo.convert("L"), Image.fromarray(np.dstack([grey] * 3))),
    }
    for name, (odd, plain) in twins.items():
        odd.save(f"{name}.png")
        plain.save(f"{name}-plain.png")
    photo.convert("CMYK").save("cmyk.tif")
    photo.convert("CMYK").convert("RGB").save("cmyk-plain.png")
    run(*sorted(os.listdir()), "-f", "png-labels")
    seen = set()
    for name in [*twins, "cmyk"]:
        labels = labels_of(f"outputs/{name}.labels.png")
        seen |= set(np.unique(labels))
        np.testing.assert_array_equal(labels, labels_of(f"outputs/{name}-plain.labels.png"), err_msg=name)
    assert len(seen) > 1


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_odd_sizes(run, size):
    """Catches sides that are rounded to nothing."""
    Image.new("RGB", size, (200, 30, 30)).save("odd.png")
    run("odd.png", "-f", "png-labels", "-f", "overlay")
    assert labels_of("outputs/odd.labels.png").shape == size[::-1]


def broken_files(photo) -> dict[str, str]:
    """Writes files that are no images; name -> what the message must say."""
    photo.save("whole.jpg")
    Path("truncated.jpg").write_bytes(Path("whole.jpg").read_bytes()[:700])
    photo.save("whole.png")
    Path("truncated.png").write_bytes(Path("whole.png").read_bytes()[:-3000])
    Path("empty.jpg").write_bytes(b"")
    Path("text.jpg").write_text("not a picture")
    Path("html.png").write_text("<html>not found</html>")
    Image.fromarray(np.full((8, 8), 1e6, np.float32)).save("floats.tif")
    Path("folder.png").mkdir()
    os.remove("whole.jpg")
    os.remove("whole.png")
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "html.png": "not an image",
        "floats.tif": "expected 0..255",
        "missing.jpg": "no such file",
        "x" * 300 + ".jpg": "no such file",
    }


def test_bad_images_among_good_ones(run, photo):
    """Catches a run that stops at the first bad image, loses results, or hides that some are missing."""
    problems = broken_files(photo)
    photo.save("a.png")
    photo.save("z.png")
    result = run("a.png", *problems, "z.png", "-f", "json", status=1)
    assert list_files("outputs") == ["a.json", "z.json"]
    for name, reason in problems.items():
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"Error: {name}:")]
        assert reason in line
    assert f"{len(problems)} of {len(problems) + 2} images" in result.output


def test_only_bad_images(run, photo):
    """Catches a status that says something was done."""
    run(*broken_files(photo), status=2)
    assert list_files("outputs") == []


@pytest.mark.parametrize("limit", [4000, 2000])
def test_decompression_bombs(run, photo, monkeypatch, limit):
    """Catches memory filled by a small file: Pillow only warns up to twice its limit."""
    photo.save("bomb.png")  # 6,144 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit:,} pixels" in run("bomb.png", status=2).output


def test_folders_patterns_and_names(run, photo):
    """Catches images left out or done twice, and two inputs of the same name of which one overwrites the other."""
    for name in ("in/a.png", "in/a.JPG", "in/sub/a.png", "in/sub/b.bmp", "in/.hidden.png", "other/a.png", "odd[1].png"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        photo.save(name)
    Path("in/notes.txt").write_text("not to be looked at")
    run("in", "in/a.png", "other/*.png", "odd[1].png", "-f", "json")
    written = {
        str(path.relative_to("outputs")): json.loads(path.read_text())["image"]
        for path in Path("outputs").rglob("*.json")
    }
    assert written == {
        "a.json": "in/a.JPG",
        "a-2.json": "in/a.png",
        "sub/a.json": "in/sub/a.png",
        "sub/b.json": "in/sub/b.bmp",
        "a-3.json": "other/a.png",
        "odd[1].json": "odd[1].png",
    }


def test_odd_names_stay_in_the_output_folder(run, photo):
    """Catches files beside the output folder, hidden, or of one name, whatever the images are called."""
    names = ["..png", ".png", "...png", " .png", "a\nb.png", "a\x1b[2Jb.png", "b?.png", "b_.png", "A.png", "a.png"]
    names += ["a/..png", "猫" * 83 + ".png", "猫" * 82 + "x.png", "u\u0308.png", "ü.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Path("in", name).parent.mkdir(exist_ok=True, parents=True)
        photo.save(os.fsencode(f"in/{name}"), format="png")
    os.symlink("../A.png", "in/a/link.png")  # the same image
    before = set(Path(".").rglob("*"))
    result = run(*(f"in/{name}" for name in names), "in/a/../a/link.png", "-f", "json", "-f", "mask")
    assert "\x1b" not in result.output
    written = [path for path in Path(".").rglob("*") if path not in before and path.is_file()]
    visible = {path for path in written if not path.name.startswith(".")}
    assert all(path.parent == Path("outputs") for path in written) and len(visible) == 2 * len(names)
    assert len({str(path).casefold() for path in visible}) == len(visible)


def test_a_folder_that_holds_the_output(run, photo):
    """Catches a second run that segments the pictures of the first."""
    photo.save("photo.png")
    run(".", "-f", "mask")
    run(".", "-f", "mask", "--overwrite")
    assert os.listdir("outputs") == ["photo.mask.png"]


def test_long_names(run, photo):
    """Catches an image that is lost because its name leaves no room for an ending."""
    for letter in "ab":
        photo.save("n" * 245 + letter + ".png")
    run(".", "-f", "png-labels")
    assert len(list(Path("outputs").glob("*.labels.png"))) == 2


def command_in(folder: Path, *arguments: str) -> int:
    os.chdir(folder)
    try:
        app(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


def test_any_name(photo, model_folder, tmp_path):
    """Catches names of files or classes that end the run because a terminal can't show them."""
    names = [b"-dash.png", b"n\xff.png", b"line\nbreak.png", "\N{CAT} [red]x[bold].png".encode()]
    for name in names:
        photo.save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/" + name)
    arguments = ["segment", ".", "--model", str(model_folder), "-f", "json", "--classes", "\N{CAT}, {}, [bold]"]
    said = tmp_path / "said.txt"
    assert Run(printing, said, command_in, tmp_path, *arguments).outcomes() == [0], said.read_text()
    written = sorted(map(os.fsencode, list_files(tmp_path / "outputs")))
    # What is no text, or would be two lines, is no name of ours.
    tidy = [name.replace(b"\xff", b"_").replace(b"\n", b"_") for name in names]
    assert written == sorted(name[:-3] + b"json" for name in tidy)
    classes = json.loads((tmp_path / "outputs" / "-dash.json").read_text(encoding="utf-8"))["classes"]
    assert [entry["name"] for entry in classes] == ["\N{CAT}", "{}", "[bold]"]
    assert b"[red]x[bold].png -> " in said.read_bytes()


@pytest.mark.parametrize("pattern", ["nothing*.png", "void"])
def test_nothing_to_do(run, pattern):
    """Catches a success that did nothing."""
    Path("void").mkdir()
    assert pattern in run(pattern, status=2).output


def test_results_are_not_overwritten(run, photo):
    """Catches results of an earlier run, or the input itself, that are lost without a word."""
    photo.save("photo.png")
    run("photo.png", "-f", "json")
    Path("outputs/photo.json").write_text("precious")
    assert "--overwrite" in run("photo.png", "-f", "json", status=2).output
    assert Path("outputs/photo.json").read_text() == "precious"
    run("photo.png", "-f", "json", "--overwrite")
    assert json.loads(Path("outputs/photo.json").read_text())["width"] == 96

    photo.save("outputs/x.mask.png")
    photo.save("x.png")
    before = Path("outputs/x.mask.png").read_bytes()
    run("x.png", "outputs/x.mask.png", "-f", "mask", "--overwrite", status=2)
    assert Path("outputs/x.mask.png").read_bytes() == before


def test_output_that_is_no_folder(run, photo):
    """Catches a stack trace, and minutes of work before it turns out that nothing can be written."""
    photo.save("photo.png")
    assert "Can't write to the folder" in run("photo.png", "-o", "photo.png", status=2).output
    assert "Can't write to the folder" in run("photo.png", "-o", "photo.png/below", status=2).output


@pytest.fixture(scope="module")
def broken_models(model_folder, tmp_path_factory):
    """A folder of model folders that each lack something."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("weightless", "truncated", "incomplete", "misshapen", "textless", "imageless", "garbled"):
        shutil.copytree(model_folder, folder / name)
    weights = (model_folder / "model.safetensors").read_bytes()
    (folder / "weightless" / "model.safetensors").unlink()
    (folder / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    tensors = load_file(model_folder / "model.safetensors")
    no_object_embed = tensors.pop("no_object_embed")
    save_file(tensors, folder / "incomplete" / "model.safetensors", metadata={"format": "pt"})
    tensors["no_object_embed"] = no_object_embed[:, :7].contiguous()
    save_file(tensors, folder / "misshapen" / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "textless" / name).unlink()
    (folder / "imageless" / "processor_config.json").unlink()
    (folder / "garbled" / "config.json").write_text("{")
    CLIPModel(tiny_config().clip_config).save_pretrained(folder / "clip")
    (folder / "empty").mkdir()
    (folder / "san.pth").write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    "model, message",
    [
        ("missing/folder", "There is no folder"),
        ("no-such-alias", "san-vit-b-16"),
        ("empty", "config.json"),
        ("weightless", "model.safetensors"),
        ("truncated", "not fully covered"),
        ("incomplete", "no_object_embed"),
        ("misshapen", "no_object_embed"),
        ("textless", "tokenizer"),
        ("imageless", "image processor"),
        ("garbled", "JSON"),
        ("clip", "'clip'"),
        ("san.pth", "san-hf convert"),
    ],
)
def test_models_that_are_none(run, photo, broken_models, model, message):
    """Catches a stack trace, and an answer by random weights where a checkpoint is another's or incomplete."""
    photo.save("photo.png")
    path = broken_models / model
    output = run("photo.png", model=path if path.exists() else model, status=2).output
    assert model in output and message in output
    assert len(output) < 2000
    assert not Path("outputs/photo.overlay.png").exists()


def test_class_names(run, photo):
    """Catches names split at the wrong place, and a file's byte order mark or blank lines taken for names."""
    photo.save("photo.png")
    Path("more.txt").write_text("\ufeffhot dog, bun\n\n  big  cat \n", encoding="utf-8")
    run("photo.png", "-f", "json", "--classes", "sky", "--classes-file", "more.txt", classes=' "light, red" ,grass,')
    names = [entry["name"] for entry in json.loads(Path("outputs/photo.json").read_text())["classes"]]
    assert names == ["sky", "light, red", "grass", "hot dog, bun", "big  cat"]


@pytest.mark.parametrize(
    "arguments, classes, message",
    [
        ([], "", "at least one"),
        ([], " , ,", "at least one"),
        ([], "cat, sky, cat", "cat"),
        ([], 'cat, "sky', "double quotes"),
        ([], os.fsdecode(b"cat, sk\xff"), "UTF-8"),
        ([], None, "no class names of its own"),
        (["--classes-file", "missing.txt"], None, "missing.txt"),
        (["--classes-file", "photo.png"], None, "photo.png"),
        (["--device", "cuda:77"], "cat", "cuda:77"),
        (["--device", "toaster"], "cat", "toaster"),
        (["--dtype", "int3"], "cat", "int3"),
        (["--format", "gif"], "cat", "gif"),
        (["--expand", "everything"], "cat", "everything"),
    ],
)
def test_bad_options(run, photo, arguments, classes, message):
    """Catches a stack trace, and a run with something else than what was asked for."""
    photo.save("photo.png")
    assert message in run("photo.png", *arguments, classes=classes, status=2).output
    assert not Path("outputs/photo.overlay.png").exists()


def test_expansion(run, photo):
    """Catches labels beyond "other", an "other" that isn't grey, and expansion that does nothing."""
    photo.save("photo.png")
    run("photo.png", "-f", "mask", "-f", "png-labels", "--expand", "coco", classes="blob, stain")
    classes = json.loads(Path("outputs/photo.json").read_text())["classes"]
    assert [entry["name"] for entry in classes] == ["blob", "stain", "other"]
    assert classes[-1]["color"] == "#{:02x}{:02x}{:02x}".format(*OTHER_COLOR) and classes[-1]["pixels"] > 0
    labels = labels_of("outputs/photo.labels.png")
    assert (np.asarray(Image.open("outputs/photo.mask.png"))[labels == 2] == OTHER_COLOR).all()


@pytest.mark.parametrize("by, size", [("coco", 171), ("coco-stuff", 91)])
def test_expanded_vocabularies(by, size, photo, model_folder, monkeypatch):
    """Catches the wrong list of names, and names that are there twice."""
    names = load_vocabulary(EXPANSIONS[by])
    assert len(names) == size
    classes = []
    get_class_embeds = SANForSemanticSegmentation.get_class_embeds
    monkeypatch.setattr(
        SANForSemanticSegmentation,
        "get_class_embeds",
        lambda self, input_ids, *args, **kwargs: (
            classes.append(len(input_ids)) or get_class_embeds(self, input_ids, *args, **kwargs)
        ),
    )
    Segmenter.from_pretrained(model_folder, [names[5].upper(), "unicorn", names[0]], expand=by)
    assert classes == [size + 1]
    with pytest.raises(ValueError, match="coco-stuff"):
        Segmenter.from_pretrained(model_folder, CLASSES, expand="cocoa")


def test_many_classes(run, photo):
    """Catches labels beyond 8 bits that wrap around."""
    photo.save("photo.png")
    Path("classes.txt").write_text("\n".join(f"thing {i}" for i in range(300)))
    run("photo.png", "-f", "png-labels", "--classes-file", "classes.txt", classes=None)
    picture = Image.open("outputs/photo.labels.png")
    assert picture.mode == "I;16"
    pixels = [entry["pixels"] for entry in json.loads(Path("outputs/photo.json").read_text())["classes"]]
    np.testing.assert_array_equal(np.bincount(np.asarray(picture).ravel(), minlength=300), pixels)


def test_a_model_with_a_vocabulary(run, photo, model_folder, tmp_path):
    """Catches that the names a model carries are asked for again, or that they get other labels."""
    processor = SANProcessor.from_pretrained(model_folder)
    model = SANForSemanticSegmentation.from_pretrained(model_folder)
    model.set_vocabulary(CLASSES, **processor(text=CLASSES))
    model.save_pretrained(tmp_path / "named")
    processor.save_pretrained(tmp_path / "named")
    photo.save("photo.png")
    run("photo.png", "-f", "png-labels", "-o", "own", model=tmp_path / "named", classes=None)
    run("photo.png", "-f", "png-labels", "-o", "given")
    own, given = (json.loads(Path(folder, "photo.json").read_text()) for folder in ("own", "given"))
    assert own["classes"] == given["classes"]
    np.testing.assert_array_equal(labels_of("own/photo.labels.png"), labels_of("given/photo.labels.png"))


def test_text_is_encoded_once(run, photo, monkeypatch):
    """Catches the text tower run again for each image."""
    calls = []
    get_class_embeds = SANForSemanticSegmentation.get_class_embeds
    monkeypatch.setattr(
        SANForSemanticSegmentation,
        "get_class_embeds",
        lambda self, *args, **kwargs: calls.append(1) or get_class_embeds(self, *args, **kwargs),
    )
    for i in range(3):
        photo.save(f"{i}.png")
    run(".")
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(run, photo, model_folder, dtype):
    """Catches inputs or text features left in float32, and a --dtype that is not heeded."""
    photo.save("photo.png")
    run("photo.png", "-f", "png-labels", "--dtype", dtype)
    processor = SANProcessor.from_pretrained(model_folder)
    model = SANForSemanticSegmentation.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    inputs = processor(images=photo, text=CLASSES)
    with torch.inference_mode():
        outputs = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)})
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 96)])
    np.testing.assert_array_equal(labels_of("outputs/photo.labels.png"), expected.numpy())


def test_library_use(photo, model_folder):
    """Catches a function that works from the command line only: PIL images in, arrays out."""
    segmentation = Segmenter.from_pretrained(model_folder, CLASSES)(photo)
    assert segmentation.label_map.shape == (64, 96) and segmentation.label_map.dtype == np.uint8
    assert sum(entry["share"] for entry in segmentation.legend()) == pytest.approx(1)
    with pytest.raises(ValueError, match="gif"):
        segmentation.save("x", ["gif"])


def test_an_interrupted_write_leaves_nothing(photo, model_folder, tmp_path, monkeypatch):
    """Catches half a file under its final name, or left behind under another."""
    segmentation = Segmenter.from_pretrained(model_folder, CLASSES)(photo)

    def fail(self, file, **kwargs):
        file.write(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        segmentation.save(tmp_path / "photo", ["mask"])
    assert os.listdir(tmp_path) == []


def test_benchmarks_by_name(run, photo, tmp_path):
    """Catches `--classes voc` taken for a class, and class files that `evaluate` takes and `segment` doesn't."""
    photo.save("photo.png")
    run("photo.png", "-f", "json", classes="voc")
    assert names_in("outputs/photo.json") == load_vocabulary("voc")
    Path("names.json").write_text(json.dumps({"0": "cat", "1": "grass, wet"}))
    run("photo.png", "-f", "json", "-o", "mapping", "--classes-file", "names.json", classes=None)
    assert names_in("mapping/photo.json") == ["cat", "grass, wet"]
    Path("names.txt").write_text("sky\nsea\n")
    run("photo.png", "-f", "json", "-o", "file", classes="names.txt")
    assert names_in("file/photo.json") == ["sky", "sea"]
    run("photo.png", "-f", "json", "-o", "both", "--classes-file", "names.txt", classes="voc")
    assert names_in("both/photo.json") == [*load_vocabulary("voc"), "sky", "sea"]


def names_in(file: str) -> list[str]:
    return [entry["name"] for entry in json.loads(Path(file).read_text())["classes"]]


def test_threshold(run, photo):
    """Catches a threshold that doesn't reach the scores, or whose pixels get a class's label or colour."""
    photo.save("photo.png")
    run("photo.png", "-f", "json", "-f", "png-labels", "--threshold", "1")
    legend = json.loads(Path("outputs/photo.json").read_text())["classes"]
    assert [entry["name"] for entry in legend] == [*CLASSES, "other"]
    assert legend[-1]["share"] > 0.5 and legend[-1]["color"] == "#{:02x}{:02x}{:02x}".format(*OTHER_COLOR)
    assert (labels_of("outputs/photo.labels.png") == 3).mean() == pytest.approx(legend[-1]["share"])
    run("photo.png", "-f", "json", "-o", "none", "--threshold", "0")
    assert json.loads(Path("none/photo.json").read_text())["classes"][-1]["pixels"] == 0
    run("photo.png", "-o", "bad", "--threshold", "2", status=2)


def test_a_vocabulary_file(run, photo):
    """Catches a file that loses the templates, the threshold, the label's name or a colour, or that isn't refused."""
    photo.save("photo.png")
    wanted = ("photo.png", "-f", "mask", "-f", "json", "-f", "confidence")
    own = ("--templates", "a drawing of a {}.", "--templates", "the {}", "--colors", "sky=lime", "--other", "rest")
    options = ("--threshold", "0.2", "--expand", "sea, road", "--save-vocabulary", "v.safetensors")
    run(*wanted, *own, *options, "-o", "first")
    run(*wanted, "-o", "second", classes="v.safetensors")
    assert names_in("second/photo.json") == [*CLASSES, "rest"]
    assert list_files("first") == list_files("second") == ["photo.confidence.png", "photo.json", "photo.mask.png"]
    for name in list_files("first"):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()
    assert "v.safetensors' exists already" in run(*wanted, *options, "-o", "third", status=2).output
    again = run(*wanted, "--synonyms", "-o", "third", classes="v.safetensors", status=2)
    assert "Only class names that are given" in again.output
    Path("broken.safetensors").write_bytes(b"12345678")
    assert "can't be read as a vocabulary" in run(*wanted, classes="broken.safetensors", status=2).output


def test_synonyms(run, photo):
    """Catches synonyms that don't reach the vocabulary, or are averaged unasked."""
    photo.save("photo.png")
    names, maps = '"cat, kitten", grass, sky', []
    for number, options in enumerate(((), ("--synonyms",), ("--synonyms", "--average-synonyms"))):
        file = f"{number}.safetensors"
        run("photo.png", "-f", "json", "-o", number, "--save-vocabulary", file, *options, classes=names)
        maps.append(load_file(file)["class_embeds"].shape[0])
        assert names_in(f"{number}/photo.json")[0] == "cat, kitten"
    assert maps == [3, 4, 3]
    run("photo.png", "--average-synonyms", "-o", "x", status=2)


def test_debug_shows_what_is_wrong_with_an_image(model_folder, tmp_path, monkeypatch):
    """Catches an image's error that stays one line although its stack trace was asked for."""
    monkeypatch.chdir(tmp_path)
    Path("nothing.png").write_bytes(b"")
    arguments = ["segment", "nothing.png", "--classes", "cat", "--model", str(model_folder)]
    plain, debug = (CliRunner().invoke(app, [*options, *arguments]) for options in ([], ["--debug"]))
    assert plain.exit_code == debug.exit_code == 2
    assert "Error: nothing.png: " in plain.output and "Traceback" not in plain.output
    assert "Traceback" in debug.output and "ImageError: " in debug.output


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("cat; grass", "has the name 'cat; grass', with ';' in it. Expected 2 names"),
        ("cat|grass, sky", "with '|' in it"),
        ("missing.txt", "The class list 'missing.txt' can't be read"),
        ("ADE20K_150", "did you mean the benchmark ade20k-150?"),
        ("coco", "did you mean the benchmark coco-stuff?"),
    ],
)
def test_class_names_that_are_not_meant(run, photo, classes, message):
    """Catches one class of several names, which would get every pixel."""
    photo.save("photo.png")
    assert message in run("photo.png", classes=classes, status=2).output


def test_class_names_without_commas(run, photo, monkeypatch):
    """Catches a second class taken for an image, and a model that is loaded before that is said."""
    photo.save("photo.png")
    monkeypatch.setattr("san_hf.cli.segment.load_segmenter", None)
    result = run("photo.png", "grass", classes="cat,", status=2)
    assert "Error: grass: there is no such file" in result.output and '--classes "cat, grass"' in result.output
    run("missing.png", classes="cat", status=2)
