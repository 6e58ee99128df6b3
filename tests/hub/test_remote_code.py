"""A saved folder is enough: it loads, with its own code, where this package isn't."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from san_hf import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from tests.tiny import randomized, tiny_config, tiny_tokenizer


CLASSES = ["sky", "grass", "a cat"]
# Runs in another process, which can't import the package: as on a machine without it.
ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("san_hf", "modeling", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, again, image_file, output_file = sys.argv[1:]
trust = {"trust_remote_code": True}
image = np.load(image_file)
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
model = AutoModelForSemanticSegmentation.from_pretrained(folder, **trust).eval()
base = AutoModel.from_pretrained(folder, **trust).eval()
inputs = processor(images=image, text=["sky", "grass", "a cat"], segmentation_maps=np.zeros(image.shape[:2], int))
with torch.no_grad():
    outputs = model(**inputs)
    base_outputs = base(inputs["pixel_values"])
(labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
# What was loaded can be saved and loaded once more.
model.save_pretrained(again)
processor.save_pretrained(again)
once_more = AutoModelForSemanticSegmentation.from_pretrained(again, **trust).eval()
with torch.no_grad():
    logits_once_more = once_more(**inputs).class_queries_logits
segments = pipeline("image-segmentation", model=folder, **trust)(PIL.Image.fromarray(image))
assert {segment["label"] for segment in segments} <= set(config.id2label.values())
try:
    pipeline("image-segmentation", model=folder, **trust)(PIL.Image.fromarray(image), candidate_labels=["sky"])
except ValueError as error:
    assert "open-vocabulary-segmentation" in str(error), error
else:
    raise AssertionError("Transformers' own pipeline dropped candidate_labels")
segmenter = pipeline("open-vocabulary-segmentation", model=folder, **trust)
images = [PIL.Image.fromarray(image), PIL.Image.fromarray(image[:, :60])]
names = ["sky", "grass", "a cat"]
segmented, _ = segmenter(images, candidate_labels=names, batch_size=2, return_label_map=True)
segmenter.save_pretrained(again)
once_more = pipeline("open-vocabulary-segmentation", model=again, **trust)
(segmented_once_more,) = once_more(images[:1], candidate_labels=names, return_label_map=True)
assert torch.equal(segmented["segmentation"], segmented_once_more["segmentation"])
assert not {"san_hf", "modeling"} & set(sys.modules)
assert sum(p.requires_grad for p in model.parameters()) < len(list(model.parameters()))
save_file({
    "pixel_values": inputs["pixel_values"],
    "image_processor.pixel_values": image_processor(image, return_tensors="pt")["pixel_values"],
    "input_ids": inputs["input_ids"],
    "class_queries_logits": outputs.class_queries_logits,
    "masks_queries_logits": outputs.masks_queries_logits,
    "loss": outputs.loss,
    "mask_embeds": base_outputs.mask_embeds,
    "labels": labels,
    "labels.pipeline": segmented["segmentation"],
    "class_queries_logits.once_more": logits_once_more,
}, output_file)
"""


@pytest.fixture
def folder(tmp_path):
    """A complete checkpoint with a vocabulary: model, processor, tokenizer."""
    model = randomized(tiny_config())
    model.set_vocabulary(["x", "y"], class_embeds=torch.randn(2, 16))
    model.save_pretrained(tmp_path / "san")
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    SANProcessor(image_processor, tiny_tokenizer()).save_pretrained(tmp_path / "san")
    return tmp_path / "san"


def test_folder_loads_without_the_package(folder, tmp_path):
    """
    A file that doesn't travel, an import that isn't there, a class that `auto_map` doesn't name; another result; a
    warning or an error in the log that isn't true.
    """
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    output_file = tmp_path / "output.safetensors"
    arguments = [folder, tmp_path / "again", tmp_path / "image.npy", output_file]
    # Isolated, from another folder, with an empty cache for the code that travels with checkpoints.
    run = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stderr.replace("\r", "\n").splitlines()
    progress = ("Loading weights:", "Writing model shards:")
    assert not [line for line in lines if line.strip() and not line.startswith(progress)]
    got = load_file(output_file)

    model = SANForSemanticSegmentation.from_pretrained(folder)
    processor = SANProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=CLASSES)
    with torch.no_grad():
        outputs = model(**inputs)
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 80)])
    assert torch.equal(got["pixel_values"], inputs["pixel_values"])
    assert torch.equal(got["image_processor.pixel_values"], inputs["pixel_values"])
    assert torch.equal(got["input_ids"], inputs["input_ids"])
    # Another process may sum in another order.
    for name in ("class_queries_logits", "masks_queries_logits", "mask_embeds"):
        torch.testing.assert_close(got[name], outputs[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["class_queries_logits.once_more"], got["class_queries_logits"], rtol=1e-5, atol=1e-5)
    assert (got["labels"] == labels).float().mean() > 0.999
    assert (got["labels.pipeline"] == labels).float().mean() > 0.999
    assert got["loss"].isfinite()


def test_folder_carries_its_code_and_nothing_else(folder):
    """A module that is forgotten, or one of the package's that has no business there."""
    code = {path.name for path in folder.glob("*.py")}
    assert code == {
        "adapter_folder_san.py",
        "adapters_san.py",
        "base_clip_san.py",
        "card_san.py",
        "clip_recognition_san.py",
        "configuration_checks_san.py",
        "configuration_san.py",
        "fast_linear_san.py",
        "image_input_san.py",
        "image_processing_san.py",
        "image_sizes_san.py",
        "label_maps_san.py",
        "loss_san.py",
        "modeling_san.py",
        "outputs_san.py",
        "pipeline_san.py",
        "positions_san.py",
        "post_processing_san.py",
        "processing_san.py",
        "prompts_san.py",
        "push_san.py",
        "side_adapter_san.py",
        "text_san.py",
        "text_tree_san.py",
        "upload_san.py",
    }
    config = json.loads((folder / "config.json").read_text())
    assert {facts["impl"].split(".")[0] for facts in config["custom_pipelines"].values()} == {"pipeline_san"}
    auto_map = config["auto_map"]
    assert {name: value.split(".")[0] for name, value in auto_map.items()} == {
        "AutoConfig": "configuration_san",
        "AutoModel": "modeling_san",
        "AutoModelForSemanticSegmentation": "modeling_san",
    }
