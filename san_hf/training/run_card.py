"""The card of a run's model: what it was trained on, how, and what was measured of it."""

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from san_hf.conversion import HUB_REPO, RELEASES
from san_hf.data import SegmentationDataset
from san_hf.evaluation.published import SOURCES
from san_hf.hub.reach import is_repository
from san_hf.messages import escape_markdown, join_some
from san_hf.modeling import SANConfig
from san_hf.paths import expand_path

from .config import TrainingConfig


CLASSES_LISTED = 200


def card_facts(
    config: TrainingConfig,
    model_config: SANConfig,
    title: str,
    step: int,
    data: SegmentationDataset,
    results: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Facts for the card of a trained model, see [`san_hf.cards.render_card`]. Places on this machine are not among them.

    Args:
        config: of the run.
        model_config: of the model.
        title: what to call the model.
        step: the number of steps taken.
        data: what it was trained on.
        results: as [`measured`] gives them, of these very weights; None if nothing was measured.
    """
    section, start = config.data, config.model.checkpoint or config.model.clip or ""
    base, relation = _base(config, model_config)
    training = (
        f"Started from {name_in_text(start)} and trained for {step} of {config.training.steps} steps of "
        f"{config.training.batch_size} images on {name_in_text(section.source)} ({escape_markdown(section.split)}), "
        f"{len(data.class_names)} classes, with AdamW at a learning rate of {config.optimizer.learning_rate:g}. "
        f"CLIP was {'frozen' if config.model.freeze_clip else 'trained, too'}. Crops of "
        f"{config.augmentation.crop_size} pixels, seed {config.seed}."
    )
    names = join_some((escape_markdown(name) for name in data.class_names), CLASSES_LISTED)
    facts: dict[str, Any] = {
        "title": title,
        "license": config.hub.license,
        "training": training,
        "data": f"The model carries the {len(data.class_names)} classes that it was trained on: {names}.",
        "base_model": base,
        "base_model_relation": relation,
        "datasets": [section.source] if is_on_the_hub(section.source) else None,
        "sample_classes": data.class_names[:3],
    }
    if results is not None and "mIoU" in results:
        facts["results"] = [results]
        limit = config.evaluation.limit
        facts["results_note"] = "In percent, of this run's own evaluation at the images' own size" + (
            f", limited to {limit} images." if limit else "."
        )
    return facts


def measured(
    config: TrainingConfig, validation: SegmentationDataset, metrics: dict[str, float], images: int
) -> dict[str, Any]:
    """
    An evaluation as a row of results, under the names that published results have.

    Args:
        config: of the run.
        validation: what was evaluated on.
        metrics: averages by name, in percent.
        images: how many images were counted.
    """
    section = config.data
    source = section.validation_source or section.source
    row: dict[str, Any] = {"dataset": f"{validation.name} {validation.split}", "images": images}
    row |= {title: round(metrics[name], 2) for name, (title, _) in SOURCES.items() if metrics[name] == metrics[name]}
    if is_on_the_hub(source):
        own = section.validation_source is None
        row |= {"dataset_id": source, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
        row |= {"config": section.config_name} if own and section.config_name else {}
        row |= {"revision": section.revision} if own and section.revision and len(section.revision) == 40 else {}
    return row


def is_on_the_hub(name: str) -> bool:
    """Whether a name stands for a repository rather than for a folder, which may be gone by now."""
    return is_repository(name) and not os.path.exists(expand_path(name))


def name_in_text(name: str) -> str:
    """A model's or data set's name, of a folder without where it is."""
    known = is_on_the_hub(name) or name in RELEASES
    return escape_markdown(name if known else Path(expand_path(name)).name or name)


def _base(config: TrainingConfig, model_config: SANConfig) -> tuple[str | None, str | None]:
    """The model on the Hub that this one is made from, and how; None if it is on no Hub."""
    start = config.model.checkpoint or config.model.clip or ""
    if config.checkpoints.adapter_only:
        base, relation = str(model_config.base_model_name_or_path), "adapter"
    else:
        base, relation = HUB_REPO if start in RELEASES else start, "finetune"
    return (base, relation) if is_on_the_hub(base) else (None, None)
