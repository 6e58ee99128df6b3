"""Export to OpenVINO."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .description import DESCRIPTION_KEY


EXTRA = "openvino"
PACKAGES = ("openvino",)
EXPORTER = "transformers.exporters.exporter_openvino"
GRAPH = "openvino_model.xml"
INT8_PACKAGES = ("nncf",)
RANGES_FROM_IMAGES = True


def export(form: torch.nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, Any]) -> Any:
    """The graph of a form, an `openvino.Model`."""
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    exporter: Any = OpenVINOExporter()  # which takes any module, if not by its types
    exported = exporter.export(form, inputs, OpenVINOConfig(dynamic_shapes=shapes))
    return exported.program if hasattr(exported, "components") else exported  # transformers < 5.23


@cache
def get_core() -> Any:
    """
    The process's one `openvino.Core`.

    Each core that has run something on the CPU gives the thread a stack of its own for signals, and back the one before
    when it goes. Two that go in the order in which they came leave the thread a stack that is no longer mapped, and the
    next signal, such as that of a child that ends, kills the process or writes into other data (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def quantize(folder: Path, int8: str, inputs: Sequence[Mapping[str, np.ndarray]], description: str) -> None:
    """
    Replaces the graph in a folder by one of 8 bits, with another description, by NNCF.

    Args:
        int8: "weights" alone, or weights and "activations".
        inputs: of the graph, for a few images, which show the ranges of activations.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    # Not from the files themselves: they are mapped into memory, and replaced.
    graph, weights = ((folder / GRAPH).with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin"))
    program = get_core().read_model(graph, weights)
    if int8 == "weights":
        program = nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        program = nncf.quantize(
            program, nncf.Dataset(inputs), subset_size=len(inputs), model_type=nncf.ModelType.TRANSFORMER
        )
    save(program, folder, description)


def save(program: Any, folder: Path, description: str) -> None:
    """Writes the graph, its weights beside it, and the description into its metadata."""
    import openvino

    program.set_rt_info(description, [DESCRIPTION_KEY])
    openvino.save_model(program, folder / GRAPH, compress_to_fp16=False)


class Runner:
    """
    Runs the graph in a folder on OpenVINO, on the CPU, with as many threads as torch has.

    Args:
        folder: of the graph.
        precision: to compute in, "f32" or "bf16". By itself OpenVINO takes bfloat16 where the processor has it.
    """

    def __init__(self, folder: Path, precision: str = "f32"):
        config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.model = get_core().compile_model(folder / GRAPH, "CPU", config)

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Iterable[str]) -> list[np.ndarray]:
        """The named outputs."""
        # A request of its own, so that threads may share the runner.
        results = self.model.create_infer_request().infer(dict(inputs))
        return [results[name] for name in outputs]
