"""Evaluation: the figures, how they are reported, and the published ones beside them."""

from san_hf.evaluation.metrics import Results, SegmentationMetrics


__all__ = ["Results", "SegmentationMetrics"]
