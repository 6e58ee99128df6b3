from .evaluator import Evaluation, EvaluationError, EvaluationOptions, evaluate
from .metrics import ConfusionMatrixMetrics, Results
from .pictures import draw_examples, draw_kept
from .report import Report, read_results, write_results

__all__ = [
    "ConfusionMatrixMetrics",
    "Evaluation",
    "EvaluationError",
    "EvaluationOptions",
    "Report",
    "Results",
    "draw_examples",
    "draw_kept",
    "evaluate",
    "read_results",
    "write_results",
]
