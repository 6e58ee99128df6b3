"""Segmentations in other libraries' forms, read back by these libraries."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from san_hf.extras import MissingPackageError
from san_hf.inference import Segmentation


NAMES = ["sky", "grass", "never there", "house", "other"]


def label_map(kind: str) -> np.ndarray:
    if kind == "rings":  # holes in holes, and regions that touch at corners only
        rows, columns = np.mgrid[:60, :83]
        rings = (np.hypot(rows - 30, columns - 40) / 7).astype(int) % 2
        rings[2:6:2, 2:6:2] = rings[3:7:2, 3:7:2] = 3
        return rings.astype(np.uint8)
    if kind == "noise":
        return np.random.default_rng(0).choice([0, 1, 3, 4], (40, 31)).astype(np.uint8)
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(4, 90, 120)), (0, 9, 9))
    return np.array([0, 1, 3, 4], dtype=np.uint8)[smooth.argmax(0)]


@pytest.fixture(params=["rings", "noise", "smooth"])
def segmentation(request) -> Segmentation:
    labels = label_map(request.param)
    confidence = np.random.default_rng(2).random(labels.shape, dtype=np.float32)
    image = Image.new("RGB", labels.shape[::-1], "white")
    return Segmentation(image, labels, NAMES, expanded=True, confidence=confidence)


def test_masks_and_table(segmentation):
    """Classes of other pixels; "other", which is none; a class that has no pixels among the masks."""
    masks, table = segmentation.masks(), segmentation.to_dataframe().set_index("name")
    assert set(masks) <= {"sky", "grass", "house"} and list(table.index) == NAMES
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, segmentation.label_map == NAMES.index(name))
        assert table.pixels[name] == mask.sum()
        assert table.score[name] == pytest.approx(segmentation.confidence[mask].mean())
    assert np.isnan(table.score["never there"])


def rasterize(polygons, shape) -> np.ndarray:
    features = pytest.importorskip("rasterio.features", reason="needs rasterio")
    if polygons.is_empty:
        return np.zeros(shape, bool)
    return features.rasterize([polygons], out_shape=shape).astype(bool)


def test_polygons(segmentation):
    """Outlines half a pixel off, without holes, or that cross themselves."""
    shapely = pytest.importorskip("shapely", reason="needs shapely")
    pytest.importorskip("rasterio", reason="needs rasterio")
    found = segmentation.polygons()
    assert list(found) == list(segmentation.masks())
    for name, mask in segmentation.masks().items():
        assert found[name].area == mask.sum()
        assert all(polygon.is_valid for polygon in found[name].geoms)
        np.testing.assert_array_equal(rasterize(found[name], mask.shape), mask)
        whole = shapely.union_all(list(found[name].geoms))
        assert whole.area == mask.sum()  # no two regions overlap


@pytest.mark.parametrize("tolerance", [1.0, 3.0])
def test_simplified_polygons(tolerance):
    """Outlines that move by more than was allowed, or aren't simpler."""
    pytest.importorskip("rasterio", reason="needs rasterio")
    labels = label_map("smooth")
    segmentation = Segmentation(Image.new("RGB", labels.shape[::-1]), labels, NAMES)
    exact, simple = segmentation.polygons(), segmentation.polygons(tolerance)
    for name, mask in segmentation.masks().items():
        different = rasterize(simple[name], mask.shape) != mask
        # Of pixels' centres from the nearest pixel of the other kind: an edge is half a pixel nearer.
        distance = np.where(mask, ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask))
        assert different.any() and distance[different].max() <= tolerance + 0.5 + 0.5**0.5
        corners = [sum(len(polygon.exterior.coords) for polygon in found[name].geoms) for found in (exact, simple)]
        assert corners[1] < corners[0] / 2
    with pytest.raises(ValueError, match="tolerance=-1"):
        segmentation.polygons(-1)


@pytest.mark.parametrize("polygons", [False, True])
def test_coco(segmentation, polygons, tmp_path):
    """Codes of transposed masks, boxes without their last pixel, polygons that fill their holes."""
    if polygons:
        pytest.importorskip("rasterio", reason="needs rasterio")
    content = segmentation.to_coco(file_name="a.jpg", image_id=7, polygons=polygons)
    (tmp_path / "coco.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "coco.json")
    assert coco.loadImgs([7])[0] | {} == {
        "id": 7,
        "file_name": "a.jpg",
        "width": segmentation.width,
        "height": segmentation.height,
    }
    masks = segmentation.masks()
    assert [coco.cats[entry["category_id"]]["name"] for entry in content["annotations"]] == list(masks)
    assert "other" not in {category["name"] for category in content["categories"]}
    for annotation, mask in zip(coco.loadAnns(coco.getAnnIds([7])), masks.values()):
        np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), mask)
        code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert annotation["area"] == coco_mask.area(code)
        assert annotation["bbox"] == coco_mask.toBbox(code).tolist()
        assert annotation["score"] == pytest.approx(segmentation.confidence[mask].mean())


