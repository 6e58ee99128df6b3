"""The metrics of [`ConfusionMatrixMetrics`] as a metric of the `evaluate` library.

    metric = SegmentationMetric(num_labels=171, ignore_index=255)
    metric.add_batch(predictions=label_maps, references=true_label_maps)
    metric.compute()["mIoU"]

`evaluate.load("san_hf/evaluation/segmentation_metric.py", num_labels=171)` gives the same; nothing is downloaded.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

from san_hf.evaluation.metrics import ConfusionMatrixMetrics


DESCRIPTION = """
Intersection over union and pixel accuracy of semantic segmentation, in percent. mIoU is an average over the classes
that occur in the ground truth; mIoU_over_present_or_predicted divides the same sum by the number of classes that occur
in the ground truth or the predictions.
"""

INPUTS_DESCRIPTION = """
Args:
    predictions: label maps, each (H, W) integers from 0; what is none of the labels counts as wrong.
    references: the true label maps, each (H, W) integers: labels, or `ignore_index` where there is none.

Returns:
    `dict[str, float]`: mIoU, mIoU_over_present_or_predicted, fwIoU, mACC, pACC, and for each class "IoU-name" and
    "ACC-name", in percent; nan for classes that aren't in the ground truth.
"""


class SegmentationMetric(evaluate.Metric):
    """
    Counts pixels as they come: where `evaluate` keeps all label maps in a file until `compute`, this keeps
    a confusion matrix, and writes nothing.

    Args:
        num_labels, ignore_index, boundary, device, ignore_index_is_class: see [`ConfusionMatrixMetrics`].
        class_names: one for each label; "0", "1", ... by default.
        **kwargs: of `evaluate.Metric`.

    Attributes:
        counts: the [`ConfusionMatrixMetrics`]; in a run of several processes, `counts.reduce(accelerator)` before
            `compute` adds up what all of them counted.

    Raises:
        ValueError: settings that can't be, or `num_process`: the library shares label maps by files.
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int = 255,
        class_names: Sequence[str] | None = None,
        boundary: bool = False,
        device: str | torch.device = "cpu",
        ignore_index_is_class: bool = False,
        **kwargs,
    ) -> None:
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                "This metric doesn't share files between processes: leave num_process out, and call "
                "metric.counts.reduce(accelerator) in every process before compute."
            )
        if class_names is not None and len(class_names) != num_labels:
            raise ValueError(f"Got {len(class_names)} class names for {num_labels} labels.")
        self.class_names = class_names
        self.counts = ConfusionMatrixMetrics(num_labels, ignore_index, boundary, device, ignore_index_is_class)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def _build_data_dir(self) -> None:
        # The library makes a folder for label maps here.
        return None

    def download_and_prepare(self, download_config=None, dl_manager=None) -> None:
        """Nothing is downloaded."""

    def __len__(self) -> int:
        return self.counts.num_images

    # The library copies these three functions, without what `super()` would need.

    def add(self, *, prediction: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor) -> None:
        """Counts one image.

        Raises:
            ValueError: label maps that can't be; it isn't counted.
        """
        self.counts.update(prediction, reference)

    def add_batch(
        self,
        *,
        predictions: Sequence[np.ndarray | torch.Tensor],
        references: Sequence[np.ndarray | torch.Tensor],
    ) -> None:
        """Counts images, which may be of different sizes.

        Raises:
            ValueError: more or fewer predictions than references, or label maps that can't be, with their index in
                the batch; then none of the batch is counted.
        """
        if len(predictions) != len(references):
            raise ValueError(f"Got {len(predictions)} predictions for {len(references)} references.")
        counts = self.counts
        batch = counts.new()
        for index, (prediction, reference) in enumerate(zip(predictions, references)):
            try:
                batch.update(prediction, reference)
            except ValueError as error:
                raise ValueError(f"Image {index} of the batch: {error}") from error
        counts.merge(batch)

    def compute(
        self,
        *,
        predictions: Sequence[np.ndarray | torch.Tensor] | None = None,
        references: Sequence[np.ndarray | torch.Tensor] | None = None,
    ) -> dict[str, float]:
        """The metrics of all that was added, and of these, if any; then counting starts from zero.

        Raises:
            ValueError: nothing was added.
        """
        if predictions is not None or references is not None:
            self.add_batch(
                predictions=() if predictions is None else predictions,
                references=() if references is None else references,
            )
        if not self.counts.num_images:
            raise ValueError("There is nothing to compute from: call add or add_batch before, or pass label maps.")
        metrics = self.counts.compute(self.class_names).to_dict()
        for count in self.counts.counts.values():
            count.zero_()
        return metrics
