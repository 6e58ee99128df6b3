"""Export to ONNX, which ONNX Runtime and many others run."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .description import DESCRIPTION_KEY


EXTRA = "onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXPORTER = "transformers.exporters.exporter_onnx"
GRAPH = "model.onnx"
INT8_PACKAGES = ("onnxruntime",)
RANGES_FROM_IMAGES = False


def export(form: torch.nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, Any]) -> Any:
    """The graph of a form, an `onnx_ir.Model`."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter: Any = OnnxExporter()  # which takes any module, if not by its types
    exported = exporter.export(form, inputs, OnnxConfig(dynamic_shapes=shapes))
    # transformers < 5.23 gives torch's own `ONNXProgram`.
    return exported.program if hasattr(exported, "components") else exported.model


def quantize(folder: Path, int8: str, inputs: Sequence[Mapping[str, np.ndarray]], description: str) -> None:
    """
    Replaces the graph in a folder by one of 8 bits, with another description, by ONNX Runtime's own quantisation.

    Args:
        int8: "weights" alone, which are ONNX Runtime's own operators, or weights and "activations", whose ranges are
            taken while the graph runs: those of calibration images kept fewer labels.
        inputs: not used.
    """
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if int8 == "weights":
        quantizer = MatMulNBitsQuantizer(onnx.load(folder / GRAPH), bits=8, block_size=128, is_symmetric=True)
        quantizer.process()
        save(onnx_ir.from_proto(quantizer.model.model), folder, description)
        return
    with tempfile.TemporaryDirectory() as scratch:
        quantized = Path(scratch) / GRAPH
        quantize_dynamic(
            folder / GRAPH,
            quantized,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # To 7 bits: processors without VNNI add two products in 16 bits, which is too few for 8.
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
        save(onnx_ir.load(quantized), folder, description)


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
