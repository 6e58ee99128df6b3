"""`pipeline("open-vocabulary-segmentation", ...)`, Transformers' own pipeline beside it, and `outputs.logits`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPModel,
    ImageSegmentationPipeline,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    pipeline,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.pipelines.pt_utils import KeyDataset

from san_hf import Predictor, SANForSemanticSegmentation, SANImageProcessor, SANProcessor, load_vocabulary
from san_hf.inference.pipeline import OpenVocabularySegmentationPipeline
from san_hf.modeling import SANModel
from tests.tiny import segmenting_model, tiny_config


TASK = "open-vocabulary-segmentation"
NAMES = ["sky", "grass", "a cat"]


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "san"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def segmenter(model, processor):
    return pipeline(TASK, model=model, processor=processor, device="cpu")


def labels_of(segments, names=NAMES) -> np.ndarray:
    """The label map that segments make; -1 where there is none. They must not overlap."""
    labels = np.full(segments[0]["mask"].size[::-1], -1)
    for segment in segments:
        mask = np.asarray(segment["mask"])
        assert set(np.unique(mask)) <= {0, 255} and (labels[mask > 0] == -1).all()
        labels[mask > 0] = names.index(segment["label"])
    return labels


def assert_same(segments, expected):
    assert [segment["label"] for segment in segments] == [segment["label"] for segment in expected]
    for segment, other in zip(segments, expected):
        assert (np.asarray(segment["mask"]) != np.asarray(other["mask"])).mean() < 1e-3
        assert segment["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_segments_are_those_of_the_one_path(model, processor, images, segmenter, batch_size):
    """A batch that pads images for each other's sake or mixes up their order or sizes; another label than that of
    post-processing; a score that isn't the mean of its own pixels' confidence."""
    predictor = Predictor(model, processor)
    label_maps = predictor(images, predictor.vocabulary(NAMES))
    results = segmenter(images, candidate_labels=NAMES, batch_size=batch_size)
    assert len(results) == len(images) and len({label for x in results for label in labels_of(x).flat}) > 1
    for image, expected, segments in zip(images, label_maps, results):
        assert (labels_of(segments) == expected.numpy()).mean() > 0.999
        inputs = processor(images=image, text=NAMES)
        with torch.no_grad():
            outputs = model(**inputs)
        size = [(image.height, image.width)]
        (result,) = processor.post_process_semantic_segmentation(outputs, size, return_confidence=True)
        for segment in segments:
            own = result.confidence[result.segmentation == NAMES.index(segment["label"])]
            assert segment["score"] == pytest.approx(own.mean().item(), abs=1e-4)


def test_expansion_threshold_and_label_map(model, processor, images, segmenter):
    """Classes of the expansion, or pixels below the threshold, that make segments; another label map than the one that
    the rest of the package makes of the same settings."""
    predictor = Predictor(model, processor)
    for options in (
        {"expansion": ["road", "GRASS", "water"]},
        {"threshold": 0.2},
        {"expansion": ["x"], "threshold": 0.2},
    ):
        theirs = {"expand" if name == "expansion" else name: value for name, value in options.items()}
        label_maps = predictor(images, predictor.vocabulary(NAMES, **theirs))
        results = segmenter(images, candidate_labels=NAMES, return_label_map=True, batch_size=3, **options)
        seen = set()
        for expected, result in zip(label_maps, results):
            assert result["segmentation"].dtype == torch.int64
            assert (result["segmentation"] == expected).float().mean() > 0.999
            assert result["id2label"] == dict(enumerate([*NAMES, "other"]))
            for segment in result["segments_info"]:
                assert segment["id"] == segment["label_id"] == NAMES.index(segment["label"])
                inside = result["segmentation"].numpy() == segment["id"]
                assert ((np.asarray(segment["mask"]) > 0) == inside).all() and inside.any()
            seen |= set(result["segmentation"].unique().tolist())
        assert len(NAMES) in seen and len(seen) > 1
    with pytest.raises(ValueError, match="class of the name 'other'"):
        segmenter(images[0], candidate_labels=["Other", "sky"], threshold=0.2)


def test_forms_of_class_names(images, segmenter, tmp_path):
    """A form that the rest of the package takes and the pipeline doesn't, or reads as other names."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    expected = segmenter(images[0], candidate_labels=NAMES, return_label_map=True)
    for form in (tmp_path / "names.txt", str(tmp_path / "names.txt"), {1: NAMES[1], 0: NAMES[0], 2: NAMES[2]}):
        result = segmenter(images[0], candidate_labels=form, return_label_map=True)
        assert result["id2label"] == expected["id2label"]
        assert_same(result["segments_info"], expected["segments_info"])
    result = segmenter(images[0], candidate_labels="voc", return_label_map=True)
    assert list(result["id2label"].values()) == load_vocabulary("voc")
    for expansion, names in (("coco", "coco-stuff"), ("voc", "voc")):
        results = [
            segmenter(images[0], candidate_labels=NAMES, expansion=form, return_label_map=True)
            for form in (expansion, load_vocabulary(names))
        ]
        assert torch.equal(results[0]["segmentation"], results[1]["segmentation"])


