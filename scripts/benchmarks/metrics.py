"""Time per image of our metric and of `evaluate`'s mean_iou, on random regions of 512 x 683 pixels and 171 classes.

    python scripts/benchmarks/metrics.py

`evaluate.load("mean_iou")` downloads a script. To need no network, the class below does the same. The script declares
its inputs as images, so the library writes each label map to an image file, and decodes it in `compute`. `compute` then
makes three histograms of labels: of the prediction, of the reference, and of the pixels where both agree.
"""

import argparse
import os
import time

import datasets
import evaluate
import numpy as np
import torch

from san_hf.evaluation.segmentation_metric import SegmentationMetric


IGNORE_INDEX = 255


class MeanIoU(evaluate.Metric):
    """Stands in for `evaluate.load("mean_iou")`: the same inputs, the same steps."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, num_labels):
        common, either, total = np.zeros((3, num_labels))
        for prediction, reference in zip(predictions, references):
            prediction, reference = np.array(prediction), np.array(reference)
            labelled = reference != IGNORE_INDEX
            prediction, reference = prediction[labelled], reference[labelled]
            right, predicted, true = (
                np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
                for values in (prediction[prediction == reference], prediction, reference)
            )
            common += right
            either += predicted + true - right
            total += true
        with np.errstate(invalid="ignore"):
            return {"mean_iou": np.nanmean(common / either), "mean_accuracy": np.nanmean(common / total)}


def label_maps(count: int, height: int, width: int, num_labels: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """
    Random label maps: blocks of 32 x 32 pixels, the first 16 rows unlabelled. Predictions are right for 60 % of them.

    Returns:
        `count` predictions and as many references, each (height, width) uint8.
    """
    rng = np.random.default_rng(0)
    references, predictions = [], []
    for _ in range(count):
        blocks = rng.integers(0, num_labels, (height // 32 + 1, width // 32 + 1), dtype=np.uint8)
        reference = blocks.repeat(32, axis=0).repeat(32, axis=1)[:height, :width]
        wrong = rng.random(reference.shape) < 0.4
        prediction = np.where(wrong, rng.integers(0, num_labels, reference.shape, dtype=np.uint8), reference)
        reference[:16] = IGNORE_INDEX
        references.append(reference)
        predictions.append(prediction)
    return predictions, references


def milliseconds(
    metric: evaluate.Metric, predictions: list, references: list, repeats: int, **options
) -> tuple[float, dict]:
    """Time per image in the fastest run, as other work on the machine only adds to it; and the metrics."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for prediction, reference in zip(predictions, references):
            metric.add_batch(predictions=[prediction], references=[reference])
        results = metric.compute(**options)
        times.append(1000 * (time.perf_counter() - started) / len(predictions))
    return min(times), results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 683), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--labels", type=int, default=171, help="at most 255")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    height, width = arguments.size
    maps = label_maps(arguments.images, height, width, arguments.labels)
    time_of_evaluate, reference = milliseconds(MeanIoU(), *maps, arguments.repeats, num_labels=arguments.labels)
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(f"mean_iou as evaluate does it   {time_of_evaluate:8.2f} ms per image")
    for boundary in (False, True):
        metric = SegmentationMetric(arguments.labels, IGNORE_INDEX, boundary=boundary)
        ours, results = milliseconds(metric, *maps, arguments.repeats)
        difference = abs(results["mIoU_over_present_or_predicted"] / 100 - reference["mean_iou"])
        print(
            f"ours{', with boundaries' if boundary else '':<20}       {ours:8.2f} ms per image, "
            f"{time_of_evaluate / ours:.1f} times as fast, mean IoU differs by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
