from .bulk import SegmentationWorker, list_jobs
from .frames import FrameSegmenter, segment_frames
from .large import SegmentedFile
from .predictor import EncodedImage, EncodedView, Predictor, PreparedImage
from .segmentation import Segmentation
from .segmenter import Segmenter
from .vocabulary import Vocabulary, VocabularyError

__all__ = [
    "EncodedImage",
    "EncodedView",
    "FrameSegmenter",
    "Predictor",
    "PreparedImage",
    "Segmentation",
    "SegmentationWorker",
    "SegmentedFile",
    "Segmenter",
    "Vocabulary",
    "VocabularyError",
    "list_jobs",
    "segment_frames",
]
