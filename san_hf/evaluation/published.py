"""SAN's published results, from the facts of its checkpoints (`model_cards/`), and what can be compared with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from san_hf.data.benchmarks import BENCHMARKS
from san_hf.vocabularies import load_vocabulary


PUBLISHED_MODELS = ("san-vit-b-16", "san-vit-large-14")
# Our name of a metric -> its name in `model_cards/`, and where it was published. The released logs average over the
# classes that occur in the ground truth, the paper's table over those that occur in it or in the predictions.
SOURCES = {
    "mIoU": ("mIoU", "log"),
    "mIoU_over_present_or_predicted": ("mIoU (paper)", "paper"),
    "fwIoU": ("fwIoU", "log"),
    "mACC": ("mACC", "log"),
    "pACC": ("pACC", "log"),
}


def published_results(model: str, dataset: str) -> dict[str, float]:
    """
    Published results of a model on a benchmark, in percent, by the names of `Results.metrics`; each is of the same
    definition as ours. Empty where nothing was.

    Args:
        model: one of `PUBLISHED_MODELS`.
        dataset: a name in `BENCHMARKS`, or any other.

    Raises:
        ValueError: no such model.
    """
    if model not in PUBLISHED_MODELS:
        raise ValueError(f"Nothing is published of {model!r}, only of {', '.join(PUBLISHED_MODELS)}.")
    if dataset not in BENCHMARKS:
        return {}
    from san_hf.cards import load_facts

    rows = {row["dataset"]: row for row in load_facts(model)["results"]}
    row = rows[BENCHMARKS[dataset].published_title]
    return {metric: row[name] for metric, (name, _) in SOURCES.items() if name in row}


def published_images(dataset: str, num_images: int) -> str | None:
    """
    How a benchmark's published results and these differ in their images, in a sentence; `None` if they don't, or if
    there is only one release of the set.

    Args:
        dataset: its name.
        num_images: how many were counted.
    """
    benchmark = BENCHMARKS.get(dataset)
    if benchmark is None or not benchmark.other_splits:
        return None
    # The released logs load 5,104 images of Pascal Context, for 59 and for 459 classes: those of the merged JSON file.
    (name, splits), *_ = benchmark.other_splits.items()
    published = f"the published results are of the {splits['validation']:,} images {name}"
    if benchmark.release_of("validation", num_images) == name:
        return f"Compared on the same images: {published}."
    return f"Compared on other images: {published}, these of {num_images:,}."


def reasons_not_comparable(
    dataset: str, split: str, num_images: int, class_names: Sequence[str], settings: Mapping[str, Any]
) -> list[str]:
    """
    Why a result can't be compared with published results, which are of all images of the validation split, at a single
    scale, with the names of the benchmark's own classes as given. Empty if it can.

    Args:
        dataset: its name.
        split: the part of it.
        num_images: how many were counted.
        class_names: of its labels.
        settings: how `evaluate` was called; what isn't in it was at its default.
    """
    if dataset not in BENCHMARKS:
        return [f"nothing is published for {dataset}, only for {', '.join(BENCHMARKS)}"]
    reasons = []
    benchmark = BENCHMARKS[dataset]
    if split not in ("validation", "val"):
        reasons.append(f"it is of the split {split}, published are results of validation")
    elif benchmark.release_of("validation", num_images) is None:
        reasons.append(f"it is of {num_images:,} images, the validation split has {benchmark.counts_of('validation')}")
    own_names = load_vocabulary(dataset)
    if len(class_names) != len(own_names):
        reasons.append(f"it has {len(class_names)} classes, {dataset} has {len(own_names)}")
    elif changed := [(name, own) for name, own in zip(class_names, own_names) if name != own]:
        (name, own), more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        reasons.append(f"its classes have other names: {name!r} for {own!r}{more}")
    if settings.get("augment"):
        reasons.append("it was made with test-time augmentation, published are results of a single scale")
    if settings.get("expand"):
        expand = settings["expand"]
        reasons.append(
            f"the vocabulary was expanded by {expand if isinstance(expand, str) else f'{len(expand)} names'}"
        )
    if settings.get("threshold"):
        reasons.append(f"pixels of a confidence below {settings['threshold']} counted as wrong")
    if settings.get("vocabulary"):
        reasons.append(f"its class names were those of the file {settings['vocabulary']}")
    if settings.get("synonyms"):
        reasons.append("synonyms were split, published are results with names as given")
    templates = settings.get("templates")
    if templates not in (None, "vild"):
        shown = templates if isinstance(templates, str) else f"{len(templates)} of the model's own"
        reasons.append(f"its prompt templates were {shown}, published are results with vild")
    return reasons
