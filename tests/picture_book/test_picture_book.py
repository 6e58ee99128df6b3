"""The picture book, the script that makes the embedded checkpoint from it, and that checkpoint."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoProcessor

from san_hf.cards import load_facts
from san_hf.hub import from_pretrained, resolve
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.picture_book.measure import TEST_SEED, measure_label_maps
from san_hf.picture_book.objects import ATTRIBUTES, BASE, CLASS_NAMES, COMPOSITIONS, NOVEL, OBJECTS, STUFF
from san_hf.picture_book.scenes import draw_photo, draw_scene


ROOT = Path(__file__).parents[2]
CHECKPOINT = Path(resolve("picture-book"))


def test_base_and_novel_share_every_word_and_no_composition():
    """Catches a split in which a novel composition has a word that no mask was ever given for, or is base as well."""
    assert set(BASE) | set(NOVEL) == set(COMPOSITIONS)
    assert not set(BASE) & set(NOVEL)
    assert len(NOVEL) / len(COMPOSITIONS) == 2 / 11
    for split in (BASE, NOVEL):
        attributes, things = zip(*(name.split(" ") for name in split))
        assert set(attributes) == set(ATTRIBUTES)
        assert set(things) == set(OBJECTS)


def test_a_seed_gives_the_same_page():
    """Catches drawing from a generator that isn't the seed's: the test set would be another one each time."""
    first, again, other = draw_scene([5, 1]), draw_scene([5, 1]), draw_scene([5, 2])
    assert first.image.tobytes() == again.image.tobytes()
    assert np.array_equal(first.label_map, again.label_map)
    assert first.objects == again.objects and first.caption == again.caption
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_label_map_is_exact(seed):
    """Catches masks that are shifted, swapped, or drawn in another order than the picture.

    In a plain colour nearly all of an object's body has one hue, and pixels of the surroundings have others.
    """
    scene = draw_scene([6, seed], names=["red ball", "blue car"])
    pixels = np.asarray(scene.image).astype(int)
    red = (pixels[..., 0] > 1.8 * pixels[..., 1]) & (pixels[..., 0] > 1.8 * pixels[..., 2])
    blue = (pixels[..., 2] > 1.6 * pixels[..., 1]) & (pixels[..., 2] > 1.8 * pixels[..., 0])
    gold = (pixels[..., 0] > 1.05 * pixels[..., 1]) & (pixels[..., 1] > 1.5 * pixels[..., 2])  # the ball's star
    ball = scene.label_map == CLASS_NAMES.index("red ball")
    car = scene.label_map == CLASS_NAMES.index("blue car")
    assert (red | gold)[ball].mean() > 0.8 and (red | gold)[~ball].mean() < 0.01
    assert blue[car].mean() > 0.35 and blue[~car].mean() < 0.02
    for drawn in scene.objects:
        ys, xs = np.nonzero(scene.label_map == CLASS_NAMES.index(drawn.name))
        assert drawn.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert drawn.visible >= 0.55
        assert drawn.name in scene.caption


def test_what_is_nearer_covers_what_is_farther():
    """Catches a label map in which a covered object shows through: both orders would give equal areas."""
    covered = 0
    for seed in range(30):
        scene = draw_scene([7, seed], names=["red tree", "blue house", "white car"])
        far, near = scene.objects[0], scene.objects[-1]
        assert near.visible == 1.0
        covered += far.visible < 1.0
    assert covered > 3


def test_training_pages_show_no_novel_composition():
    """Catches a leak of novel masks into training, which would make the novel figure meaningless."""
    novel = [CLASS_NAMES.index(name) for name in NOVEL]
    for seed in range(40):
        scene = draw_scene([8, seed], (64, 64), choose_from=BASE)
        assert not np.isin(scene.label_map, novel).any()


@pytest.mark.parametrize("subject", ["striped bird", "purple boat", "sky", "mountain"])
def test_photo_shows_its_subject(subject):
    """Catches captions that name something outside the frame: CLIP would learn nonsense."""
    picture, things, stuff = draw_photo([9, 1], subject, 48, others=2)
    assert picture.size == (48, 48) and picture.mode == "RGB"
    assert subject in things + stuff
    assert set(things) <= set(COMPOSITIONS) and set(stuff) <= set(STUFF)
    if subject in STUFF:
        assert things == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (31, 64)}, "at least 32 x 32"),
        ({"names": ["red car"] * 6}, "room for five objects, got 6"),
        ({"names": ["red car", "grey car"]}, r"\['grey car'\]"),
    ],
)
def test_refuses_what_it_cannot_draw(arguments, message):
    """Catches requests that would loop forever, draw a speck, or fail in the depths."""
    with pytest.raises(ValueError, match=message):
        draw_scene(0, **arguments)


def test_measure_of_the_truth_and_of_a_known_mistake():
    """Catches a confusion matrix the wrong way round, and means over classes that don't occur."""
    pages = iter([draw_scene([TEST_SEED, i]) for i in range(6)])
    perfect = measure_label_maps(lambda image: next(pages).label_map, pages=6)
    assert perfect == {"base_miou": 100, "novel_miou": 100, "stuff_miou": 100, "pixel_accuracy": 100}

    maps = [draw_scene([TEST_SEED, i]).label_map for i in range(6)]
    sky = CLASS_NAMES.index("sky")
    result = measure_label_maps(lambda image: np.full(image.size[::-1], sky), pages=6)
    share = np.mean([np.mean(label_map == sky) for label_map in maps])
    occurring = {value for label_map in maps for value in np.unique(label_map).tolist()}
    stuff = [name for name in STUFF if CLASS_NAMES.index(name) in occurring]
    assert result["pixel_accuracy"] == pytest.approx(100 * share)
    assert result["stuff_miou"] == pytest.approx(100 * share / len(stuff))
    assert result["base_miou"] == result["novel_miou"] == 0


