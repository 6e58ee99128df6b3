"""A segmentation in the forms that other libraries read.

Coordinates are those of Pillow and COCO: x to the right and y down, in pixels, a pixel's edges at integers, so that a
mask of the whole image is the rectangle from (0, 0) to (width, height). Pixels that are "other" belong to no class.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from san_hf.extras import import_extra
from san_hf.rasters import Georeference


if TYPE_CHECKING:
    import pandas
    import rasterio
    import shapely
    import supervision

    from san_hf.inference.large import SegmentedFile
    from san_hf.inference.segmentation import Segmentation

# Pixels, between corners of outlines that are moved to another map.
_LONGEST_EDGE = 100


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run-length code of a mask, (H, W) boolean: {"size": [H, W], "counts": text}."""
    from pycocotools import mask as coco_mask

    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def labels_present(segmentation: "Segmentation") -> list[int]:
    """Labels that have pixels, ascending, without "other"."""
    return [entry["label"] for entry in _classes(segmentation) if entry["pixels"]]


def trace_polygons(segmentation: "Segmentation", tolerance: float = 0.0) -> "dict[str, shapely.MultiPolygon]":
    """
    The regions of each class that is present, by its name; see [`Segmentation.polygons`].

    Raises:
        ValueError: a negative tolerance.
        MissingPackageError: without rasterio and shapely.
    """
    shapes = trace_labels(segmentation.label_map, labels_present(segmentation), tolerance)
    return {segmentation.class_names[label]: shape for label, shape in shapes.items()}


def trace_labels(
    label_map: "np.ndarray | rasterio.Band", labels: Sequence[int], tolerance: float = 0.0
) -> "dict[int, shapely.MultiPolygon]":
    """
    The regions of labels, in pixels. Memory grows with their outlines; a map in a file is read line by line.

    Args:
        label_map: (H, W) uint8 or uint16; or a band of a raster file.
        labels: that are looked for.
        tolerance: see [`Segmentation.polygons`].

    Raises:
        ValueError: a negative tolerance.
        MissingPackageError: without rasterio and shapely.
    """
    if not tolerance >= 0:
        raise ValueError(f"Got tolerance={tolerance}, expected pixels, at least 0.")
    features = import_extra("rasterio.features", "polygons", "Tracing polygons")
    rasterio = import_extra("rasterio", "polygons", "Tracing polygons")
    shapely = import_extra("shapely", "polygons", "Tracing polygons")
    regions: dict[int, list[Any]] = {label: [] for label in labels}
    # In pixels, wherever a file lies on a map. Regions whose pixels share edges: where corners alone touch, rings would
    # cross themselves.
    for outline, label in features.shapes(label_map, connectivity=4, transform=rasterio.Affine.identity()):
        if int(label) in regions:
            region = shapely.make_valid(shapely.geometry.shape(outline))
            regions[int(label)].append(shapely.simplify(region, tolerance) if tolerance else region)
    return {
        label: shapely.MultiPolygon([part for region in found for part in _polygons_of(region)])
        for label, found in regions.items()
    }


