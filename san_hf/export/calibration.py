"""Graphs of 8 bits, by NNCF."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


PACKAGES = ("nncf",)


@dataclass(frozen=True)
class Calibration:
    """
    How to bring a graph to 8 bits.

    Attributes:
        inputs: of the graph, for a few images: weights and activations become integers, whose ranges are those seen
            with these. None: the weights alone.
    """

    inputs: Sequence[Mapping[str, np.ndarray]] = ()

    def quantize(self, graph: Any) -> Any:
        """A graph of OpenVINO, of 8 bits."""
        import nncf

        nncf.set_log_level(logging.ERROR)
        if not self.inputs:
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
        return nncf.quantize(
            graph,
            nncf.Dataset(self.inputs),
            subset_size=len(self.inputs),
            model_type=nncf.ModelType.TRANSFORMER,
        )
