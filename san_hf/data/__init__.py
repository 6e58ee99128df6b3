"""Data to train and measure on."""

from .loading import DataError, SegmentationDataset, load_segmentation_dataset, read_class_names


__all__ = ["DataError", "SegmentationDataset", "load_segmentation_dataset", "read_class_names"]
