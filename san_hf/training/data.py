"""The data that a training reads, and those that it is evaluated on."""

from typing import Any

from san_hf.data import SegmentationDataset, check_disjoint, load_segmentation_dataset, set_aside

from .config import DataSection


def load_training_data(section: DataSection, seed: int) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """
    Opens the data of a training, which share no image with those for evaluation.

    Args:
        section: which data.
        seed: of the choice, where a share is set aside.

    Returns:
        The data to train on, and those to evaluate on, if any.

    Raises:
        DataError: data that can't be opened, or shared images that aren't allowed.
    """
    options: dict[str, Any] = {
        "image_column": section.image_column,
        "label_column": section.label_column,
        "class_names": section.class_names,
        "ignore_index": section.ignore_index,
        "label_shift": section.label_shift,
        "label_palette": section.label_palette,
        "streaming": section.streaming,
    }
    version: dict[str, Any] = {"config_name": section.config_name, "revision": section.revision}
    data = load_segmentation_dataset(section.source, section.split, **options, **version)
    if section.validation_split is None:
        return data, None
    if isinstance(section.validation_split, float):
        return set_aside(data, section.validation_split, seed)
    source = section.validation_source or section.source
    options |= version if section.validation_source is None else {}
    validation = load_segmentation_dataset(source, section.validation_split, **options)
    check_disjoint(data, validation, allow=section.shared_images == "warn")
    return data, validation
