"""What runs the vision pass: torch, or a graph that is exported first."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from photos import draw_photo

from san_hf.export import ExportedVision, export_model
from san_hf.inference import Predictor, Vocabulary


if TYPE_CHECKING:
    from cases import Setup

# 8 bits, of weights and activations, are no exact form.
RUNTIMES = ("torch", "onnx", "openvino", "openvino-int8")


def make_predictor(setup: "Setup") -> Predictor:
    """The model of a setup on its runtime."""
    if setup.runtime == "torch":
        return Predictor(setup.model, setup.processor)
    target, _, bits = setup.runtime.partition("-")
    folder = Path(setup.options.scratch, f"{setup.name}-{setup.runtime}")
    if not folder.exists():
        images = [draw_photo(np.random.default_rng(1 + number), 8, setup.sizes.input)[0] for number in range(4)]
        vocabulary = Vocabulary(tuple("abcdefgh"), setup.random_embeds(8), 8)
        calibrated = {"int8": "activations", "images": images, "vocabulary": vocabulary} if bits else {}
        export_model(setup.model, setup.processor, folder, target=target, **calibrated)
    return Predictor(setup.model, setup.processor, runtime=ExportedVision(folder, target))
