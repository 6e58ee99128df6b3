"""Class names of benchmarks, in the order of the labels.

Those of the benchmarks that SAN is evaluated on are as the original evaluates them; Cityscapes' are its evaluated
classes in the order of their train ids (cityscapesscripts/helpers/labels.py).
"""

import json
from importlib import resources


# A file each; of COCO-Stuff's 171 classes, "coco-stuff-only" are the 91 that are stuff (grass, sky) rather than things
# (cat, car).
_FILES = [file.name for file in resources.files(__package__).iterdir() if file.name.endswith(".json")]
VOCABULARIES = tuple(sorted([*(name.removesuffix(".json") for name in _FILES), "coco-stuff-only"]))
# What a caller's classes can be expanded by, for pixels that are none of them.
EXPANSIONS = {"coco": "coco-stuff", "coco-stuff": "coco-stuff-only"}


def load_vocabulary(name: str) -> list[str]:
    """
    The class names of a benchmark; label i is the i-th.

    Raises:
        ValueError: `name` is none of `VOCABULARIES`.
    """
    return [entry["name"] for entry in _load_classes(name)]


def load_class_ids(name: str) -> list[int]:
    """
    Ids of a benchmark's classes in its owners' annotations; label i is the i-th:
    for COCO-Stuff the category id (its pixel maps hold the id - 1), for ADE20K-847 the object id, for Pascal
    Context-59 the id among the 459 classes, for Cityscapes the label id; otherwise they are 1, 2, 3, ...

    Raises:
        ValueError: `name` is none of `VOCABULARIES`.
    """
    return [entry["id"] for entry in _load_classes(name)]


def _load_classes(name: str) -> list[dict]:
    if name not in VOCABULARIES:
        raise ValueError(f"There is no vocabulary {name!r}, expected one of {', '.join(VOCABULARIES)}.")
    file = resources.files(__package__) / f"{name.removesuffix('-only')}.json"
    classes = json.loads(file.read_text(encoding="utf-8"))
    return [entry for entry in classes if not entry["thing"]] if name == "coco-stuff-only" else classes


__all__ = ["EXPANSIONS", "VOCABULARIES", "load_class_ids", "load_vocabulary"]
