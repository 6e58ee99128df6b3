from .benchmarks import BENCHMARKS, Benchmark
from .class_names import read_class_names
from .dataset import SegmentationDataset
from .errors import DataError
from .loading import load_segmentation_dataset
from .prepare import prepare_benchmark
from .publish import push_dataset
from .splits import check_disjoint, set_aside

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "DataError",
    "SegmentationDataset",
    "check_disjoint",
    "load_segmentation_dataset",
    "prepare_benchmark",
    "push_dataset",
    "read_class_names",
    "set_aside",
]
