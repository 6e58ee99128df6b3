"""The benchmarks SAN is trained and measured on, by name. Sizes and licences are as their owners state them."""

from .ade20k_150 import ADE20K_150
from .ade20k_847 import ADE20K_847
from .base import Benchmark
from .coco_stuff import COCO_STUFF
from .pascal_context_59 import PASCAL_CONTEXT_59
from .pascal_context_459 import PASCAL_CONTEXT_459
from .voc import VOC


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        COCO_STUFF,
        VOC,
        PASCAL_CONTEXT_59,
        PASCAL_CONTEXT_459,
        ADE20K_150,
        ADE20K_847,
    )
}
