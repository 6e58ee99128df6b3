"""What the app knows of a visitor, without a browser and without Gradio."""

import base64
import json
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from san_hf import VOCABULARIES, Segmenter
from san_hf.app.limits import Limits, read_expansion_names, read_names
from san_hf.app.models import Models
from san_hf.app.state import Question, Session, Sessions
from san_hf.app.views import (
    describe_all_pixels,
    describe_pixel,
    describe_times,
    draw_view,
    legend_html,
    write_downloads,
)
from san_hf.images import ImageError, load_image
from san_hf.loading import ModelError
from san_hf.modeling.prompts_san import PROMPT_TEMPLATES
from san_hf.vocabularies import load_vocabulary


def ask(session: Session, models: Models, *tags: str, **options) -> list[str]:
    """The steps that a question took."""
    return list(session.answer(models, Question(tags=tags, model="tiny", **options)))


@pytest.fixture
def session(pictures):
    session = Session()
    session.show(pictures[0])
    return session


def test_the_answer_is_that_of_a_segmenter(session, models, predictor, pictures):
    """Catches an app that computes anything of its own."""
    ask(session, models, "house, sky", "grass", expansion="road, tree", threshold=0.02)
    options = {"expand": ["road", "tree"], "threshold": 0.02, "confidence": True}
    segmenter = Segmenter(predictor.model, predictor.processor, ["house", "sky", "grass"], **options)
    expected = segmenter(pictures[0])
    assert len(np.unique(expected.label_map)) > 1
    assert np.array_equal(session.segmentation.label_map, expected.label_map)
    assert np.array_equal(session.segmentation.confidence, expected.confidence)
    assert session.segmentation.class_names == ["house", "sky", "grass", "other"]


def test_new_words_need_no_vision_pass(session, models, pictures, passes):
    """Catches a picture that is encoded again for new words, another threshold, or the same file uploaded again."""
    assert ask(session, models, "house", "sky")[0].startswith("Encoding the picture")
    ask(session, models, "fish")
    assert ask(session, models, "fish", threshold=0.5) == ["Labelling the pixels ..."]
    answer = session.segmentation
    assert ask(session, models, "fish", threshold=0.5) == [] and session.segmentation is answer
    session.show(pictures[0])
    ask(session, models, "house", "grass", expansion="coco-stuff")
    assert passes["images"] == session.vision_passes == 1
    session.show(pictures[1])
    assert session.segmentation is None
    ask(session, models, "house", "grass", expansion="coco-stuff")
    assert (passes["images"], session.vision_passes) == (2, 1)
    assert "vision passes for this picture: 1" in describe_times(session)


def test_a_cancelled_question_goes_on_where_it_was(session, models, passes):
    """Catches work that is lost, or a model that stays locked, when a visitor stops an answer in the middle."""
    steps = session.answer(models, Question(tags=("house", "sky"), model="tiny"))
    assert [next(steps)[:20], next(steps)[:18]] == ["Encoding the picture", "Encoding the words"]
    steps.close()
    assert session.segmentation is None
    ask(session, models, "house", "sky")
    assert session.segmentation is not None and passes["images"] == 1


def test_many_words_are_encoded_in_parts(session, models, passes, tmp_path, monkeypatch):
    """Catches a long list of words that can't be cancelled, or that is encoded twice for it."""
    monkeypatch.setenv("SAN_HF_EMBEDDINGS_CACHE", str(tmp_path / "kept"))
    names = [f"thing {number}" for number in range(150)]
    steps = ask(session, models, *names)
    assert [step for step in steps if " of " in step] == [
        f"Encoding the words: {done} of 150 ..." for done in (64, 128, 150)
    ]
    assert passes["prompts"] == 150 * len(PROMPT_TEMPLATES["vild"])


def test_colors_stay_with_names(session, models):
    """Catches a name whose colour changes when others come and go, and two names of one colour."""
    seen: dict[str, str] = {}
    for words in (["a", "b", "c"], ["d", "b"], ["e", "f", "g", "a"], ["h", "a", "d", "c", "b", "e"]):
        ask(session, models, *words)
        for entry in session.segmentation.legend():
            assert seen.setdefault(entry["name"], entry["color"]) == entry["color"]
    assert len(set(seen.values())) == len(seen) == 8


def test_names():
    """Catches names that are lost, twice, or taken for a file."""
    limits = Limits(names=30, name_length=20)
    assert read_names(['house, "door, bars" ', "sky", "House"], "", limits) == ["house", "door, bars", "sky"]
    voc = load_vocabulary("voc")
    assert read_names(["sofa", "sky"], "voc", limits) == ["sofa", "sky", *(name for name in voc if name != "sofa")]
    assert read_names(["/etc/passwd", "names.txt"], None, limits) == ["/etc/passwd", "names.txt"]
    assert read_expansion_names("names.json", limits) == ["names.json"]
    assert read_expansion_names("coco", Limits()) == load_vocabulary("coco-stuff")
    assert read_expansion_names("wall, floor", limits) == ["wall", "floor"]
    for preset in VOCABULARIES:
        assert read_names([], preset, Limits())


