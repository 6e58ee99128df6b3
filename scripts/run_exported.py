"""Segments an image with a folder of `san-hf export`. It needs a runtime (onnxruntime or openvino), NumPy and Pillow.

python scripts/run_exported.py FOLDER photo.jpg labels.png

The graph is a closed one with label maps, or an open one with a vocabulary beside it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def run(folder, target, inputs, outputs):
    if target == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(folder / "model.onnx").run(outputs, inputs)
    import openvino

    # By itself it computes in bfloat16 where the processor can.
    graph = openvino.compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [graph(inputs)[name] for name in outputs]


def prepare(image, facts):
    """(1, 3, H, W), and the image's size inside it."""
    short, long = facts["size"]["shortest_edge"], facts["size"].get("longest_edge", 1e9)
    scale = min(short / min(image.size), long / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) * facts["rescale_factor"]
    pixels = (pixels - facts["image_mean"]) / facts["image_std"]
    padding = [(0, -side % facts["size_divisor"]) for side in (height, width)]
    return np.pad(pixels, [*padding, (0, 0)]).transpose(2, 0, 1)[None].astype(np.float32), (height, width)


def read_class_embeds(file):
    """Embeddings (C, D) from the file of a vocabulary: a length, a JSON that says where they are, and the numbers."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensor = json.loads(data[8:start])["class_embeds"]
    begin, end = tensor["data_offsets"]
    return np.frombuffer(data[start + begin : start + end], np.float32).reshape(tensor["shape"])


def segment(folder, image):
    """A label map of the image's size; its numbers are indices of facts["class_names"]."""
    facts = json.loads((folder / "san_hf.json").read_text(encoding="utf-8"))
    pixels, (height, width) = prepare(image, facts)
    if facts["form"] == "closed":
        (labels,) = run(folder, facts["target"], {"pixel_values": pixels}, ["labels"])
        labels = labels[0]
    else:
        inputs = {"pixel_values": pixels, "class_embeds": read_class_embeds(folder / "vocabulary.safetensors")}
        names = ["masks_queries_logits", "class_queries_logits"]
        masks, classes = (result[0] for result in run(folder, facts["target"], inputs, names))
        shares = np.exp(classes - classes.max(1, keepdims=True))
        shares = (shares / shares.sum(1, keepdims=True))[:, :-1]  # (Q, C), without no object
        size = pixels.shape[:1:-1]
        masks = np.stack([np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR)) for mask in masks])
        labels = np.stack([(shares.T @ (1 / (1 + np.exp(-rows)))).argmax(0) for rows in masks.swapaxes(0, 1)])
    labels = Image.fromarray(labels[:height, :width].astype(np.uint8))  # up to 256 classes
    return labels.resize(image.size, Image.Resampling.NEAREST)


if __name__ == "__main__":
    folder, photo, output = sys.argv[1:]
    segment(Path(folder), ImageOps.exif_transpose(Image.open(photo)).convert("RGB")).save(output)