def test_forms_of_images(images, segmenter, tmp_path):
    """A form of images that fails, is read at once where it should stream, or comes in another order; photographs that
    lie on their side; 16 bits cut off to white; folders that are links, and pipes that would hang."""
    (tmp_path / "in" / "b").mkdir(parents=True)
    for image, name in zip(images, ("a.png", "b/c.png", "b.png", "b/.hidden.png", ".hidden.png")):
        image.save(tmp_path / "in" / name)
    (tmp_path / "linked").mkdir()
    images[4].save(tmp_path / "linked" / "e.png")
    (tmp_path / "in" / "z").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    call = {"candidate_labels": NAMES, "batch_size": 2}
    expected = segmenter([images[index] for index in (0, 2, 1, 4)], **call)
    files = [tmp_path / "in" / name for name in ("a.png", "b.png", "b/c.png", "z/e.png")]

    class Rows(Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            return {"image": Image.open(files[index]), "name": index}

    read = []

    def generate():
        for file in files:
            read.append(file)
            yield file

    forms = (tmp_path / "in", files, tuple(map(str, files)), KeyDataset(Rows(), "image"), iter(files), generate())
    for form in forms:
        result = segmenter(form, **call)
        assert isinstance(result, list) == isinstance(form, list | tuple)
        assert len(read) <= 1  # Transformers looks at the first
        result = list(result)
        assert len(result) == 4
        for segments, segments_expected in zip(result, expected):
            assert_same(segments, segments_expected)
    stream = segmenter(generate(), candidate_labels=NAMES)
    read.clear()
    assert_same(next(iter(stream)), expected[0])
    assert len(read) < 3

    upright = images[0]
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert_same(segmenter(tmp_path / "turned.png", **call), segmenter(upright, **call))
    grey = Image.fromarray(np.asarray(upright.convert("L")))
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert_same(segmenter(str(tmp_path / "deep.png"), **call), segmenter(grey, **call))
    assert segmenter([], candidate_labels=NAMES) == [] == list(segmenter(iter(()), candidate_labels=NAMES))


def test_equal_labels_are_encoded_once(processor, images, passes):
    """Prompts that go through the text tower again for the same names, or don't when the tower or the templates are
    others."""
    model = segmenting_model()
    segmenter = pipeline(TASK, model=model, processor=processor, candidate_labels=NAMES)
    templates = 14
    segmenter(images, batch_size=2)
    segmenter(iter(images), candidate_labels=tuple(NAMES))
    assert passes["prompts"] == 3 * templates and passes["images"] == 5
    segmenter(images[0], candidate_labels=NAMES[:2])
    segmenter(images[0])
    assert passes["prompts"] == 5 * templates
    segmenter(images[0], prompt_templates=["{}", "a {}"])
    assert passes["prompts"] == 5 * templates + 6
    before = segmenter(images[0])
    with torch.no_grad():
        model.text_projection.weight.mul_(-1)
    after = segmenter(images[0])
    assert passes["prompts"] == 8 * templates + 6
    assert [s["label"] for s in before] != [s["label"] for s in after] or before[0]["score"] != after[0]["score"]
    model.to(torch.bfloat16)
    segmenter(images[0])
    assert passes["prompts"] == 11 * templates + 6
    for index in range(40):
        segmenter(images[0], candidate_labels=[f"name {index}"], prompt_templates=["{}"])
    segmenter(images[0], candidate_labels=["name 39"], prompt_templates=["{}"])
    assert passes["prompts"] == 11 * templates + 46
    segmenter(images[0])
    assert passes["prompts"] == 14 * templates + 46, "the oldest of many vocabularies were kept"


def test_carried_vocabulary(processor, images, segmenter, tmp_path, passes):
    """A model with classes of its own that asks for names, encodes them again or has other ones shown; one without that
    segments by something."""
    with pytest.raises(ValueError, match="carries no class names of its own: say what to look for"):
        segmenter(images[0])
    model = segmenting_model()
    model.set_vocabulary(NAMES, **processor(text=NAMES))
    own = pipeline(TASK, model=model, processor=processor)
    passes["prompts"] = 0
    results = own(images, batch_size=2)
    assert passes["prompts"] == 0
    for segments, expected in zip(results, segmenter(images, candidate_labels=NAMES)):
        assert_same(segments, expected)
    assert "other" in own(images[0], threshold=0.9, return_label_map=True)["id2label"].values()
    with pytest.raises(ValueError, match="without candidate_labels"):
        own(images[0], expansion=["x"])


@pytest.mark.parametrize(
    "call, expected",
    [
        ({"candidate_labels": []}, "Got an empty list for candidate_labels"),
        ({"candidate_labels": ["sky", "Sky"]}, "one to the tokenizer"),
        ({"candidate_labels": {"sky", "grass"}}, "Got a set as candidate_labels"),
        ({"candidate_labels": "sky, grass"}, r"expected a list of class names: \['sky', 'grass'\]"),
        ({"candidate_labels": ["sky", " "]}, "Got a blank class name at position 1 of candidate_labels"),
        ({"candidate_labels": ["sky", 3]}, "Got 3 at position 1 of candidate_labels"),
        ({"candidate_labels": NAMES, "expansion": "cocoa"}, r"Got expansion='cocoa', expected a list"),
        ({"candidate_labels": "nowhere.txt"}, "The class list 'nowhere.txt'|'nowhere.txt' can't be read"),
        ({"candidate_labels": "scene.safetensors"}, "Got a vocabulary as candidate_labels.*san_hf.Segmenter"),
        ({"candidate_labels": NAMES, "threshold": 1.5}, "Got threshold=1.5, expected a score between 0 and 1"),
        ({"candidate_labels": NAMES, "threshold": "0.5"}, "Got threshold='0.5', expected a score between 0 and 1"),
        ({"candidate_labels": NAMES, "threshold": float("nan")}, "Got threshold=nan"),
        ({"candidate_labels": NAMES, "threshold": True}, "Got threshold=True"),
        ({"candidate_labels": NAMES, "treshold": 0.5}, "unknown argument 'treshold', expected one of .*threshold"),
        ({"candidate_labels": NAMES, "prompt_templates": "nix"}, "Got prompt_templates='nix'"),
        ({"candidate_labels": NAMES, "side_adapter": "nix"}, "There is no side adapter 'nix'"),
        ({"candidate_labels": NAMES, "images": "nix.jpg"}, "Cannot use the image 'nix.jpg'"),
        ({"candidate_labels": NAMES, "images": np.zeros((9, 9, 3))}, "Cannot use an image: .*a PIL image"),
        ({"candidate_labels": NAMES, "images": {"image": 1}}, r"a row with the columns \['image'\]"),
        ({"candidate_labels": NAMES, "images": None}, "Got no images"),
    ],
)
def test_what_is_refused(images, segmenter, call, expected):
    """An argument that is dropped without a word, or refused in other words than elsewhere."""
    with pytest.raises(ValueError, match=expected):
        segmenter(**({"images": images[0]} | call))
    names = {"images"} | ({"prompt_templates", "side_adapter"} & set(call))
    if not names & set(call):
        with pytest.raises(ValueError, match=expected):
            pipeline(TASK, model=segmenter.model, processor=segmenter.processor, **call)


def test_default_model(images):
    """A KeyError where no model is named."""
    segmenter = pipeline(TASK, device="cpu")
    assert Path(segmenter.model.name_or_path).name == "picture-book"
    assert segmenter(images[0], candidate_labels=NAMES)


def test_an_empty_folder_is_refused(segmenter, tmp_path):
    """Nothing that looks like success."""
    with pytest.raises(ValueError, match="holds no image"):
        segmenter(tmp_path, candidate_labels=NAMES)


def test_parts_of_the_pipeline(model, processor, folder, images):
    """An image processor or tokenizer that is given and not used; parts of other models that are."""
    other = SANImageProcessor(size={"shortest_edge": 32, "longest_edge": 128})
    expected = SANProcessor(other, processor.tokenizer)
    segments = pipeline(TASK, model=model, processor=expected)(images[0], candidate_labels=NAMES)
    by_part = pipeline(TASK, model=str(folder), image_processor=other, tokenizer=processor.tokenizer)
    assert_same(by_part(images[0], candidate_labels=NAMES), segments)
    assert_same(by_part([images[0]], candidate_labels=NAMES, batch_size=2)[0], segments)
    for parts, words in (
        (
            {"model": model, "processor": processor, "image_processor": CLIPImageProcessor()},
            "expected SANImageProcessor",
        ),
        ({"model": model, "processor": processor.image_processor}, "expected the checkpoint's SANProcessor"),
        ({"model": SANModel(tiny_config()), "processor": processor}, "Got SANModel as the model"),
        ({"model": CLIPModel(tiny_config().clip_config), "processor": processor}, "Got CLIPModel as the model"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(TASK, **parts)
    with pytest.raises(ValueError, match="Got no processor"):
        OpenVocabularySegmentationPipeline(model=model, image_processor=processor.image_processor)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "cpu"}], ids=str)
