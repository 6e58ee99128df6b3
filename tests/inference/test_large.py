"""Images larger than memory: segmented strip by strip, with the same result as whole; and maps with their place."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf import Segmenter
from san_hf.cli import app
from san_hf.images import ImageError
from san_hf.inference import Segmentation, SegmentationWorker
from san_hf.inference.windows import Windows
from san_hf.inference.writers import WRITERS
from san_hf.modeling import SANModel
from san_hf.rasters import Georeference, Raster
from tests.cli.test_bounds import MEASURE
from tests.inference.conftest import SAMPLE, four_pages


rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
shapely = pytest.importorskip("shapely", reason="needs shapely")
NAMES = ["sky", "grass", "house", "tree", "water"]
ALL = list(WRITERS)
UTM = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_500_000)}


@pytest.fixture(scope="module")
def whole() -> Segmenter:
    return Segmenter.from_pretrained(class_names=NAMES, confidence=True)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(350, 400, 3)."""
    return np.asarray(four_pages(400, 350))


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
            assert dataset.overviews(1) == ([2, 4, 8] if stem == "strips" else [])
            assert dataset.nodata == 255 and dataset.tags(1)["class_2"] == "house"
            assert [dataset.colormap(1)[label][:3] for label in range(5)] == [*map(tuple, expected.colors.tolist())]
    strips, once = (json.loads((tmp_path / f"{stem}.coco.json").read_text()) for stem in ("strips", "whole"))
    for mine, other in zip(strips["annotations"], once["annotations"]):
        assert mine.pop("score") == pytest.approx(other.pop("score"))
    assert strips == once
    strips, once = (json.loads((tmp_path / f"{stem}.geojson").read_text())["features"] for stem in ("strips", "whole"))
    assert len(strips) == len(once) > 1
    for mine, other in zip(strips, once):
        assert mine["geometry"] == other["geometry"] or shapely.equals(
            *map(shapely.geometry.shape, (mine["geometry"], other["geometry"]))
        )
        assert mine["properties"].pop("score") == pytest.approx(other["properties"].pop("score"))
        assert mine["properties"] == other["properties"]


@pytest.mark.parametrize(("tile", "overlap"), [(128, 64), (192, 64), (128, 32), (256, 128), (96, 0)])
def test_no_seam_in_strips(tile, overlap, whole, small, tmp_path):
    """
    Edges of windows, of strips or of tiles that show: in an image of repeated parts, as far apart as the windows, each
    part is like the others.
    """
    period = tile - overlap
    with Image.open(SAMPLE) as file:
        part = np.asarray(file.convert("RGB").resize((period, period)))
    side = 4 * period + overlap
    path = write(tmp_path / "a.tif", np.tile(part, (6, 6, 1))[:side, :side])
    in_windows(whole, tile, overlap).segment_file(path, tmp_path / "a", ["npy"])
    # Without those that the image's own edges are near.
    labels = np.load(tmp_path / "a.labels.npy")[period : 3 * period, period : 3 * period]
    first = labels[:period, :period]
    assert len(np.unique(first)) > 1
    np.testing.assert_array_equal(labels, np.tile(first, (2, 2)))


def test_what_is_held(whole, small, monkeypatch, tmp_path):
    """Rows that are read twice, or all at once: memory that grows with the image's height."""
    asked, read = [], Raster._read

    def counted(self, rows):
        asked.append(rows)
        return read(self, rows)

    monkeypatch.setattr(Raster, "_read", counted)
    path = write(tmp_path / "a.tif", np.zeros((1024, 128, 3), np.uint8))
    in_windows(whole, 128, 32).segment_file(path, tmp_path / "a", ["geotiff", "overlay"])
    assert asked == [side.place for side in Windows(128, 32).along(1024)] and len(asked) == 11


def polygons_of(path):
    return {
        feature["properties"]["name"]: shapely.geometry.shape(feature["geometry"])
        for feature in json.loads(path.read_text())["features"]
    }


