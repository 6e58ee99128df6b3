"""The benchmarks' class names, and the ids their annotations use."""

import pytest

from san_hf import VOCABULARIES, load_vocabulary
from san_hf.modeling import SANProcessor
from san_hf.vocabularies import load_class_ids


SIZES = {
    "coco-stuff": 171,
    "coco-stuff-only": 91,
    "ade20k-150": 150,
    "ade20k-847": 847,
    "pascal-context-59": 59,
    "pascal-context-459": 459,
    "voc": 20,
    "cityscapes": 19,
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(name):
    """A name lost, doubled or with stray spaces shifts or splits labels; the processor must take each list as it is."""
    names, ids = load_vocabulary(name), load_class_ids(name)
    assert len(names) == SIZES[name] == len(ids) == len(set(ids)) and min(ids) >= 1
    assert SANProcessor.expand(names, names) == names


def test_labels_and_ids():
    """Spot checks against the owners' lists: an order or an id off by one shows."""
    coco = dict(zip(load_class_ids("coco-stuff"), load_vocabulary("coco-stuff")))
    assert (coco[1], coco[90], coco[92], coco[182]) == ("person", "toothbrush", "banner", "wood")
    assert load_vocabulary("coco-stuff-only") == load_vocabulary("coco-stuff")[80:]
    ade = dict(zip(load_vocabulary("ade20k-847"), load_class_ids("ade20k-847")))
    assert (ade["wall"], ade["building, edifice"], ade["sky"]) == (2978, 312, 2420)
    assert load_vocabulary("ade20k-150")[:3] == ["wall", "building", "sky"] and load_class_ids("ade20k-150")[0] == 1
    cityscapes = list(zip(load_class_ids("cityscapes"), load_vocabulary("cityscapes")))
    assert cityscapes[0] == (7, "road") and cityscapes[11] == (24, "person") and cityscapes[-1] == (33, "bicycle")
    assert load_vocabulary("voc")[0] == "aeroplane" and load_vocabulary("voc")[-1] == "tv"


def test_pascal_context_59_are_59_of_the_459():
    """Labels of the 59 are made from annotations of the 459 by these ids: the names must agree."""
    every = dict(zip(load_class_ids("pascal-context-459"), load_vocabulary("pascal-context-459")))
    ids, names = load_class_ids("pascal-context-59"), load_vocabulary("pascal-context-59")
    assert ids == sorted(ids)
    assert {every[i]: name for i, name in zip(ids, names) if every[i] != name} == {"table": "diningtable"}


def test_no_such_vocabulary():
    """A misspelt name must say what there is."""
    with pytest.raises(ValueError, match="no vocabulary 'coco', expected one of .*coco-stuff, "):
        load_vocabulary("coco")