def test_geojson(segmentation):
    """Rings of the wrong sense, coordinates of a map with rows and columns exchanged."""
    shapely = pytest.importorskip("shapely", reason="needs shapely")
    features = pytest.importorskip("rasterio.features", reason="needs rasterio")
    from rasterio.transform import Affine

    transform = (0.5, 0.0, 600_000.0, 0.0, -0.5, 5_000_000.0)
    crs = "urn:ogc:def:crs:EPSG::32632"
    content = json.loads(json.dumps(segmentation.to_geojson(transform=transform, crs=crs)))
    assert content["type"] == "FeatureCollection" and content["crs"]["properties"]["name"] == crs
    for feature, (name, mask) in zip(content["features"], segmentation.masks().items(), strict=True):
        assert feature["properties"]["name"] == name and feature["properties"]["pixels"] == mask.sum()
        shape = shapely.geometry.shape(feature["geometry"])
        assert all(polygon.exterior.is_ccw for polygon in shape.geoms)
        found = features.rasterize([shape], out_shape=mask.shape, transform=Affine(*transform)).astype(bool)
        np.testing.assert_array_equal(found, mask)
    in_pixels = segmentation.to_geojson()
    assert "crs" not in in_pixels
    shape = shapely.geometry.shape(in_pixels["features"][0]["geometry"])
    np.testing.assert_array_equal(rasterize(shape, mask.shape), next(iter(segmentation.masks().values())))
    with pytest.raises(ValueError, match="transform of 4"):
        segmentation.to_geojson(transform=(1, 0, 0, 1))


def test_supervision(segmentation):
    """Boxes, masks and names of different classes in one detection."""
    pytest.importorskip("supervision", reason="needs supervision")
    detections = segmentation.to_supervision()
    assert list(detections.data["class_name"]) == list(segmentation.masks())
    for number, mask in enumerate(segmentation.masks().values()):
        np.testing.assert_array_equal(detections.mask[number], mask)
        rows, columns = np.nonzero(mask)
        assert detections.xyxy[number].tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert detections.confidence[number] == pytest.approx(segmentation.confidence[mask].mean())
    assert detections.area.tolist() == [mask.sum() for mask in segmentation.masks().values()]


def test_nothing_but_other():
    """Forms that can't be of no class at all."""
    labels = np.full((5, 6), 4, np.uint8)
    segmentation = Segmentation(Image.new("RGB", (6, 5)), labels, NAMES, expanded=True)
    assert segmentation.masks() == {} and segmentation.to_coco()["annotations"] == []
    pytest.importorskip("rasterio", reason="needs rasterio")
    assert segmentation.polygons() == {} and segmentation.to_geojson()["features"] == []
    pytest.importorskip("supervision", reason="needs supervision")
    assert len(segmentation.to_supervision()) == 0


def test_notebooks_and_consoles(segmentation):
    """A cell or a console that prints an array of a million numbers."""
    assert Image.open(io.BytesIO(segmentation._repr_png_())).format == "PNG"
    text = repr(segmentation)
    assert len(text) < 150 and f"{segmentation.width} x {segmentation.height}" in text and "sky" in text


def test_files(segmentation, tmp_path):
    """Files that differ from what the methods give."""
    segmentation.save(tmp_path / "a", ["coco", "npy"], image="in/a.jpg")
    np.testing.assert_array_equal(np.load(tmp_path / "a.labels.npy"), segmentation.label_map)
    assert json.loads((tmp_path / "a.coco.json").read_text()) == segmentation.to_coco(file_name="a.jpg")
    pytest.importorskip("rasterio", reason="needs rasterio")
    segmentation.save(tmp_path / "a", ["geojson"])
    found = json.loads((tmp_path / "a.geojson").read_text())
    assert found == json.loads(json.dumps(segmentation.to_geojson()))


def test_missing_packages(monkeypatch, tmp_path):
    """An error about a module, not about what to install."""
    segmentation = Segmentation(Image.new("RGB", (6, 5)), np.zeros((5, 6), np.uint8), NAMES)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setitem(sys.modules, "rasterio.features", None)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackageError, match=r"package rasterio.*pip install 'san_hf\[polygons\]'"):
        segmentation.save(tmp_path / "a", ["geojson"])
    with pytest.raises(MissingPackageError, match=r"pip install 'san_hf\[supervision\]'"):
        segmentation.to_supervision()
    assert not list(tmp_path.iterdir())