@pytest.mark.parametrize(
    ("tags", "preset", "message"),
    [
        (["x" * 21], "", "has 21 letters, expected a few words, at most 20"),
        ([f"n{number}" for number in range(31)], "", "Got 31 class names, expected at most 30"),
        (['"house, sky'], "", "quotes in .* don't match"),
        (["\x07"], "", "has no word in it"),
        ([], "/etc/passwd", "no preset '/etc/passwd'"),
    ],
)
def test_names_beyond_the_limits(tags, preset, message):
    """Catches what a browser may send and the app can't take."""
    with pytest.raises(ValueError, match=message):
        read_names(tags, preset, Limits(names=30, name_length=20))


def test_refusals(models, pictures, tmp_path):
    """Catches a stack trace where a sentence is due, and a broken upload that leaves the picture before in place."""
    session = Session(Limits(pixels=96 * 64, names=5))
    with pytest.raises(ValueError, match="There is no picture yet"):
        ask(session, models, "sky")
    session.show(pictures[0])
    with pytest.raises(ValueError, match="Name what to look for"):
        ask(session, models, " ", " , ")
    with pytest.raises(ValueError, match="There is no model '/etc' here, expected one of tiny"):
        list(session.answer(models, Question(tags=("sky",), model="/etc")))
    with pytest.raises(ValueError, match="Got 6 class names with the expansion's, expected at most 5"):
        ask(session, models, "a, b, c", expansion="d, e, f")
    Image.new("RGB", (97, 64)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match=r"97 x 64 = 6,208 pixels, expected at most 6,144: scale it down"):
        session.show(tmp_path / "large.png")
    assert session.image is None and session.segmentation is None
    for content in (b"", b"GIF89a", b"no picture"):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(ImageError, match="no picture"):
            session.show(tmp_path / "broken.png")


def test_views(session, models, pictures):
    """Catches a view of other colours than the legend's, and a pixel that is described by another one."""
    ask(session, models, "<b>a</b>", "b", "c", "d", "e")
    segmentation = session.segmentation
    assert len(np.unique(segmentation.label_map)) > 1
    mask, overlay, confidence = (draw_view(segmentation, view, 0.25) for view in ("mask", "overlay", "confidence"))
    assert np.array_equal(np.asarray(mask), segmentation.colors[segmentation.label_map])
    image = np.asarray(load_image(pictures[0]), dtype=float)
    assert np.abs(np.asarray(overlay) - (0.75 * image + 0.25 * np.asarray(mask, dtype=float))).max() <= 1
    assert np.abs(np.asarray(confidence) - 255 * segmentation.confidence).max() <= 0.51
    for x, y in ((0, 0), (95, 63), (40, 20)):
        name = segmentation.class_names[segmentation.label_map[y, x]]
        own, *following = segmentation.scores_at(x, y).items()
        assert own[0] == name and own[1] == pytest.approx(segmentation.confidence[y, x])
        likely = ", ".join(f"{other} {score:.2f}" for other, score in following[:2] if score >= 0.005)
        assert likely and describe_pixel(segmentation, x, y) == (
            f"{name}, score {own[1]:.2f} (x {x}, y {y}); next: {likely}"
        )
    html = legend_html(segmentation)
    assert "<b>" not in html
    for entry in segmentation.legend():
        assert entry["pixels"] == 0 or (entry["color"] in html and f"{entry['share']:.1%}" in html)


def test_large_pictures_are_shown_small(session, models, tmp_path):
    """Catches a picture of many megabytes in the browser, and clicks that aren't scaled back."""
    Image.open(tmp_path / "0.png").resize((2600, 1300)).save(tmp_path / "wide.png")
    session.show(tmp_path / "wide.png")
    ask(session, models, "house", "sky", "grass")
    assert draw_view(session.segmentation).size == draw_view(session.segmentation, "confidence").size == (1280, 640)
    assert "(x 2598, y 1298)" in describe_pixel(session.segmentation, 1279, 639)
    told = describe_all_pixels(session.segmentation)
    assert (told["width"], told["height"]) == (640, 320) and len(json.dumps(told)) < 500_000


def test_what_hovering_tells(session, models):
    """Catches a pixel of another place, another class's name or score, and more labels than a byte holds."""
    ask(session, models, "<b>a</b>", "b\x07", "c", "d", "e")
    seen = session.segmentation
    many = replace(
        seen,
        label_map=np.arange(seen.label_map.size, dtype=np.uint16).reshape(seen.label_map.shape) % 700 + 300,
        class_names=[f"n{number}" for number in range(1000)],
    )
    for segmentation in (seen, many):
        told = describe_all_pixels(segmentation)
        packed = zlib.decompress(base64.b64decode(told["pixels"]))
        low, high, score = np.frombuffer(packed, np.uint8).reshape(3, told["height"], told["width"]).astype(int)
        names = np.array(told["names"])[low + 256 * high]
        assert names.shape == segmentation.label_map.shape
        expected = np.array([name.replace("\x07", "\ufffd") for name in segmentation.class_names])
        assert np.array_equal(names, expected[segmentation.label_map])
        assert np.abs(score / 100 - segmentation.confidence).max() <= 0.00501
    assert len(told["names"]) == 700


