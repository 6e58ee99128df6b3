"""Maps and other rasters: what becomes of their pixels, and where they lie."""

import numpy as np
import pytest
from PIL import Image

from san_hf.images import ImageError, load_image
from san_hf.messages import Notice
from san_hf.rasters import RasterOptions, open_raster


rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
warnings_of_files = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
pytestmark = warnings_of_files
UTM = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_500_000.0)}


def write(path, values, interpretation=None, tags=None, **options):
    """A TIFF of (bands, H, W) values."""
    options = dict(options)
    if "transform" in options:
        options["transform"] = rasterio.Affine(*options["transform"])
    profile = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver=options.pop("driver", "GTiff"), **profile, **options) as dataset:
        if interpretation:
            dataset.colorinterp = [rasterio.enums.ColorInterp[name] for name in interpretation]
        dataset.write(values)
    return path


@pytest.fixture
def values() -> np.ndarray:
    """(3, 90, 130), not alike when turned or mirrored."""
    return np.random.default_rng(0).integers(0, 256, (3, 90, 130), dtype=np.uint8)


def read(path, rows=None, **options):
    raster = open_raster(path, RasterOptions(**options))
    try:
        image, valid = raster.whole()
        return np.moveaxis(np.asarray(image), -1, 0), valid
    finally:
        raster.close()


def test_plain_images_are_pillows(tmp_path, values):
    """Rasters' rules that change what photographs in TIFF files become; other files that rasterio opens."""
    write(tmp_path / "plain.tif", values, photometric="rgb")
    Image.fromarray(np.moveaxis(values, 0, -1)).save(tmp_path / "photo.png")
    (tmp_path / "text.tif").write_text("no image")
    for name in ("plain.tif", "photo.png", "text.tif", "missing.tif"):
        assert open_raster(tmp_path / name) is None
    assert open_raster(tmp_path / "plain.tif", windows_above=90 * 130) is None
    raster = open_raster(tmp_path / "plain.tif", windows_above=90 * 130 - 1)
    image, valid = raster.whole()
    raster.close()
    assert valid is None
    np.testing.assert_array_equal(np.asarray(image), np.asarray(load_image(tmp_path / "plain.tif")))