def run_script(name, *arguments):
    command = [sys.executable, ROOT / "scripts" / name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the script that makes the embedded checkpoint leaves, after a few steps: made/ and work/clip."""
    folder = tmp_path_factory.mktemp("picture-book")
    paths = ("--output", folder / "made", "--work-dir", folder / "work")
    run_script("make_embedded_checkpoint.py", "--fast", *paths)
    return folder


def test_the_script_makes_a_complete_folder(made):
    """Catches a script that no longer runs from end to end, or forgets a part of the folder."""
    model, processor = from_pretrained(made / "made")
    assert model.dtype == torch.float32
    assert model.config.id2label == dict(enumerate(CLASS_NAMES))
    assert list(model.config.id2label.values()) == list(CLASS_NAMES)
    inputs = processor(images=Image.open(made / "made" / "sample.png"), text=["sky", "sea"], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).class_queries_logits.isfinite().all()
    results = json.loads((made / "made" / "results.json").read_text())
    assert 0 <= results["novel_miou"] <= 100
    assert "novel compositions" in (made / "made" / "README.md").read_text()


def test_benchmark_of_parts(made):
    """Catches a variant that can't be built, figures of another variant's, and finished trainings done again."""
    output = made / "results.json"
    variants = ["full method", "no fusion"]
    settings = {"steps": 1, "pages": 4, "measured_pages": 1}
    known = {"variant": "no fusion", "seed": 0, **settings, "base_miou": 40, "novel_miou": 20, "stuff_miou": 80}
    output.write_text(json.dumps([known, known | {"seed": 1, "novel_miou": 30}]))
    options = ["--steps", "1", "--pages", "4", "--measured-pages", "1", "--jobs", "1", "--variants", *variants]
    done = run_script("benchmarks/open_vocabulary.py", "--clip", made / "work" / "clip", "--output", output, *options)
    rows = json.loads(output.read_text())
    assert [row["variant"] for row in rows] == ["no fusion", "no fusion", "full method"]
    header, _, full, no_fusion = done.stdout.splitlines()[-4:]
    assert header == "| variant | base | novel | novel / base | surroundings |"
    assert full.startswith("| full method |")
    assert no_fusion == "| no fusion | 40.0 | 25.0 | 62% | 80.0 |"


def test_benchmark_notices_what_has_become_worse():
    """Catches a regression that passes, and noise that doesn't."""
    benchmark = load_script("benchmarks/open_vocabulary")
    before = [{"variant": name, "base_miou": 60, "novel_miou": 50, "stuff_miou": 90} for name in benchmark.VARIANTS]
    assert benchmark.fallen([before[0] | {"novel_miou": 45.1}], before) == []
    (problem,) = benchmark.fallen([before[0] | {"novel_miou": 44.9}], before)
    assert problem == "full method: novel mIoU 44.9, was 50.0"


def test_page_has_the_benchmark_as_committed():
    """Catches a table that is not what was measured, and a variant without figures."""
    benchmark = load_script("benchmarks/open_vocabulary")
    committed = json.loads(benchmark.COMMITTED.read_text())
    assert {row["variant"] for row in committed} == set(benchmark.VARIANTS)
    assert benchmark.table(committed) in (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")


def load_script(name):
    spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embedded():
    return from_pretrained("picture-book")


def test_embedded_checkpoint_is_small():
    """Catches weights in single precision, or a forgotten training state, in the package."""
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 8e6, sizes
    assert max(sizes.values()) < 5e6, sizes


def test_embedded_checkpoint_has_no_code():
    """Catches code beside the weights, a second copy of the package's own, and a loader that looks for it there."""
    assert not list(CHECKPOINT.glob("*.py"))
    assert not [path.name for path in CHECKPOINT.glob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForSemanticSegmentation.from_pretrained(CHECKPOINT, **options)
        processor = AutoProcessor.from_pretrained(CHECKPOINT, **options)
        assert type(model) is SANForSemanticSegmentation and type(processor) is SANProcessor
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert 'san_hf.from_pretrained("picture-book")' in card and "trust_remote_code" not in card


def test_embedded_checkpoint_loads_in_single_precision(embedded):
    """Catches the storage type leaking out: half precision is slow, or unsupported, on many CPUs."""
    model, _ = embedded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert isinstance(model, SANForSemanticSegmentation)


@pytest.mark.parametrize("text", ["a red car", "Ein Haus, größer", "猫 🐈 café", "naïve​zero", "\x00\x7f"])
def test_tokenizer_reads_any_text(embedded, text):
    """Catches a byte without a token: it would silently become an end-of-text, where CLIP reads off its embedding."""
    tokenizer = embedded[1].tokenizer
    ids = tokenizer(text).input_ids
    end = tokenizer.eos_token_id
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == end == len(tokenizer) - 1 == tokenizer.pad_token_id
    assert end not in ids[:-1]
    assert tokenizer(text.upper()).input_ids == ids or "ß" in text


def test_embedded_checkpoint_measures_as_its_card_says(embedded):
    """Catches figures that no longer hold: changed weights, pages, model, processor or post-processing."""
    model, processor = embedded
    claimed = json.loads((CHECKPOINT / "results.json").read_text())

    def segment(image):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].numpy()

    measured = measure_label_maps(segment, claimed["test_pages"])
    for name, value in measured.items():
        assert value == pytest.approx(claimed[name], abs=0.5), name
    card = (CHECKPOINT / "README.md").read_text()
    for name in ("base_miou", "novel_miou", "stuff_miou"):
        assert f"| {claimed[name]:.1f} |" in card
    assert load_facts("picture-book")["notice"] in card
