"""Metrics of semantic segmentation from counts of pixels: only a confusion matrix is kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from san_hf.modeling.image_input_san import check_ignore_index


# A boundary is this share of the image's diagonal wide (Cheng et al., "Boundary IoU", CVPR 2021).
BOUNDARY_WIDTH = 0.02
METRICS = ("mIoU", "mIoU_over_present_or_predicted", "fwIoU", "mACC", "pACC")
BOUNDARY_METRICS = ("BoundaryIoU", "min(IoU, B-Iou)")


@dataclass(frozen=True)
class Results:
    """
    Metrics in percent; nan where there is nothing to average or divide by.

    Attributes:
        num_images: how many images were counted.
        metrics: averages by name.
            "mIoU": intersection over union, averaged over the classes that occur in the ground truth. SAN's released
            logs use this one.
            "mIoU_over_present_or_predicted": the same sum divided by the number of classes that occur in the ground
            truth or in the predictions; a class that is only predicted counts as 0. The paper's table uses this one.
            "fwIoU": intersection over union, weighted by the classes' share of the ground truth.
            "mACC": pixel accuracy of each class, averaged over the classes that occur in the ground truth.
            "pACC": share of the labelled pixels that got their label.
        per_class: a row for each class, in the order of the labels: "index", "name", "IoU" and "ACC" (nan for classes
            that aren't in the ground truth), "ground_truth" and "predicted" (pixels, of the labelled ones), and where
            boundaries were asked for "BoundaryIoU" and "min(IoU, B-Iou)".
    """

    num_images: int
    metrics: dict[str, float]
    per_class: list[dict[str, Any]]

    def to_dict(self) -> dict[str, float]:
        """All metrics in one flat dict, named as in the original's logs: "mIoU", ..., "IoU-cat", "ACC-cat", ...

        Of classes with the same name the first alone gets it; the others are called "name (index)".
        """
        flat, seen = dict(self.metrics), set()
        for row in self.per_class:
            name = row["name"] if row["name"] not in seen else f"{row['name']} ({row['index']})"
            seen.add(row["name"])
            flat |= {f"{key}-{name}": row[key] for key in ("IoU", "ACC", *BOUNDARY_METRICS) if key in row}
        return flat


class ConfusionMatrixMetrics:
    """
    Counts how often each label was predicted where, image by image, and computes the metrics from the counts.

    Memory doesn't depend on the number of images: `confusion_matrix` is (num_labels, num_labels + 1) int64, ground
    truth x prediction, the last column for predictions that are none of the labels. Pixels of `ignore_index` count
    nowhere, whatever was predicted there. Sums of integers are exact, so neither the order of the images nor how they
    are spread over processes changes a metric.

    Args:
        num_labels: number of classes C; labels are 0..C-1.
        ignore_index: the value of unlabelled pixels, e.g. 255, 65535 or -100; none of the labels.
        boundary: whether to count boundaries, too, by the original evaluation's rule: on the map of integers, not class
            by class. A map's boundary is the map minus its erosion (the least value in a square of 2 d + 1 pixels,
            d = max(1, round(0.02 * the diagonal)), with zeros outside the image), with unlabelled pixels as label C;
            what is compared are these differences. So a pixel deep inside any region counts for class 0, and a class
            that occurs nowhere may get a value. The original's results can't be compared with these: it counts in 8
            bits, which overflow beyond 15 classes, so that nearly all boundary results in its logs are 0; and it has no
            boundaries for more than 254 classes.
        device: where the counts are kept and the maps are compared.
        ignore_index_is_class: whether `ignore_index` is meant to be one of the labels, whose pixels then don't count.

    Raises:
        ValueError: no labels, or an `ignore_index` that is a label, which is not said to be meant.
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int,
        boundary: bool = False,
        device: str | torch.device = "cpu",
        ignore_index_is_class: bool = False,
    ) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        if not ignore_index_is_class:
            check_ignore_index(ignore_index, num_labels, "ignore_index")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.boundary = boundary
        counts = {"num_images": (), "confusion_matrix": (num_labels, num_labels + 1)}
        if boundary:
            # Here unlabelled is a value like others: its differences to its neighbours may be those of a label.
            counts["boundary_matrix"] = (num_labels + 1, num_labels + 1)
        self.counts = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in counts.items()}

    @property
    def num_images(self) -> int:
        return int(self.counts["num_images"])

    @property
    def confusion_matrix(self) -> torch.Tensor:
        return self.counts["confusion_matrix"]

    @property
    def device(self) -> torch.device:
        return self.confusion_matrix.device

    def update(self, prediction: torch.Tensor | np.ndarray, label_map: torch.Tensor | np.ndarray) -> None:
        """
        Counts one image.

        Args:
            prediction: (H, W) or (H, W, 1) integers from 0; C and above stand for "none of these labels": always wrong
                where there is a label, and no prediction of any class.
            label_map: (H, W) or (H, W, 1) integers, 0..C-1 or `ignore_index`.

        Raises:
            ValueError: maps of different or wrong shapes, no integers, or a value that can't be; nothing is counted.
        """
        prediction = self._label_map(prediction, "The prediction")
        label_map = self._label_map(label_map, "The label map")
        if prediction.shape != label_map.shape:
            raise ValueError(
                f"The prediction is {tuple(prediction.shape)}, the label map {tuple(label_map.shape)} (height, width): "
                "they must be of the same size. post_process_semantic_segmentation takes it as target_sizes."
            )
        ignored = label_map == self.ignore_index
        if prediction.amin() < 0:
            _fail("The prediction", prediction, prediction < 0, "0 or more")
        wrong = ((label_map < 0) | (label_map >= self.num_labels)) & ~ignored
        if wrong.any():
            expected = f"0..{self.num_labels - 1} or {self.ignore_index} for unlabelled"
            _fail("The label map", label_map, wrong, expected)
        # To both, what is no label is label C.
        prediction = prediction.clamp(max=self.num_labels)
        label_map = label_map.masked_fill(ignored, self.num_labels)
        self.counts["num_images"] += 1
        self.counts["confusion_matrix"] += self._count(label_map, prediction)[:-1]
        if self.boundary:
            self.counts["boundary_matrix"] += self._count(boundary_map(label_map), boundary_map(prediction))

    def _label_map(self, values: torch.Tensor | np.ndarray, what: str) -> torch.Tensor:
        if not isinstance(values, torch.Tensor):
            values = np.asarray(values)
            if values.dtype.kind not in "iu":
                raise ValueError(f"{what} must hold integers, got {values.dtype}.")
            # Torch takes this machine's byte order only, and can do little with unsigned integers beyond 8 bits.
            values = values.astype(np.int64 if values.dtype.kind == "u" else values.dtype.newbyteorder("="), copy=False)
            values = torch.from_numpy(values)
        if values.dim() == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.dim() != 2 or not values.numel():
            raise ValueError(f"{what} must be of shape (height, width), got {tuple(values.shape)}.")
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise ValueError(f"{what} must hold integers, got {values.dtype}.")
        # Half the memory of int64, and all that is computed from them fits; what doesn't fit stays as large as it can.
        if values.dtype == torch.int64:
            values = values.clamp(-(2**31), 2**31 - 1)
        return values.to(self.device, torch.int32)

    def _count(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Counts of each pair of values 0..C, (C + 1, C + 1)."""
        size = self.num_labels + 1
        return torch.bincount((rows * size + columns).flatten(), minlength=size * size).view(size, size)

    def new(self) -> "ConfusionMatrixMetrics":
        """Counts of the same settings that begin at zero."""
        # Whether an ignore index is meant was settled when this one was made.
        return ConfusionMatrixMetrics(self.num_labels, self.ignore_index, self.boundary, self.device, True)

    def merge(self, other: "ConfusionMatrixMetrics") -> None:
        """Adds what another one counted.

        Raises:
            ValueError: it counted something else: other labels, or boundaries where this one has none.
        """
        self._check_settings(other.state_dict())
        for name, count in self.counts.items():
            count += other.counts[name].to(self.device)

    def reduce(self, accelerator: Accelerator) -> None:
        """
        Adds up the counts of all processes, in each of them.

        Every process calls it, once, after its last image: they all have the total then, which isn't to be added up
        again. To go on counting, reduce a copy.
        """
        self.counts = {
            name: accelerator.reduce(count.to(accelerator.device), reduction="sum").to(self.device)
            for name, count in self.counts.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """State for [`load_state_dict`]: settings and a copy of the counts, for `torch.save`."""
        return self._settings() | {name: count.clone() for name, count in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; what was counted here before is forgotten.

        Raises:
            ValueError: a state of other settings.
        """
        self._check_settings(state)
        for name, count in self.counts.items():
            count.copy_(state[name])

    def _settings(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels, "ignore_index": self.ignore_index, "boundary": self.boundary}

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(f"These counts are of {name}={state.get(name)}, but {name}={value} is counted here.")

    def compute(self, class_names: Sequence[str] | None = None) -> Results:
        """
        The metrics of what was counted so far.

        Args:
            class_names: one for each label; "0", "1", ... by default.

        Raises:
            ValueError: more or fewer names than labels.
        """
        class_names = [str(label) for label in range(self.num_labels)] if class_names is None else class_names
        if len(class_names) != self.num_labels:
            raise ValueError(f"Got {len(class_names)} class names for {self.num_labels} labels.")
        matrix = self.confusion_matrix.cpu().numpy()
        correct, true, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)[:-1]
        present = true > 0
        iou = np.where(present, _percent(correct, true + predicted - correct), np.nan)
        accuracy = _percent(correct, true)
        columns = {"IoU": iou, "ACC": accuracy, "ground_truth": true, "predicted": predicted}
        if self.boundary:
            boundary = self.counts["boundary_matrix"].cpu().numpy()[:-1, :-1]
            correct_boundary = boundary.diagonal()
            boundary_iou = _percent(correct_boundary, boundary.sum(axis=0) + boundary.sum(axis=1) - correct_boundary)
            columns |= {"BoundaryIoU": boundary_iou, "min(IoU, B-Iou)": np.minimum(iou, boundary_iou)}

        metrics = dict.fromkeys(METRICS, np.nan)
        if present.any():
            metrics = {
                "mIoU": iou[present].mean(),
                "mIoU_over_present_or_predicted": iou[present].sum() / (present | (predicted > 0)).sum(),
                "fwIoU": (iou * true)[present].sum() / true.sum(),
                "mACC": accuracy[present].mean(),
                "pACC": 100 * correct.sum() / true.sum(),
            }
        rows = zip(*(column.tolist() for column in columns.values()))
        return Results(
            num_images=self.num_images,
            metrics={name: float(value) for name, value in metrics.items()},
            per_class=[
                {"index": index, "name": name} | dict(zip(columns, row))
                for index, (name, row) in enumerate(zip(class_names, rows))
            ],
        )


def _fail(what: str, values: torch.Tensor, wrong: torch.Tensor, expected: str) -> NoReturn:
    found = values[wrong].unique().tolist()
    listed = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
    raise ValueError(f"{what} has {listed} at {int(wrong.sum())} pixels, expected {expected}.")


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """100 part / whole, nan where the whole is 0."""
    return 100 * np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def boundary_map(label_map: torch.Tensor) -> torch.Tensor:
    """
    Difference of each value to the least one nearby; see `ConfusionMatrixMetrics` for what "nearby" is.

    Args:
        label_map: (H, W) integers from 0.

    Returns:
        (H, W) integers from 0, 0 deep inside of regions.
    """
    distance = max(1, round(BOUNDARY_WIDTH * math.hypot(*label_map.shape)))
    window = 2 * distance + 1
    least = F.pad(label_map, (distance,) * 4)
    for dim in (0, 1):
        # The minimum of 1, 2, 4, ... neighbours, each from two of the one before, until the window is covered.
        covered = 1
        while covered < window:
            step = min(covered, window - covered)
            length = least.shape[dim] - step
            least = torch.minimum(least.narrow(dim, 0, length), least.narrow(dim, step, length))
            covered += step
    return label_map - least
