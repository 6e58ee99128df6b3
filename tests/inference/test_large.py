"""Images larger than memory: segmented strip by strip, with the same result as whole; and maps with their place."""

import json

import numpy as np
import pytest
from PIL import Image

from san_hf import Segmenter
from san_hf.rasters import Raster


rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
shapely = pytest.importorskip("shapely", reason="needs shapely")
NAMES = ["sky", "grass", "house", "tree", "water"]
SAMPLE = "san_hf/checkpoints/picture-book/sample.png"
ALL = ["overlay", "mask", "json", "png-labels", "npy", "confidence", "geojson", "geotiff"]
UTM = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_500_000)}


@pytest.fixture(scope="module")
def whole() -> Segmenter:
    return Segmenter.from_pretrained(class_names=NAMES, confidence=True)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A page's sample four times, (350, 400, 3), whose windows are unlike each other."""
    with Image.open(SAMPLE) as file:
        page = file.convert("RGB").resize((200, 175))
    picture = Image.new("RGB", (400, 350))
    for number, place in enumerate([(0, 0), (200, 0), (0, 175), (200, 175)]):
        picture.paste(page.rotate(90 * number), place)
    return np.asarray(picture)


def write(path, pixels, **options):
    profile = {"count": 3, "height": pixels.shape[0], "width": pixels.shape[1], "dtype": "uint8", "photometric": "rgb"}
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **profile, **tiles, **options) as dataset:
        dataset.write(np.moveaxis(pixels, -1, 0))
    return path


def in_windows(segmenter, tile, overlap=None, **options) -> Segmenter:
    predictor = segmenter.predictor
    return Segmenter(predictor.model, predictor.processor, NAMES, tile=tile, overlap=overlap, **options)


@pytest.fixture
def small(monkeypatch):
    """Images in strips that would be whole, and tiles of files that are small."""
    monkeypatch.setattr("san_hf.inference.segmenter.WHOLE_PIXELS", 0)
    monkeypatch.setattr("san_hf.inference.large.TILE", 64)
    monkeypatch.setattr("san_hf.inference.geotiff.TILE", 64)


@pytest.mark.parametrize(("tile", "overlap"), [(160, 40), (128, 64), (128, 0), (200, None)])
def test_strips_are_the_whole(tile, overlap, whole, pixels, small, tmp_path):
    """Strips that are shifted, left out or joined in another order; files that differ from those of `save`."""
    segmenter = in_windows(whole, tile, overlap, confidence=True)
    path = write(tmp_path / "a.tif", pixels)
    expected = segmenter(Image.fromarray(pixels))
    assert isinstance(segmenter.load(path), Raster) and segmenter(path) == expected
    rows = []
    found = segmenter.segment_file(
        path, tmp_path / "strips", ALL, progress=lambda *done: rows.append(done), image="a.tif"
    )
    assert rows == [(64, 350), (128, 350), (192, 350), (256, 350), (320, 350), (350, 350)]
    files = expected.save(tmp_path / "whole", ALL, image="a.tif")
    assert [file.name.partition(".")[2] for file in found.files] == [file.name.partition(".")[2] for file in files]
    assert found.legend() == expected.legend()
    for name in ("labels.png", "mask.png", "confidence.png", "overlay.png"):
        strips, once = (np.asarray(Image.open(tmp_path / f"{stem}.{name}")) for stem in ("strips", "whole"))
        np.testing.assert_array_equal(strips, once, err_msg=name)
    np.testing.assert_array_equal(np.load(tmp_path / "strips.labels.npy"), expected.label_map)
    assert (tmp_path / "strips.json").read_text() == (tmp_path / "whole.json").read_text()
    for stem in ("strips", "whole"):
        with rasterio.open(tmp_path / f"{stem}.labels.tif") as dataset:
            np.testing.assert_array_equal(dataset.read(1), expected.label_map)
            assert dataset.nodata == 255 and dataset.tags(1)["class_2"] == "house"
            assert [dataset.colormap(1)[label][:3] for label in range(5)] == [*map(tuple, expected.colors.tolist())]
    strips, once = (json.loads((tmp_path / f"{stem}.geojson").read_text())["features"] for stem in ("strips", "whole"))
    assert len(strips) == len(once) > 1
    for mine, other in zip(strips, once):
        assert mine["geometry"] == other["geometry"] or shapely.equals(
            *map(shapely.geometry.shape, (mine["geometry"], other["geometry"]))
        )
        assert mine["properties"].pop("score") == pytest.approx(other["properties"].pop("score"))
        assert mine["properties"] == other["properties"]