def plain_kinds(values):
    sixteen = values.astype(np.uint16) * 231 + 17
    return {
        "rgb": (values, {"photometric": "rgb"}),
        "grey": (values[:1], {}),
        "grey, 16 bits": (sixteen[:1], {}),
        "rgba": (np.concatenate([values, values[:1] // 8 * 8]), {"photometric": "rgb", "alpha": "unspecified"}),
        # Smooth, as GDAL and Pillow enlarge chroma in different ways.
        "jpeg": (np.sort(np.sort(values, axis=1), axis=2), {"photometric": "ycbcr", "compress": "jpeg"}),
        "striped": (values, {"photometric": "rgb", "compress": "lzw", "blockysize": 7}),
        "planes": (values, {"photometric": "rgb", "interleave": "band"}),
        "big": (values, {"photometric": "rgb", "bigtiff": "yes"}),
        "miniswhite": (values[:1], {"photometric": "miniswhite"}),
        "one bit": (values[:1] // 128, {"nbits": 1}),
    }


@pytest.mark.parametrize("kind", list(plain_kinds(np.zeros((3, 1, 1), np.uint8))))
def test_windows_see_what_pillow_sees(kind, tmp_path, values):
    """Pixels of an image that depend on whether it is read whole or in windows."""
    pixels, options = plain_kinds(values)[kind]
    path = write(tmp_path / "a.tif", pixels, tiled="blockysize" not in options, **options)
    expected = np.asarray(load_image(path))
    raster = open_raster(path, windows_above=0)
    image, valid = raster.whole()
    raster.close()
    assert valid is None
    np.testing.assert_allclose(np.asarray(image).astype(int), expected.astype(int), atol=4 if kind == "jpeg" else 0)


def test_any_rows_are_those_of_the_whole(tmp_path, values):
    """Rows that are shifted where parts of a file meet, or held from before."""
    pixels = np.random.default_rng(1).integers(0, 256, (3, 700, 600), dtype=np.uint8)
    for options in ({"tiled": True, "blockxsize": 64, "blockysize": 64}, {"blockysize": 9}, {"interleave": "band"}):
        path = write(tmp_path / "a.tif", pixels, photometric="rgb", compress="deflate", **options)
        raster = open_raster(path, windows_above=0)
        for top, bottom in ((0, 30), (10, 20), (5, 640), (690, 700), (0, 700), (63, 65)):
            np.testing.assert_array_equal(np.moveaxis(raster.rows(slice(top, bottom))[0], -1, 0), pixels[:, top:bottom])
        crop = np.moveaxis(np.asarray(raster.crop((7, 100, 50, 180))), -1, 0)
        raster.close()
        np.testing.assert_array_equal(crop, pixels[:, 100:180, 7:50])


def test_blocks_are_decoded_once(tmp_path, monkeypatch):
    """Parts of a file that are decoded again for each window in a row, or all at once."""
    pixels = np.zeros((3, 256, 640), np.uint8)
    path = write(tmp_path / "a.tif", pixels, tiled=True, blockxsize=64, blockysize=64, photometric="rgb")
    monkeypatch.setattr("san_hf.rasters._BYTES_AT_ONCE", 3 * 64 * 64 * 4)
    raster = open_raster(path, windows_above=0)
    asked, dataset = [], raster._dataset

    class Counted:
        block_shapes = dataset.block_shapes

        def read(self, bands, window):
            asked.append((window.height, window.width))
            return dataset.read(bands, window=window)

        def close(self):
            dataset.close()

    raster._dataset = Counted()
    for left in range(0, 640, 64):
        raster.crop((left, 0, left + 64, 128))
    raster.close()
    assert asked == [(64, 256), (64, 256), (64, 128)] * 2


@pytest.mark.parametrize("how", ["nodata", "alpha", "mask", "nan"])
def test_pixels_without_data(how, tmp_path, values):
    """Borders of a scene that are taken for its darkest part, or a missing value of one band for all of them."""
    missing = np.zeros((90, 130), bool)
    missing[20:50, 30:] = True
    options = dict(UTM)
    if how == "nodata":
        values = np.where(missing, 7, np.where(values == 7, 8, values)).astype(np.uint8)
        values[0, 0, 0] = 7
        path = write(tmp_path / "a.tif", values, nodata=7, photometric="rgb", **options)
    elif how == "alpha":
        alpha = np.where(missing, 0, 255).astype(np.uint8)[None]
        path = write(tmp_path / "a.tif", np.concatenate([values, alpha]), photometric="rgb", alpha="yes", **options)
    elif how == "nan":
        floats = np.where(missing, np.nan, values / 255).astype(np.float32)
        path = write(tmp_path / "a.tif", floats, **options)
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            path = write(tmp_path / "a.tif", values, photometric="rgb", **options)
            with rasterio.open(path, "r+") as dataset:
                dataset.write_mask(~missing)
    colors, valid = read(path, value_range=(0, 1) if how == "nan" else None)
    np.testing.assert_array_equal(valid, ~missing)
    np.testing.assert_array_equal(colors, np.where(missing, 255, values))


def test_range_and_bands(tmp_path, values):
    """Values that are cut off or scaled otherwise than it was asked for; bands in another order."""
    twelve = values.astype(np.int16) * 12 - 100
    path = write(tmp_path / "a.tif", np.concatenate([twelve, twelve[:2]]), **UTM)
    colors, valid = read(path, bands=[3, 1, 2], value_range=(0, 2550))
    expected = np.rint(twelve[[2, 0, 1]].clip(0, 2550) / 10).astype(np.uint8)
    assert valid is None
    np.testing.assert_array_equal(colors, expected)
    unsigned = write(tmp_path / "b.tif", twelve.clip(0).astype(np.uint16), **UTM)
    np.testing.assert_array_equal(read(unsigned, bands=[2], value_range=(0, 2550))[0], expected[[2, 2, 2]])
    bits = write(tmp_path / "c.tif", twelve.clip(0).astype(np.uint16), nbits=12, **UTM)
    np.testing.assert_array_equal(read(bits)[0], np.rint(twelve.clip(0) * (255 / 4095)).astype(np.uint8))


def test_bands_that_the_file_names(tmp_path, values):
    """The first three bands of a file, whatever they are."""
    path = write(tmp_path / "a.tif", values, ["blue", "green", "red"], photometric="minisblack", **UTM)
    np.testing.assert_array_equal(read(path)[0], values[::-1])
    infrared = np.concatenate([values, values[:1]])
    path = write(tmp_path / "b.tif", infrared, photometric="rgb", alpha="unspecified", **UTM)
    np.testing.assert_array_equal(read(path)[0], values)
    palette = write(tmp_path / "c.tif", values[:1] % 4, photometric="palette", **UTM)
    with rasterio.open(palette, "r+") as dataset:
        dataset.write_colormap(1, {0: (1, 2, 3), 1: (40, 50, 60), 2: (255, 0, 9), 3: (0, 0, 0)})
    table = np.array([(1, 2, 3), (40, 50, 60), (255, 0, 9), (0, 0, 0)])
    np.testing.assert_array_equal(np.moveaxis(read(palette)[0], 0, -1), table[values[0] % 4])


def test_dark_values_are_said(tmp_path, values):
    """12 bits in 16, as satellites have them, which make a black picture."""
    path = write(tmp_path / "a.tif", values.astype(np.uint16) * 12, **UTM)
    with pytest.warns(Notice, match=r"most values are below [\d,.]+ of 65,535; .*--range"):
        colors, _ = read(path)
    np.testing.assert_array_equal(colors, np.rint(values.astype(int) * 12 / 257))


@pytest.mark.parametrize(
    ("bands", "dtype", "options", "message"),
    [
        (4, np.uint8, {}, r"it has 4 bands \(gray, .*\) and doesn't say which are red"),
        (13, np.uint16, {}, "it has 13 bands"),
        (3, np.int16, {}, r"of the type int16, most of them from 0 to 0.*--range LOW,HIGH"),
        (1, np.float32, {}, "of the type float32"),
        (3, np.uint8, {"bands": [1, 2, 7]}, "it has 3 bands, and --bands names number 7"),
    ],
)
def test_rasters_that_do_not_say_how(bands, dtype, options, message, tmp_path):
    """Pictures made by a guess."""
    path = write(tmp_path / "a.tif", np.zeros((bands, 20, 20), dtype), photometric="minisblack", **UTM)
    with pytest.raises(ImageError, match=message):
        read(path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": [1, 2]}, "expected three numbers"),
        ({"bands": [0, 1, 2]}, "from 1"),
        ({"value_range": (3, 3)}, "the lower one first"),
        ({"value_range": (0, float("inf"))}, "the lower one first"),
    ],
)
def test_options_that_can_not_be(options, message):
    """Ranges of nothing."""
    with pytest.raises(ValueError, match=message):
        RasterOptions(**options)


def test_bombs(tmp_path, monkeypatch):
    """Small files that take hours or all memory."""
    sparse = {"sparse_ok": True, "tiled": True, "bigtiff": "yes", "compress": "deflate", **UTM}
    sparse["transform"] = rasterio.Affine(*UTM["transform"])
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "photometric": "rgb", **sparse}
    rasterio.open(tmp_path / "endless.tif", "w", width=400_000, height=400_000, **profile).close()
    with pytest.raises(ImageError, match="400,000 x 400,000 pixels, expected at most"):
        open_raster(tmp_path / "endless.tif", windows_above=1)
    rasterio.open(tmp_path / "large.tif", "w", width=40_000, height=40_000, **profile).close()
    raster = open_raster(tmp_path / "large.tif", windows_above=1)
    with pytest.raises(ImageError, match="40,000 x 40,000 pixels, too many .* --tile"):
        raster.whole()
    assert raster.crop((39_900, 39_990, 40_000, 40_000)).size == (100, 10)
    raster.close()
    tiles = profile | {"blockxsize": 16384, "blockysize": 16384}
    rasterio.open(tmp_path / "blocks.tif", "w", width=40_000, height=40_000, **tiles).close()
    with pytest.raises(ImageError, match="blocks of 16384 x 16384, too large"):
        open_raster(tmp_path / "blocks.tif", windows_above=1)


def test_turned_pixels(tmp_path, values):
    """An orientation tag that windows don't follow."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.moveaxis(values, 0, -1)).save(tmp_path / "a.tif", exif=exif)
    assert load_image(tmp_path / "a.tif").size == (90, 130)
    assert open_raster(tmp_path / "a.tif") is None and open_raster(tmp_path / "a.tif", windows_above=0) is None
    with pytest.raises(ImageError, match="orientation tag is 6"):
        open_raster(tmp_path / "a.tif", RasterOptions(bands=[3, 2, 1]))


def test_ground_control_points_are_said(tmp_path, values):
    """A place on a map that is lost without a word."""
    points = [
        rasterio.control.GroundControlPoint(row, column, 9 + column / 100, 50 - row / 100)
        for row, column in ((0, 0), (0, 130), (90, 0), (90, 130))
    ]
    path = write(tmp_path / "a.tif", values, photometric="rgb", gcps=points, crs="EPSG:4326")
    with pytest.warns(Notice, match="ground control points"):
        np.testing.assert_array_equal(read(path)[0], values)


def test_jpeg_2000(tmp_path, values):
    """A format that Sentinel's images have."""
    path = write(tmp_path / "a.jp2", values, driver="JP2OpenJPEG", quality=100, reversible="yes", **UTM)
    raster = open_raster(path)
    assert raster.georeference.transform == UTM["transform"] and "32N" in raster.georeference.crs
    raster.close()
    np.testing.assert_array_equal(read(path)[0], values)


def test_without_rasterio(tmp_path, values, monkeypatch):
    """A georeference that is lost without a word."""
    path = write(tmp_path / "a.tif", values, photometric="rgb", **UTM)
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.warns(Notice, match=r"has a georeference.*san_hf\[polygons\]"):
        assert open_raster(path) is None
    with pytest.raises(ImportError, match="rasterio"):
        open_raster(path, RasterOptions(bands=[3, 2, 1]))
