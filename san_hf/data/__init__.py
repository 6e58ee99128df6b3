"""Data to train and measure on: benchmarks, data sets of the Hub, and one's own."""

from .benchmarks import BENCHMARKS, Benchmark
from .loading import DataError, SegmentationDataset, load_segmentation_dataset, read_class_names
from .prepare import prepare_benchmark, push_dataset


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "DataError",
    "SegmentationDataset",
    "load_segmentation_dataset",
    "prepare_benchmark",
    "push_dataset",
    "read_class_names",
]