def to_coco(
    segmentation: "Segmentation",
    *,
    file_name: str = "",
    image_id: int = 1,
    polygons: bool = False,
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """See [`Segmentation.to_coco`]."""
    shapes = trace_polygons(segmentation, tolerance) if polygons else {}
    annotations: list[dict[str, Any]] = []
    for entry in _classes(segmentation):
        if not entry["pixels"]:
            continue
        mask = segmentation.label_map == entry["label"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        if polygons:
            parts = [part for polygon in shapes[entry["name"]].geoms for part in _without_holes(polygon)]
            code: Any = [np.asarray(part.exterior.coords)[:-1].ravel().tolist() for part in parts]
        else:
            code = encode_mask(mask)
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
        annotations.append(_annotation(entry, code, box, image_id) | _score(segmentation, mask))
    return _coco_data_set(annotations, _classes(segmentation), segmentation, file_name, image_id)


def coco_of_parts(
    parts: Iterable[np.ndarray],
    segmentation: "SegmentedFile",
    classes: Sequence[Mapping[str, Any]],
    file_name: str = "",
) -> dict[str, Any]:
    """
    A data set of one image in COCO's format, with run-length codes. Memory grows with the outlines.

    Args:
        parts: of the label map from the left, (H, columns) uint8 or uint16 each.
        segmentation: whose size and scores are those of the image.
        classes: the legend's entries, without "other".
        file_name: see [`Segmentation.to_coco`].

    Raises:
        ValueError: more pixels than COCO's codes can count.
    """
    from pycocotools import mask as coco_mask

    size = segmentation.height, segmentation.width
    if (total := size[0] * size[1]) >= 2**32:
        raise ValueError(f"COCO's codes count up to {2**32 - 1:,} pixels, and this image has {total:,}: use geojson.")
    # Runs of one label, down one column after the other.
    starts, labels, offset = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for part in parts:
        pixels = part.T.ravel()
        changes = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
        starts.append(changes + offset)
        labels.append(pixels[changes].astype(np.int64))
        offset += len(pixels)
    all_starts, all_labels = np.concatenate(starts), np.concatenate(labels)
    begins = np.append(True, all_labels[1:] != all_labels[:-1])  # where two parts meet, a run may go on
    all_starts, all_labels = all_starts[begins], all_labels[begins]
    ends = np.append(all_starts[1:], total)
    annotations: list[dict[str, Any]] = []
    for entry in classes:
        if not entry["pixels"]:
            continue
        own = all_labels == entry["label"]
        # How many are not, how many are, and so on.
        edges = np.stack([all_starts[own], ends[own]], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=[] if edges[-1] == total else total)
        (code,) = coco_mask.frPyObjects([{"size": list(size), "counts": counts.tolist()}], *size)
        box = [int(side) for side in coco_mask.toBbox(code)]
        code = {"size": list(size), "counts": code["counts"].decode("ascii")}
        scores = segmentation.scores
        score = {"score": scores[entry["label"]]} if scores else {}
        annotations.append(_annotation(entry, code, box, 1) | score)
    return _coco_data_set(annotations, classes, segmentation, file_name, 1)


def _annotation(entry: Mapping[str, Any], code: Any, box: list[int], image_id: int) -> dict[str, Any]:
    """Of a class, without its number."""
    facts = {"image_id": image_id, "category_id": entry["label"] + 1, "segmentation": code}
    return {"id": 0, **facts, "area": entry["pixels"], "bbox": box, "iscrowd": 0}


def _coco_data_set(
    annotations: list[dict[str, Any]],
    classes: Sequence[Mapping[str, Any]],
    segmentation: "Segmentation | SegmentedFile",
    file_name: str,
    image_id: int,
) -> dict[str, Any]:
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    image = {"id": image_id, "file_name": file_name, "width": segmentation.width, "height": segmentation.height}
    categories = [{"id": entry["label"] + 1, "name": entry["name"]} for entry in classes]
    return {"images": [image], "annotations": annotations, "categories": categories}


def to_geojson(
    segmentation: "Segmentation",
    *,
    tolerance: float = 0.0,
    transform: Sequence[float] | None = None,
    crs: str | None = None,
) -> dict[str, Any]:
    """See [`Segmentation.to_geojson`]."""
    shapes = trace_labels(segmentation.label_map, labels_present(segmentation), tolerance)
    entries = {
        entry["label"]: entry | _score(segmentation, segmentation.label_map == entry["label"])
        for entry in _classes(segmentation)
        if entry["pixels"]
    }
    return geojson_of(shapes, entries, segmentation.georeference, transform, crs)


def geojson_of(
    shapes: "Mapping[int, shapely.MultiPolygon]",
    properties: Mapping[int, Mapping[str, Any]],
    georeference: Georeference | None = None,
    transform: Sequence[float] | None = None,
    crs: str | None = None,
) -> dict[str, Any]:
    """
    A GeoJSON collection of shapes in pixels.

    Args:
        shapes, properties: by label; there is a feature for each of `properties`.
        georeference, transform, crs: see [`Segmentation.to_geojson`].
    """
    if transform is not None and len(transform) != 6:
        raise ValueError(f"Got a transform of {len(transform)} numbers, expected 6: x = a column + b row + c, then y.")
    shapely = import_extra("shapely", "polygons", "GeoJSON")
    import_extra("shapely.affinity", "polygons", "GeoJSON")
    to_degrees = None
    if transform is None and crs is None and georeference is not None:
        transform, to_degrees = georeference.transform, georeference.crs
    features = []
    for label, entries in properties.items():
        shape = shapes[label]
        if to_degrees is not None:
            # A straight line on one map is none on another: what is long gets corners in between.
            shape = shapely.segmentize(shape, _LONGEST_EDGE)
        if transform is not None:
            a, b, c, d, e, f = transform
            shape = shapely.affinity.affine_transform(shape, [a, b, d, e, c, f])
        if to_degrees is not None:
            shape = _in_degrees(shape, to_degrees)
        # Outer rings counterclockwise, as RFC 7946 wants it.
        shape = shapely.MultiPolygon([shapely.geometry.polygon.orient(polygon) for polygon in _polygons_of(shape)])
        features.append({"type": "Feature", "properties": dict(entries), "geometry": shapely.geometry.mapping(shape)})
    reference = {} if crs is None else {"crs": {"type": "name", "properties": {"name": crs}}}
    return {"type": "FeatureCollection", **reference, "features": features}


def _in_degrees(shape: "shapely.MultiPolygon", crs: str) -> "shapely.MultiPolygon":
    """A shape of a map in longitude and latitude of WGS 84."""
    import shapely
    from rasterio.warp import transform

    def convert(points: np.ndarray) -> np.ndarray:
        longitudes, latitudes = transform(crs, "EPSG:4326", *points.T)
        return np.stack([longitudes, latitudes], axis=-1)

    return shapely.transform(shape, convert)


def to_supervision(segmentation: "Segmentation") -> "supervision.Detections":
    """See [`Segmentation.to_supervision`]."""
    supervision = import_extra("supervision", "supervision", "Segmentation.to_supervision")
    labels = np.array(labels_present(segmentation), dtype=int)
    masks = segmentation.label_map == labels[:, None, None]  # (n, H, W)
    scores = [_score(segmentation, mask).get("score") for mask in masks]
    return supervision.Detections(
        xyxy=supervision.mask_to_xyxy(masks) if len(labels) else np.zeros((0, 4)),
        mask=masks,
        class_id=labels,
        confidence=np.array(scores, dtype=np.float32) if segmentation.confidence is not None else None,
        data={"class_name": np.array([segmentation.class_names[label] for label in labels], dtype=str)},
    )


def to_dataframe(segmentation: "Segmentation") -> "pandas.DataFrame":
    """See [`Segmentation.to_dataframe`]."""
    import pandas

    rows = [entry | _score(segmentation, segmentation.label_map == entry["label"]) for entry in segmentation.legend()]
    return pandas.DataFrame(rows)


def _classes(segmentation: "Segmentation") -> list[dict[str, Any]]:
    """The legend without "other"."""
    return segmentation.legend()[: len(segmentation.class_names) - segmentation.expanded]


def _score(segmentation: "Segmentation", mask: np.ndarray) -> dict[str, float]:
    """The mean confidence of a mask's pixels, where there is one."""
    if segmentation.confidence is None or not mask.any():
        return {}
    return {"score": float(segmentation.confidence[mask].mean())}


def _polygons_of(shape: Any) -> "list[shapely.Polygon]":
    """The polygons of a shape, which may be a collection."""
    if shape.geom_type == "Polygon":
        return [] if shape.is_empty else [shape]
    return [polygon for part in getattr(shape, "geoms", ()) for polygon in _polygons_of(part)]


def _without_holes(polygon: "shapely.Polygon") -> "Iterator[shapely.Polygon]":
    """A polygon cut into some without holes: COCO's have none."""
    if not polygon.interiors:
        yield polygon
        return
    import shapely

    left, bottom, right, top = polygon.bounds
    middle = shapely.Polygon(polygon.interiors[0]).centroid.x
    for low, high in ((left, middle), (middle, right)):
        for part in _polygons_of(polygon.intersection(shapely.box(low, bottom, high, top))):
            yield from _without_holes(part)
