"""Export by `torch.export`, which torch runs without the code of the model."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from .description import DESCRIPTION_KEY
from .errors import ExportError


EXTRA = None
PACKAGES: tuple[str, ...] = ()
EXPORTER = "transformers.exporters.exporter_dynamo"
GRAPH = "model.pt2"
# In a process that has only torch and the file.
PROGRAM = """
import sys, torch
from safetensors.torch import load_file, save_file
graph, inputs, outputs, *names = sys.argv[1:]
given = load_file(inputs)
results = torch.export.load(graph).module()(**{name: given[name] for name in names})
save_file({name: result.contiguous() for name, result in results.items()}, outputs)
"""


def export(form: torch.nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, Any]) -> Any:
    """The graph of a form, a `torch.export.ExportedProgram`."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    exporter: Any = DynamoExporter()  # which takes any module, if not by its types
    exported = exporter.export(form, inputs, DynamoConfig(dynamic_shapes=shapes))
    return exported.program if hasattr(exported, "components") else exported  # transformers < 5.23


def save(program: Any, folder: Path, description: str) -> None:
    """Writes the graph with its weights, and the description as a file inside it."""
    torch.export.save(program, folder / GRAPH, extra_files={DESCRIPTION_KEY: description})


class Runner:
    """
    Runs the graph in a folder, each time in a new process: what it is verified by.

    Args:
        folder: of the graph.
    """

    def __init__(self, folder: Path):
        self.graph = folder / GRAPH

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Iterable[str]) -> list[np.ndarray]:
        """
        The named outputs.

        Raises:
            ExportError: the process failed.
        """
        with TemporaryDirectory() as folder:
            files = Path(folder, "inputs"), Path(folder, "outputs")
            save_file(dict(inputs), files[0])
            command = [sys.executable, "-c", PROGRAM, str(self.graph), *map(str, files), *inputs]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ExportError(f"The exported program can't be run: {done.stderr.strip().splitlines()[-1:]}")
            results = load_file(files[1])
        return [results[name] for name in outputs]
