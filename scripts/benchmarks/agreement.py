"""When two results count as the same."""

import torch


# Largest difference, relative to the largest value; and the share of labels that may differ.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 5e-2), "float16": (1e-2, 1e-2)}
# Share of labels that may be other than float32's, beyond those that the plain form has other in the same dtype: labels
# of random weights hang by less than half precision, and by far less than 8 bits.
HALF_MARGIN, INT8_MARGIN = 0.05, 0.1


def close(got: torch.Tensor, expected: torch.Tensor, dtype: str) -> bool:
    largest = expected.float().abs().max()
    return bool((got.float() - expected.float()).abs().max() <= TOLERANCES[dtype][0] * largest)


def same_labels(got: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor, dtype: str) -> bool:
    """
    Whether a label map, (H, W), is the plain form's, but for ties: scores that are equal within the tolerance.

    Args:
        labels, scores: the plain form's, (H, W) and (C, H, W).
    """
    lost = scores.amax(0) - scores.gather(0, got[None].to(labels))[0]
    return len(labels.unique()) > 1 and bool((lost <= TOLERANCES[dtype][0] * scores.max()).all())


def as_near(got: torch.Tensor, labels: torch.Tensor, exact: torch.Tensor, margin: float) -> bool:
    """
    Whether a label map is about as near to that of float32 as the plain form's in the same dtype is.

    Args:
        labels: the plain form's, (H, W).
        exact: the plain form's in float32, (H, W).
        margin: share of labels that may differ beyond.
    """
    ours, plains = (float((each.to(exact) != exact).float().mean()) for each in (got, labels))
    return len(exact.unique()) > 1 and ours <= plains + margin
