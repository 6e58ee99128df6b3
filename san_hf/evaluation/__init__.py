"""Evaluation: the figures, how they are reported, and the published ones beside them."""

from san_hf.evaluation.metrics import Results, SegmentationMetrics
from san_hf.evaluation.report import Report, read_results, write_results


__all__ = ["Report", "Results", "SegmentationMetrics", "read_results", "write_results"]
