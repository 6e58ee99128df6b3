"""The benchmarks: a file each, and one line each in `registry.py`."""

from .base import Benchmark, Source
from .registry import BENCHMARKS


__all__ = ["BENCHMARKS", "Benchmark", "Source"]
