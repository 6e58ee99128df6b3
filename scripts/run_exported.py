"""Segments an image with a folder of `san-hf export --form closed --label-maps`. Needs the runtime, NumPy and Pillow.

python scripts/run_exported.py FOLDER photo.jpg labels.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def segment(folder: Path, photo: str, output: str) -> None:
    facts = json.loads((folder / "san_hf.json").read_text(encoding="utf-8"))
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")

    # The processor's size, normalised, padded to multiples of the patches.
    short, long = facts["size"]["shortest_edge"], facts["size"].get("longest_edge", 1e9)
    scale = min(short / min(image.size), long / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) * facts["rescale_factor"]
    pixels = (pixels - facts["image_mean"]) / facts["image_std"]
    pixels = np.pad(pixels, [(0, -side % facts["size_divisor"]) for side in (height, width)] + [(0, 0)])
    pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)

    if facts["target"] == "onnx":
        import onnxruntime

        (labels,) = onnxruntime.InferenceSession(folder / "model.onnx").run(["labels"], {"pixel_values": pixels})
    else:
        import openvino

        # By itself it computes in bfloat16 where the processor can.
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        labels = openvino.compile_model(folder / "openvino_model.xml", "CPU", options)([pixels])["labels"]

    # Indices of facts["class_names"], up to 256.
    labels = Image.fromarray(labels[0, :height, :width].astype(np.uint8))
    labels.resize(image.size, Image.Resampling.NEAREST).save(output)


if __name__ == "__main__":
    segment(Path(sys.argv[1]), *sys.argv[2:])
