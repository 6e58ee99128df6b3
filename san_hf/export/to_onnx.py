"""Export to ONNX, which ONNX Runtime and many others run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .description import DESCRIPTION_KEY


EXTRA = "onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXPORTER = "transformers.exporters.exporter_onnx"
GRAPH = "model.onnx"


def export(form: torch.nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, Any]) -> Any:
    """The graph of a form, an `onnx_ir.Model`."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter: Any = OnnxExporter()  # which takes any module, if not by its types
    exported = exporter.export(form, inputs, OnnxConfig(dynamic_shapes=shapes))
    # transformers < 5.23 gives torch's own `ONNXProgram`.
    return exported.program if hasattr(exported, "components") else exported.model


def save(program: Any, folder: Path, description: str) -> None:
    """Writes the graph, its weights beside it, and the description into its metadata."""
    import onnx_ir

    program.metadata_props[DESCRIPTION_KEY] = description
    onnx_ir.save(program, folder / GRAPH, external_data=f"{GRAPH}.data")


class Runner:
    """
    Runs the graph in a folder on ONNX Runtime, on the CPU, with as many threads as torch has.

    Args:
        folder: of the graph.
    """

    def __init__(self, folder: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Iterable[str]) -> list[np.ndarray]:
        """The named outputs."""
        return self.session.run(list(outputs), dict(inputs))