@pytest.mark.parametrize("tile", [None, 160])
def test_maps_keep_their_place(tile, whole, pixels, tmp_path, monkeypatch):
    """Outputs that lie elsewhere than their image: with and without windows, whole and in strips."""
    if tile:
        monkeypatch.setattr("san_hf.inference.segmenter.WHOLE_PIXELS", 0)
    path = write(tmp_path / "a.tif", pixels, **UTM)
    segmenter = in_windows(whole, tile)
    found = segmenter.segment_file(path, tmp_path / "a", ["geotiff", "geojson", "json"])
    assert found.georeference.transform == tuple(UTM["transform"][:6])
    with rasterio.open(tmp_path / "a.labels.tif") as dataset:
        assert dataset.crs == rasterio.CRS.from_epsg(32632) and dataset.transform == UTM["transform"]
        labels = dataset.read(1)
    shapes = polygons_of(tmp_path / "a.geojson")
    # Back from degrees to pixels: each shape covers its class's pixels.
    for label, name in enumerate(NAMES):
        if not (labels == label).any():
            continue
        geometry = rasterio.warp.transform_geom("EPSG:4326", UTM["crs"], shapely.geometry.mapping(shapes[name]))
        mask = rasterio.features.rasterize([geometry], out_shape=labels.shape, transform=UTM["transform"])
        np.testing.assert_array_equal(mask.astype(bool), labels == label)
    west, south, east, north = shapely.unary_union(list(shapes.values())).bounds
    assert 9 <= west < east < 9.1 and 49.6 < south < north < 49.7


