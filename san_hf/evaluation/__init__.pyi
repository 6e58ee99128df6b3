from .metrics import ConfusionMatrixMetrics, Results
from .report import Report, read_results, write_results

__all__ = ["Report", "Results", "ConfusionMatrixMetrics", "read_results", "write_results"]
