"""Pages and photographs of the picture book, and its metrics."""

import numpy as np
import pytest

from san_hf.picture_book.measure import TEST_SEED, measure_label_maps
from san_hf.picture_book.objects import ATTRIBUTES, BASE, CLASS_NAMES, COMPOSITIONS, NOVEL, OBJECTS, STUFF
from san_hf.picture_book.scenes import draw_photo, draw_scene


def test_base_and_novel_share_every_word_and_no_composition():
    """Catches a split in which a novel composition has a word that no mask was ever given for, or is base as well."""
    assert set(BASE) | set(NOVEL) == set(COMPOSITIONS)
    assert not set(BASE) & set(NOVEL)
    assert len(NOVEL) / len(COMPOSITIONS) == 2 / 11
    for split in (BASE, NOVEL):
        attributes, things = zip(*(name.split(" ") for name in split))
        assert set(attributes) == set(ATTRIBUTES)
        assert set(things) == set(OBJECTS)


def test_a_seed_gives_the_same_page():
    """Catches randomness that does not come from the seed: the test set would be another one each time."""
    first, again, other = draw_scene([5, 1]), draw_scene([5, 1]), draw_scene([5, 2])
    assert first.image.tobytes() == again.image.tobytes()
    assert np.array_equal(first.label_map, again.label_map)
    assert first.objects == again.objects and first.caption == again.caption
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_label_map_is_exact(seed):
    """Catches masks that are shifted, swapped, or drawn in another order than the image.

    In a plain colour nearly all of an object's body has one hue, and pixels of stuff have others.
    """
    scene = draw_scene([6, seed], names=["red ball", "blue car"])
    pixels = np.asarray(scene.image).astype(int)
    red = (pixels[..., 0] > 1.8 * pixels[..., 1]) & (pixels[..., 0] > 1.8 * pixels[..., 2])
    blue = (pixels[..., 2] > 1.6 * pixels[..., 1]) & (pixels[..., 2] > 1.8 * pixels[..., 0])
    gold = (pixels[..., 0] > 1.05 * pixels[..., 1]) & (pixels[..., 1] > 1.5 * pixels[..., 2])  # the ball's star
    ball = scene.label_map == CLASS_NAMES.index("red ball")
    car = scene.label_map == CLASS_NAMES.index("blue car")
    assert (red | gold)[ball].mean() > 0.8 and (red | gold)[~ball].mean() < 0.01
    assert blue[car].mean() > 0.35 and blue[~car].mean() < 0.02
    for drawn in scene.objects:
        ys, xs = np.nonzero(scene.label_map == CLASS_NAMES.index(drawn.name))
        assert drawn.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert drawn.visible >= 0.55
        assert drawn.name in scene.caption


def test_near_objects_cover_far_ones():
    """Catches a label map in which a covered object shows through: both orders would give equal areas."""
    covered = 0
    for seed in range(30):
        scene = draw_scene([7, seed], names=["red tree", "blue house", "white car"])
        far, near = scene.objects[0], scene.objects[-1]
        assert near.visible == 1.0
        covered += far.visible < 1.0
    assert covered > 3


def test_training_pages_show_no_novel_composition():
    """Catches a leak of novel masks into training, which would make novel mIoU meaningless."""
    novel = [CLASS_NAMES.index(name) for name in NOVEL]
    for seed in range(40):
        scene = draw_scene([8, seed], (64, 64), choose_from=BASE)
        assert not np.isin(scene.label_map, novel).any()


@pytest.mark.parametrize("subject", ["striped bird", "purple boat", "sky", "mountain"])
def test_photo_shows_its_subject(subject):
    """Catches captions that name something outside the frame: CLIP would be trained on wrong captions."""
    photo, things, stuff = draw_photo([9, 1], subject, 48, others=2)
    assert photo.size == (48, 48) and photo.mode == "RGB"
    assert subject in things + stuff
    assert set(things) <= set(COMPOSITIONS) and set(stuff) <= set(STUFF)
    if subject in STUFF:
        assert things == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (31, 64)}, "at least 32 x 32"),
        ({"names": ["red car"] * 6}, "room for five objects, got 6"),
        ({"names": ["red car", "grey car"]}, r"\['grey car'\]"),
    ],
)
def test_refuses_what_it_cannot_draw(arguments, message):
    """Catches requests that would loop forever, draw too small a page, or fail deep inside."""
    with pytest.raises(ValueError, match=message):
        draw_scene(0, **arguments)


def test_measure_of_the_truth_and_of_a_known_mistake():
    """Catches a confusion matrix the wrong way round, and means over classes that don't occur."""
    pages = iter([draw_scene([TEST_SEED, i]) for i in range(6)])
    perfect = measure_label_maps(lambda image: next(pages).label_map, pages=6)
    assert perfect == {"base_miou": 100, "novel_miou": 100, "stuff_miou": 100, "pixel_accuracy": 100}

    maps = [draw_scene([TEST_SEED, i]).label_map for i in range(6)]
    sky = CLASS_NAMES.index("sky")
    result = measure_label_maps(lambda image: np.full(image.size[::-1], sky), pages=6)
    share = np.mean([np.mean(label_map == sky) for label_map in maps])
    occurring = {value for label_map in maps for value in np.unique(label_map).tolist()}
    stuff = [name for name in STUFF if CLASS_NAMES.index(name) in occurring]
    assert result["pixel_accuracy"] == pytest.approx(100 * share)
    assert result["stuff_miou"] == pytest.approx(100 * share / len(stuff))
    assert result["base_miou"] == result["novel_miou"] == 0