def test_dtypes_and_devices(folder, images, options):
    """A pipeline that runs in float32 only, or where Accelerate hasn't placed the model."""
    segmenter = pipeline(TASK, model=str(folder), **options)
    assert segmenter.dtype == getattr(torch, str(options.get("dtype", "float32")).removeprefix("torch."))
    expected = pipeline(TASK, model=str(folder))(images, candidate_labels=NAMES)
    for segments, exact in zip(segmenter(images, candidate_labels=NAMES, batch_size=2), expected):
        assert (labels_of(segments) == labels_of(exact)).mean() > 0.9


def test_saved_and_loaded(folder, images, segmenter, tmp_path):
    """A saved pipeline without its processor; a checkpoint whose code has to be trusted where the package is installed,
    or whose configuration doesn't name its pipelines for where it isn't."""
    segmenter.save_pretrained(tmp_path / "again")
    assert_same(
        pipeline(TASK, model=str(tmp_path / "again"))(images[0], candidate_labels=NAMES),
        segmenter(images[0], candidate_labels=NAMES),
    )
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]
    assert {task: facts["impl"] for task, facts in saved.items()} == {
        TASK: "pipeline_san.OpenVocabularySegmentationPipeline",
        "image-segmentation": "pipeline_san.SANImageSegmentationPipeline",
    }
    assert not hasattr(AutoConfig.from_pretrained(folder), "custom_pipelines")
    assert not hasattr(segmenter.model.config, "custom_pipelines")
    trusting = pipeline(TASK, model=str(folder), trust_remote_code=True)
    assert type(trusting) is OpenVocabularySegmentationPipeline


