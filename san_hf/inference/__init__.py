"""From images and class names to label maps: the one path that everything here uses."""

from san_hf.inference.predictor import EncodedImage, EncodedView, Predictor, PreparedImage
from san_hf.inference.segmentation import Segmentation
from san_hf.inference.segmenter import Segmenter
from san_hf.inference.vocabulary import Vocabulary, VocabularyError


__all__ = [
    "EncodedImage",
    "EncodedView",
    "Predictor",
    "PreparedImage",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "VocabularyError",
]
