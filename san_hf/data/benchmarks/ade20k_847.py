"""ADE20K with 847 classes, the most frequent of over 3,000 objects."""

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from san_hf.data.errors import DataError
from san_hf.pickles import Name, read_pickle

from .base import Benchmark, Source, check_size


if TYPE_CHECKING:
    import numpy as np

ADE_INDEX_FILE = "index_ade20k.pkl"


def find_images(source: Path, split: str, expected: int) -> list[Source]:
    candidates = [source, source / "ADE20K_2021_17_01"]
    root = next((folder for folder in candidates if (folder / ADE_INDEX_FILE).is_file()), None)
    if root is None:
        raise DataError(f"There is no {ADE_INDEX_FILE} in '{source}', nor in a folder ADE20K_2021_17_01 there.")
    sources = []
    for folder, name in zip(*read_ade_index(root / ADE_INDEX_FILE)):
        parts = PurePosixPath(folder).parts
        # Of Windows, too, where it isn't told by POSIX's rules.
        foreign = ".." in parts or PurePosixPath(folder).is_absolute() or PurePosixPath(name).name != name
        if foreign or set("\\:\0") & set(folder + name):
            raise DataError(f"'{root / ADE_INDEX_FILE}' names '{folder}/{name}', which is not below the data set.")
        fields = name.split("_")
        if ("validation" if len(fields) > 1 and fields[1] == "val" else "train") != split:
            continue
        # Folders are given from above the data set's.
        image = root.joinpath(*parts[1:], name)
        sources.append(Source(name, image, image.with_name(f"{image.stem}_seg.png")))
    return sorted(sources, key=lambda item: item.name)


def read_ids(labels: Path, size: tuple[int, int]) -> "np.ndarray":
    """Ids of the objects, which are in red and green."""
    import numpy as np
    from PIL import Image

    from san_hf.images import pixel_limit

    with pixel_limit(), Image.open(labels) as image:
        check_size(image, size)
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"got a {image.mode} image, expected RGB, with the ids in red and green")
        pixels = np.asarray(image, dtype=np.int32)
    return pixels[..., 0] // 10 * 256 + pixels[..., 1]


# NumPy's arrays are passed over; an index has no use for anything else.
_ARRAYS = {
    Name(module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )
}


def read_ade_index(file: Path) -> tuple[list[str], list[str]]:
    """
    The folder and the file name of every image of ADE20K. Nothing that the pickle holds is executed.

    Raises:
        DataError: it can't be read, holds anything but data, or has no such lists.
    """
    try:
        with open(file, "rb") as stream:
            contents = read_pickle(stream)
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' can't be read as ADE20K's index: {error}. Get it from ADE20K's owners.") from error
    if foreign := sorted(contents.names - _ARRAYS):
        raise DataError(
            f"'{file}' can't be read as ADE20K's index: it asks for {foreign[0]}, which such an index has no use for. "
            "Get it from ADE20K's owners."
        )
    index = contents.value
    lists: dict[str, list[str]] = {}
    for key in ("folder", "filename"):
        names = index.get(key) if isinstance(index, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"'{file}' has no list of texts {key!r}: expected ADE20K's index.")
        lists[key] = names
    folders, file_names = lists["folder"], lists["filename"]
    if len(folders) != len(file_names):
        raise DataError(f"'{file}' has {len(folders)} folders for {len(file_names)} file names, expected as many.")
    return folders, file_names


ADE20K_847 = Benchmark(
    name="ade20k-847",
    title="ADE20K-847",
    published_title="ADE20K-847",
    splits={"train": 25_574, "validation": 2_000},
    ignore_index=65535,
    source="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
    license="other",
    terms="See the owner's page, which asks for registration: for research and education, not for commerce.",
    original_names={"validation": "ade20k_full_sem_seg_val"},
    find_images=find_images,
    read_ids=read_ids,
    num_ids=26 * 256,
    ignore_other_ids=True,
    shorter_side=512,
    upright=False,
)