def test_side_adapter_per_call(images, processor, tmp_path):
    """A choice of side adapter that is dropped."""
    CLIPModel(tiny_config().clip_config).save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "patch_size": 8, "image_size": 64, "num_queries": 5}
    models = [SANForSemanticSegmentation.from_clip(str(tmp_path / "clip"), **sizes).eval() for _ in range(2)]
    models[1].save_pretrained(tmp_path / "other", adapter_only=True, processor=processor)
    first, second = (pipeline(TASK, model=m, processor=processor, candidate_labels=NAMES)(images[0]) for m in models)
    assert [s["score"] for s in first] != [s["score"] for s in second]
    models[0].load_side_adapter(tmp_path / "other", "other")
    both = pipeline(TASK, model=models[0], processor=processor, candidate_labels=NAMES)
    assert_same(both(images[0]), first)
    assert_same(both(images[0], side_adapter="other"), second)


# ---- Transformers' own pipeline


def test_stock_pipeline_takes_no_names(processor, images, folder):
    """`candidate_labels` that Transformers' own pipeline drops: the segments would be of other classes."""
    model = segmenting_model()
    model.set_vocabulary(NAMES, **processor(text=NAMES))
    stock = pipeline("image-segmentation", model=model, image_processor=processor.image_processor)
    assert isinstance(stock, ImageSegmentationPipeline)
    assert {segment["label"] for segment in stock(images[0], threshold=0.5)} <= set(NAMES)
    for name in ("candidate_labels", "expansion"):
        with pytest.raises(ValueError, match=f"knows no {name}.*pipeline.'{TASK}'"):
            stock(images[0], **{name: ["x"]})
        with pytest.raises(ValueError, match=f"knows no {name}"):
            pipeline("image-segmentation", model=str(folder), **{name: ["x"]})


