"""Metrics on test pages of the picture book: mIoU on base compositions, on novel ones and on stuff.

Base and novel compositions are mixed on the pages, and all class names compete at every pixel.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.inference import Predictor
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.picture_book.objects import BASE, CLASS_NAMES, NOVEL, STUFF
from san_hf.picture_book.scenes import draw_scene


TEST_SEED = 20230612  # never used for training; draw_scene([TEST_SEED, i]) is page i of the test set
VALIDATION_SEED = 20231109  # likewise; models are chosen on these pages, so that the test pages stay unseen

_UNLABELLED = 255  # occurs on no page: every pixel has a label


def measure(
    model: SANForSemanticSegmentation, processor: SANProcessor, pages: int, seed: int = TEST_SEED
) -> dict[str, float]:
    """
    Metrics of a model on test pages; it looks for all class names of the picture book.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        pages: number of pages.
        seed: of the pages; `VALIDATION_SEED` for those of the validation set.

    Returns:
        See [`measure_label_maps`].
    """
    predictor = Predictor(model, processor)
    vocabulary = predictor.vocabulary(CLASS_NAMES)
    return measure_label_maps(lambda image: predictor([image], vocabulary)[0], pages, seed)


def measure_label_maps(
    predict: Callable[[Image.Image], np.ndarray | torch.Tensor], pages: int, seed: int = TEST_SEED
) -> dict[str, float]:
    """
    Metrics of any predictor on test pages.

    Args:
        predict: takes an RGB image and returns its label map: (H, W) integers, indices into `CLASS_NAMES`.
        pages, seed: see [`measure`].

    Returns:
        `base_miou`, `novel_miou` and `stuff_miou`: IoU averaged over the classes of that kind that occur on the pages,
        nan if none does; and `pixel_accuracy`. All in percent.
    """
    metrics = ConfusionMatrixMetrics(len(CLASS_NAMES), _UNLABELLED)
    for page in range(pages):
        scene = draw_scene([seed, page])
        metrics.update(predict(scene.image), scene.label_map)
    results = metrics.compute(CLASS_NAMES)
    iou = {row["name"]: row["IoU"] for row in results.per_class}

    def mean(names: Sequence[str]) -> float:
        occurring = [iou[name] for name in names if not math.isnan(iou[name])]
        return float(np.mean(occurring)) if occurring else math.nan

    return {
        "base_miou": mean(BASE),
        "novel_miou": mean(NOVEL),
        "stuff_miou": mean(STUFF),
        "pixel_accuracy": results.metrics["pACC"],
    }