def test_downloads(session, models, tmp_path):
    """Catches a file that is missing, or that is another picture's."""
    pytest.importorskip("rasterio", reason="needs rasterio")
    ask(session, models, "house", "sky")
    files = write_downloads(session.segmentation, tmp_path / "out")
    endings = [Path(name).name.partition(".")[2] for name in files]
    assert endings == ["overlay.png", "labels.png", "json", "coco.json", "geojson"]
    assert np.array_equal(np.asarray(Image.open(files[1])), session.segmentation.label_map)
    assert json.loads((tmp_path / "out" / "segmentation.json").read_text())["classes"] == session.segmentation.legend()


def test_sessions_are_separate_and_few(pictures):
    """Catches a visitor who sees another one's picture, and memory that grows with the number of visitors."""
    sessions = Sessions(Limits(sessions=3))
    for key, file in zip("abc", pictures):
        sessions.of(key).show(file)
    assert not np.array_equal(np.asarray(sessions.of("a").image), np.asarray(sessions.of("b").image))
    sessions.of("a")
    sessions.of("d")
    assert len(sessions) == 3
    assert sessions.of("a").image is not None  # used since
    sessions.forget("a")
    assert sessions.of("a").image is None
    assert sessions.of("c").image is None  # gone for d or a, and there anew


def test_several_at_once(models, pictures, passes):
    """Catches answers that are lost or mixed up where several visitors ask at the same time."""
    sessions = Sessions(Limits())
    expected, got, errors = {}, {}, []
    for key, file in enumerate(pictures):
        alone = Session()
        alone.show(file)
        ask(alone, models, "house", f"thing {key}", "sky")
        expected[key] = alone.segmentation

    def visit(key: int) -> None:
        try:
            session = sessions.of(str(key))
            session.show(pictures[key])
            for words in (["grass"], ["house", f"thing {key}", "sky"]):
                ask(session, models, *words)
            got[key] = session.segmentation
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=visit, args=(key,)) for key in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and passes["images"] == 8
    for key in range(4):
        assert np.array_equal(got[key].label_map, expected[key].label_map)
        assert got[key].class_names == ["house", f"thing {key}", "sky"]


def test_side_adapters_can_be_chosen(tmp_path, pictures, predictor):
    """Catches a choice that does nothing, one that shows paths, and names that are there twice."""
    model, processor = predictor.model, predictor.processor
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    models = Models.load([str(tmp_path / "whole")])
    assert models.names == ["whole"]
    with pytest.raises(ModelError, match="Got 'whole' twice"):
        Models.load([str(tmp_path / "whole")] * 2)
    model.save_pretrained(tmp_path / "no-adapter")
    with pytest.raises(ModelError, match=r"The side adapter '.*no-adapter' can't be loaded: .*holds no side adapter"):
        models.add_side_adapter("whole", str(tmp_path / "no-adapter"))

    # Another side adapter on the same CLIP
    with models.use("whole") as loaded:
        base = loaded.model
    other = type(base).from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        other.model.mask_decoder.query_mlp.layers[-1].weight.mul_(-1)
    save_as_adapter(other, processor, tmp_path)
    models.add_side_adapter("whole", str(tmp_path / "second"))
    assert models.names == ["whole", "second"]
    session = Session()
    session.show(pictures[0])
    answers = {}
    for name in ("whole", "second", "whole"):
        list(session.answer(models, Question(tags=("house", "sky", "grass"), model=name)))
        first = answers.setdefault(name, session.segmentation)
        assert np.array_equal(first.confidence, session.segmentation.confidence)
    assert not np.allclose(answers["whole"].confidence, answers["second"].confidence, atol=1e-3)
    assert session.vision_passes == 3


def save_as_adapter(model, processor, folder):
    """A side adapter's folder, on the CLIP of this model, which is saved for it."""
    clip, own = CLIPModel(model.config.clip_config), model.state_dict()
    with torch.no_grad():
        for name, value in clip.state_dict().items():
            source = own.get(name, own.get(f"model.{name}"))
            if source is not None:
                value.copy_(source)
    clip.save_pretrained(folder / "clip")
    model.save_pretrained(folder / "second", adapter_only=True, base_model=str(folder / "clip"))
    processor.save_pretrained(folder / "second")


@pytest.mark.parametrize("key", [None, ""])
def test_visitors_without_a_key(key):
    """Catches one session that all share who send no key."""
    with pytest.raises(ValueError, match="without a visitor's key"):
        Sessions(Limits()).of(key)