def test_stock_pipeline_of_other_models_is_transformers_own(images):
    """A package that changes what others' models do."""
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8))
    image_processor = SegformerImageProcessorPil(size={"height": 32, "width": 32})
    stock = pipeline("image-segmentation", model=model, image_processor=image_processor)
    assert type(stock) is ImageSegmentationPipeline
    assert stock(images[0], candidate_labels=NAMES)


# ---- logits


def test_logits_of_pixels(model, processor, images):
    """Logits whose best class isn't the label, that lie over the padding, too, or that aren't of their own image."""
    inputs = processor(images=images[:2], text=NAMES)
    with torch.no_grad():
        outputs = model(**inputs)
    logits = outputs.logits
    grid = tuple(logits.shape[-2:])
    assert logits.shape == (2, 3, *outputs.masks_queries_logits.shape[-2:])
    results = processor.post_process_semantic_segmentation(outputs, [grid] * 2, return_segmentation_scores=True)
    for one, result in zip(logits, results):
        assert torch.equal(one.argmax(0), result.segmentation)
        shares = result.segmentation_scores / result.segmentation_scores.sum(0)
        torch.testing.assert_close(one.softmax(0), shares, rtol=1e-4, atol=1e-5)
    # As an item they are asked for by label smoothing, whose loss would mean nothing.
    assert "logits" not in outputs
    with pytest.raises(ValueError, match="label_smoothing_factor at 0"):
        outputs["logits"]


def test_an_address_that_cannot_be_reached(segmenter):
    """An error of the library that fetches, which names neither the image nor what to do."""
    with pytest.raises(ValueError, match=r"Cannot use the image 'http://127\.0\.0\.1:1/a\.png': it can't be fetched"):
        segmenter("http://127.0.0.1:1/a.png", candidate_labels=["sky"], timeout=5)
