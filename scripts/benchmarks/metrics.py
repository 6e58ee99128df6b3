"""Time per image of our metric and of `evaluate`'s mean_iou, on random regions of 512 x 683 pixels and 171 classes.

    python scripts/benchmarks/metrics.py

`evaluate` downloads mean_iou's script, which isn't asked of anybody here: what it does is written down below in our own
words. It declares its inputs as images, so that the library writes each label map to a file, as a picture, and decodes
it for `compute`, which counts the labels of prediction, reference and what both agree on by three histograms.
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
    """Blocks of 32 pixels with noise, a border of unlabelled ones, and predictions that are right for 60 %."""
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
    """Per image, of the fastest of some runs: what else the machine does only adds. With the figures."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for prediction, reference in zip(predictions, references):
            metric.add_batch(predictions=[prediction], references=[reference])
        figures = metric.compute(**options)
        times.append(1000 * (time.perf_counter() - started) / len(predictions))
    return min(times), figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 683), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--labels", type=int, default=171, help="at most 255")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    maps = label_maps(arguments.images, *arguments.size, arguments.labels)
    theirs, reference = milliseconds(MeanIoU(), *maps, arguments.repeats, num_labels=arguments.labels)
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(f"mean_iou as evaluate does it   {theirs:8.2f} ms per image")
    for boundary in (False, True):
        metric = SegmentationMetric(arguments.labels, IGNORE_INDEX, boundary=boundary)
        ours, figures = milliseconds(metric, *maps, arguments.repeats)
        difference = abs(figures["mIoU_over_present_or_predicted"] / 100 - reference["mean_iou"])
        print(
            f"ours{', with boundaries' if boundary else '':<20}       {ours:8.2f} ms per image, "
            f"{theirs / ours:.1f} times as fast, mean IoU differs by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
