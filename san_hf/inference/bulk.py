"""A worker for engines that spread the images of a job over processes and machines, such as Ray Data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from san_hf.hub.names import EMBEDDED_MODEL
from san_hf.images import ImageError
from san_hf.inference.segmenter import LoadedImage, Segmenter
from san_hf.inference.vocabulary import ClassNames
from san_hf.messages import one_line, printable
from san_hf.paths import list_images, paths_for
from san_hf.rasters import Raster


def list_jobs(folder: str | os.PathLike, output: str | os.PathLike) -> list[dict[str, str]]:
    """
    The images below a folder, each with a path that its results are named after.

    Args:
        folder: searched with all below it, but for `output`: see [`san_hf.paths.list_images`].
        output: folder of the results. They are where the images are in theirs; those that would have one name are
            numbered.

    Returns:
        For each image `{"image": path, "output": path without an ending}`: the rows of a job.

    Raises:
        OSError: the folder can't be read.
    """
    listing = list_images(folder, exclude=output)
    names = [path.relative_to(listing.folder) for path in listing.files]
    stems = paths_for([(*name.parts[:-1], name.stem) for name in names], Path(output))
    return [{"image": str(path), "output": str(stem)} for path, stem in zip(listing.files, stems)]


class SegmentationWorker:
    """
    Segments batches of image files, writes the results, and says for each what it wrote.

    An engine makes one in each of its processes, which loads the model and encodes the class names once. A batch that
    is given again, as after a worker was killed, is written again: files appear when they are complete, and an
    image's are the same every time.

    Args:
        model: name or folder, see [`Segmenter.from_pretrained`].
        class_names: see [`Segmenter`]. The file of a vocabulary ([`Vocabulary.save`]) spares each worker the text pass.
        formats: out of [`san_hf.inference.writers.FORMATS`].
        **options: of [`Segmenter.from_pretrained`], such as `device`, `dtype`, `expand`.

    Raises:
        ModelError, ValueError: as [`Segmenter.from_pretrained`].
    """

    def __init__(
        self,
        model: str | os.PathLike = EMBEDDED_MODEL,
        class_names: ClassNames | None = None,
        formats: Sequence[str] = ("png-labels",),
        **options: Any,
    ):
        self.model, self.formats = str(model), list(formats)
        self.segmenter = Segmenter.from_pretrained(
            model, class_names, confidence="confidence" in self.formats, **options
        )

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """
        Args:
            batch: columns `image` and `output`, as rows of [`list_jobs`] have them.

        Returns:
            The manifest's columns, in the same order: `image`; `files`, a list of what was written; `error`, in one
            line, empty where there was none. An image that can't be read doesn't end the job; a full disk does.

        Raises:
            OSError: a file can't be written.
            ValueError, RuntimeError: of the model, such as memory that doesn't suffice.
        """
        images = [str(image) for image in batch["image"]]
        errors: dict[str, str] = dict.fromkeys(images, "")
        loaded: dict[str, LoadedImage | Raster] = {}
        for image in images:
            try:
                loaded[image] = self.segmenter.load(image)
            except (ImageError, OSError) as error:
                errors[image] = one_line(error)
        whole = {image: one for image, one in loaded.items() if isinstance(one, LoadedImage)}
        segmentations = dict(zip(whole, self.segmenter(list(whole.values()), batch_size=max(len(whole), 1))))
        files: list[list[str]] = []
        for image, stem in zip(images, map(str, batch["output"])):
            facts, written = {"image": printable(image), "model": self.model}, []
            if image in segmentations:
                written = segmentations[image].save(stem, self.formats, **facts)
            elif image in loaded:  # too large for memory, and read while it is segmented
                try:
                    written = self.segmenter.segment_file(
                        loaded[image], stem, self.formats, progress=None, **facts
                    ).files
                except ImageError as error:
                    errors[image] = one_line(error)
            files.append([str(file) for file in written])
        return {"image": images, "files": files, "error": [errors[image] for image in images]}
