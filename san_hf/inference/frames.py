"""Frames of a video in, segmentations out, whose class scores may be carried from frame to frame."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import numpy as np
from PIL import Image

from san_hf.ahead import run_ahead
from san_hf.inference.predictor import EncodedImage
from san_hf.inference.segmentation import Segmentation
from san_hf.inference.segmenter import AnyImage, LoadedImage, Segmenter, as_segmentation, label_dtype


# Frames before the present one whose scores count, and the least weight that is worth its cost: with smooth=0.5, 4.
CARRIED_FRAMES, LEAST_WEIGHT = 8, 0.05
# Two frames that differ by more, of 0..255, on average over this thumbnail, belong to different scenes. The same scene
# with a moving camera stays far below, and noise is averaged out.
CUT_DIFFERENCE, THUMBNAIL = 25.5, (32, 32)


class FrameSegmenter:
    """
    Segments frames one after the other. A class's score at a pixel is the average over this frame and those before it
    in the same scene, with weights that fall by the factor `smooth` from frame to frame (up to `CARRIED_FRAMES` of
    them, and none below `LEAST_WEIGHT`); the label is chosen only then. What each frame's labels gain in calm, moving
    things pay by a trail of about as many frames.

    SAN's score is a sum over queries, so the average is one over the queries of all those frames: earlier ones are
    further views of this one, as in test-time augmentation, and no map of scores is held.

    Args:
        segmenter: with its vocabulary, which may change at any time, as masks and their embeddings are carried rather
            than labels.
        smooth: 0..1. With 0 each frame is segmented by itself.

    Raises:
        ValueError: `smooth` is out of its range, or more than 0 for a segmenter with windows.
    """

    def __init__(self, segmenter: Segmenter, smooth: float = 0.0):
        if not 0 <= smooth <= 1:
            raise ValueError(f"Got smooth={smooth}, expected 0..1.")
        if smooth and segmenter.windows is not None:
            raise ValueError("smooth and tile don't go together: leave one out.")
        self.segmenter, self.smooth = segmenter, smooth
        weights = [smooth**age for age in range(1, CARRIED_FRAMES + 1)]
        self.carried_frames = sum(weight >= LEAST_WEIGHT for weight in weights)
        self._recent: deque[EncodedImage] = deque(maxlen=self.carried_frames + 1)
        self._thumbnail: np.ndarray | None = None

    def __call__(self, frame: AnyImage) -> Segmentation:
        """
        The segmentation of the next frame.

        Args:
            frame: an image in any form, or what [`Segmenter.load`] made of one.

        Raises:
            ImageError: it can't be read.
        """
        segmenter = self.segmenter
        if segmenter.windows is not None:
            return segmenter(frame)
        loaded = self._take_in(frame)
        views = tuple(
            replace(view, weight=self.smooth**age) for age, image in enumerate(self._recent) for view in image.views
        )
        (pixels,) = segmenter.predictor.classify_pixels(
            [replace(self._recent[0], views=views)],
            segmenter.vocabulary,
            return_confidence=segmenter.confidence,
            dtype=label_dtype(segmenter.vocabulary),
        )
        return as_segmentation(
            loaded.image,
            pixels,
            segmenter.vocabulary,
            segmenter.colors,
            valid=loaded.valid,
            georeference=loaded.georeference,
        )

    def pass_over(self, frame: AnyImage) -> None:
        """Takes a frame in that needs no segmentation of its own, such as the last `carried_frames` before those that
        are wanted."""
        self._take_in(frame)

    def _take_in(self, frame: AnyImage) -> LoadedImage:
        """Encodes a frame, which then is the newest of the recent ones."""
        # Only for windows anything else is made of an image.
        loaded = cast(LoadedImage, self.segmenter.load(frame))
        if self.smooth and self._begins_scene(loaded.image):
            self._recent.clear()
        self._recent.extendleft(self.segmenter.predictor.encode([loaded.prepared or loaded.image]))
        return loaded

    def _begins_scene(self, image: Image.Image) -> bool:
        """Whether a frame is of another scene or size than the one before."""
        thumbnail = np.asarray(image.resize(THUMBNAIL, Image.Resampling.BOX), dtype=np.float32)
        before, self._thumbnail = self._thumbnail, thumbnail
        if before is None or self._recent[0].target_size != (image.height, image.width):
            return True
        return bool(np.abs(thumbnail - before).mean() > CUT_DIFFERENCE)


def segment_frames(segmenter: Segmenter, frames: Iterable[AnyImage], smooth: float = 0.0) -> Iterator[Segmentation]:
    """
    Segments the frames of a video, in constant memory: while the model is at work on one, the next is made ready.

    Args:
        segmenter: see [`FrameSegmenter`].
        frames: in order, images in any form. [`san_hf.video.open_frames`] reads them.
        smooth: how much of the class scores is carried from frame to frame against flicker, 0..1: see
            [`FrameSegmenter`].

    Yields:
        The segmentation of each frame.

    Raises:
        ValueError: see [`FrameSegmenter`].
        ImageError: a frame can't be read.
    """
    segment = FrameSegmenter(segmenter, smooth)
    for _, loaded in run_ahead(segmenter.load, frames, 1):
        yield segment(loaded.result())
