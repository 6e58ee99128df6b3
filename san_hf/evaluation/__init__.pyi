from .metrics import Results, SegmentationMetrics
from .report import Report, read_results, write_results

__all__ = ["Report", "Results", "SegmentationMetrics", "read_results", "write_results"]