def test_geojson_of_a_map(pixels):
    """The image's own system that is written though another one was asked for; straight lines that stay too long."""
    labels = np.zeros((400, 1000), np.uint8)
    place = Georeference(tuple(UTM["transform"][:6]), UTM["crs"])
    segmentation = Segmentation(Image.new("RGB", (1000, 400)), labels, ["sky"], georeference=place)
    content = segmentation.to_geojson()
    assert "crs" not in content
    (ring,) = content["features"][0]["geometry"]["coordinates"][0]
    assert len(ring) == 1 + 2 * (10 + 4)
    corners = rasterio.warp.transform("EPSG:32632", "EPSG:4326", [500_000, 510_000], [5_500_000, 5_496_000])
    np.testing.assert_allclose(np.min(ring, axis=0), [corners[0][0], min(p[1] for p in ring)], atol=1e-9)
    own = segmentation.to_geojson(transform=place.transform, crs="urn:ogc:def:crs:EPSG::32632")
    assert own["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32632"
    assert shapely.geometry.shape(own["features"][0]["geometry"]).bounds == (500_000, 5_496_000, 510_000, 5_500_000)
    unknown = Segmentation(segmentation.image, labels, ["sky"], georeference=Georeference(place.transform))
    assert shapely.geometry.shape(unknown.to_geojson()["features"][0]["geometry"]).bounds == (
        500_000,
        5_496_000,
        510_000,
        5_500_000,
    )


@pytest.mark.parametrize("strips", [False, True])
def test_no_data_is_no_class(strips, whole, pixels, tmp_path, monkeypatch):
    """A scene's empty border that counts as a class, or that its shares are of."""
    if strips:
        monkeypatch.setattr("san_hf.inference.segmenter.WHOLE_PIXELS", 0)
    missing = np.zeros(pixels.shape[:2], bool)
    missing[:, :100] = missing[:50] = True
    path = write(tmp_path / "a.tif", np.where(missing[..., None], 0, pixels.clip(1)).astype(np.uint8), nodata=0, **UTM)
    segmenter = in_windows(whole, 160, confidence=True)
    found = segmenter.segment_file(path, tmp_path / "a", ALL)
    labels = np.load(tmp_path / "a.labels.npy")
    np.testing.assert_array_equal(labels == 255, missing)
    assert found.pixels.sum() == (~missing).sum()
    assert sum(entry["share"] for entry in found.legend()) == pytest.approx(1)
    with rasterio.open(tmp_path / "a.labels.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1, masked=True).mask, missing)
    assert set(polygons_of(tmp_path / "a.geojson")) <= set(NAMES)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.mask.png"))[missing], 24)
    if not strips:
        segmentation = segmenter(path)
        assert sum(mask.sum() for mask in segmentation.masks().values()) == (~missing).sum()
        assert sum(entry["area"] for entry in segmentation.to_coco()["annotations"]) == (~missing).sum()


def test_windows_without_data_are_passed_over(whole, small, pixels, tmp_path, monkeypatch):
    """Hours of work on a scene's empty border; pixels with data that lose what an empty neighbour would add."""
    seen, forward = [], SANModel.forward

    def count(self, pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    missing = np.zeros(pixels.shape[:2], bool)
    missing[:, :330] = missing[:150] = True
    values = np.where(missing[..., None], 0, pixels.clip(1)).astype(np.uint8)
    path = write(tmp_path / "a.tif", values, nodata=0, **UTM)
    segmenter = in_windows(whole, 100, 50, confidence=True)
    white = Image.fromarray(np.where(missing[..., None], 255, values).astype(np.uint8))
    expected = segmenter(white)
    monkeypatch.setattr(SANModel, "forward", count)
    segmenter.segment_file(path, tmp_path / "a", ["npy", "confidence"])
    assert sum(seen) == 4 * 2  # of 6 x 7, those whose right and lower edges lie beyond the border
    labels = np.load(tmp_path / "a.labels.npy")
    np.testing.assert_array_equal(labels, np.where(missing, 255, expected.label_map))
    confidence = np.asarray(Image.open(tmp_path / "a.confidence.png"))
    np.testing.assert_allclose(confidence[~missing] / 65535, expected.confidence[~missing], atol=1e-4)


def test_names_for_other_programs(whole, pixels, tmp_path):
    """Names that GDAL, and what is built on it, doesn't find beside the labels."""
    names = ["sky & <sea>", "grass", "house"]
    Segmentation(Image.fromarray(pixels), np.zeros(pixels.shape[:2], np.uint8), names).save(tmp_path / "a", ["geotiff"])
    rasterio.shutil.copy(str(tmp_path / "a.labels.tif"), str(tmp_path / "a.vrt"), driver="VRT")
    assert "<Category>sky &amp; &lt;sea&gt;</Category>" in (tmp_path / "a.vrt").read_text()


def test_many_classes(whole, small, pixels, tmp_path):
    """Labels beyond 255 that are cut off."""
    names = [f"thing {number % 300}" for number in range(89, 389)]
    predictor = whole.predictor
    segmenter = Segmenter(predictor.model, predictor.processor, names, tile=160)
    expected = segmenter(Image.fromarray(pixels)).label_map
    segmenter.segment_file(write(tmp_path / "a.tif", pixels), tmp_path / "a", ["geotiff", "png-labels", "mask"])
    assert expected.max() > 255
    with rasterio.open(tmp_path / "a.labels.tif") as dataset:
        assert dataset.nodata == 65535
        np.testing.assert_array_equal(dataset.read(1), expected)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.labels.png")), expected)


def test_what_can_not_be(whole, small, pixels, tmp_path, monkeypatch):
    """Formats that fail after hours; half of an image's files; whole images that fill the memory."""
    segmenter = in_windows(whole, 160)
    path = write(tmp_path / "a.tif", pixels)
    with pytest.raises(ValueError, match="Unknown formats"):
        segmenter.segment_file(path, tmp_path / "out" / "a", ["jpeg", "json"])
    with pytest.raises(ValueError, match="no confidence"):
        segmenter.segment_file(path, tmp_path / "out" / "a", ["confidence"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="400 x 350 pixels, too many .*segment_file"):
        segmenter(path)
    segmenter.segment_file(path, tmp_path / "out" / "a", ["json"])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.json"]


def test_interrupted(whole, small, pixels, tmp_path):
    """Half of a label map, or files from which others are made, that stay behind."""
    path = write(tmp_path / "a.tif", pixels)

    def stop(done, _):
        if done > 100:
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.labels.tif").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        in_windows(whole, 160).segment_file(path, tmp_path / "out" / "a", ["geotiff", "json"], progress=stop)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.labels.tif"]
    assert (tmp_path / "out" / "a.labels.tif").read_text() == "before"


def test_command(whole, small, pixels, tmp_path):
    """Options that don't reach the segmenter; large images that a folder can't be resumed over."""
    write(tmp_path / "in.tif", pixels, **UTM)
    many = np.concatenate([pixels, pixels[..., :1]], axis=-1).astype(np.int16) * 10
    profile = {"count": 4, "height": 350, "width": 400, "dtype": "int16", **UTM}
    with rasterio.open(tmp_path / "many.tif", "w", driver="GTiff", **profile) as dataset:
        dataset.write(np.moveaxis(many[..., [2, 1, 0, 3]], -1, 0))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    command = ["segment", *(str(tmp_path / name) for name in ("in.tif", "many.tif", "photo.png"))]
    command += [
        "--classes",
        ",".join(NAMES),
        "-f",
        "npy",
        "-f",
        "geotiff",
        "-o",
        str(tmp_path / "out"),
        "--tile",
        "160",
    ]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 1 and "many.tif: it has 4 bands" in done.output and "Traceback" not in done.output
    expected = in_windows(whole, 160)(Image.fromarray(pixels)).label_map
    before = (tmp_path / "out" / "in.labels.npy").stat().st_mtime_ns
    options = ["--bands", "3,2,1", "--range", "0,2550"]
    done = CliRunner().invoke(app, [*command, *options, "--resume"], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and "the raster was not given and is" in done.output
    done = CliRunner().invoke(app, [*command, *options, "--overwrite"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for name in ("many", "photo"):
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{name}.labels.npy"), expected)
    (tmp_path / "out" / "many.labels.tif").unlink()
    before = (tmp_path / "out" / "in.labels.npy").stat().st_mtime_ns
    done = CliRunner().invoke(app, [*command, *options, "--resume"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "2 of 3 images are done already" in done.output
    assert (tmp_path / "out" / "in.labels.npy").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "many.labels.tif").exists()
    done = CliRunner().invoke(app, [*command, "--range", "5", "--overwrite"])
    assert done.exit_code == 2 and "expected two numbers" in done.output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss is in other units elsewhere")
def test_peak_memory(tmp_path):
    """An image, labels or confidences that are whole in memory: 108 million pixels, of 9 bytes together."""
    small = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    strip = np.asarray(Image.fromarray(small).resize((12_000, 1_000)))
    profile = {"count": 3, "dtype": "uint8", "photometric": "rgb", "tiled": True, "compress": "deflate"}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=12_000, height=9_000, **profile, **UTM
    ) as dataset:
        for top in range(0, 9_000, 1_000):
            dataset.write(np.moveaxis(strip, -1, 0), window=rasterio.windows.Window(0, top, 12_000, 1_000))
    command = [sys.executable, "-S", "-c", MEASURE, sys.executable, "-m", "san_hf", "segment", tmp_path / "a.tif"]
    command += ["--classes", ",".join(NAMES), "--tile", "1024", "-o", tmp_path / "out"]
    formats = [word for name in ("overlay", "geotiff", "png-labels", "confidence") for word in ("-f", name)]
    done = subprocess.run([*map(str, command), *formats], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    status, peak = map(int, done.stdout.split()[-2:])
    assert status == 0, done.stderr[-2000:]
    assert peak * 1024 < 950e6
    with rasterio.open(tmp_path / "out" / "a.labels.tif") as dataset:
        assert (dataset.width, dataset.height) == (12_000, 9_000) and dataset.block_shapes == [(256, 256)]


def test_resumed_after_the_first_of_two(small, pixels, tmp_path, monkeypatch):
    """A large image that is complete, and done again because the next one was interrupted."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.tif", pixels)
    command = ["segment", str(tmp_path / "in"), "--classes", ",".join(NAMES), "--tile", "200", "-f", "geotiff"]
    command += ["-o", str(tmp_path / "out"), "--resume"]
    segment_file, stems = Segmenter.segment_file, []

    def interrupted(self, opened, stem, /, *arguments, **options):
        stems.append(stem.name)
        if stems == ["a", "b"]:
            raise KeyboardInterrupt
        return segment_file(self, opened, stem, *arguments, **options)

    monkeypatch.setattr(Segmenter, "segment_file", interrupted)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 130 and "Interrupted: 1 of 2 images are done" in done.output
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "1 of 2 images are done already" in done.output
    assert stems == ["a", "b", "b"]


def test_worker(whole, small, pixels, tmp_path):
    """Bulk jobs that read maps as photographs, or large images whole."""
    write(tmp_path / "a.tif", pixels, **UTM)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "c.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:50_000])
    worker = SegmentationWorker(class_names=NAMES, formats=["npy", "geotiff"], tile=160)
    images, stems = ([str(folder / name) for name in "abc"] for folder in (tmp_path, tmp_path / "out"))
    images = [name + ending for name, ending in zip(images, (".tif", ".png", ".tif"))]
    manifest = worker({"image": images, "output": stems})
    assert [len(files) for files in manifest["files"]] == [4, 4, 0]
    assert manifest["error"][:2] == ["", ""] and "read" in manifest["error"][2]
    np.testing.assert_array_equal(
        np.load(tmp_path / "out" / "a.labels.npy"), np.load(tmp_path / "out" / "b.labels.npy")
    )
    with rasterio.open(tmp_path / "out" / "a.labels.tif") as dataset:
        assert dataset.transform == UTM["transform"]
