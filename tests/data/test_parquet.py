"""Prepared sets whose parquet becomes far more than it is."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from san_hf.data import DataError
from san_hf.data.parquet_files import check_parquet


PART = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("image", PART), ("label", PART), ("file_name", pa.string())])


def write(file, contents, **options):
    rows = [
        {"image": {"bytes": content, "path": None}, "label": {"bytes": b"y", "path": "y"}, "file_name": f"{number}"}
        for number, content in enumerate(contents)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, **options)


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_one_value_in_many_rows(monkeypatch, tmp_path, compression):
    """Catches a dictionary whose one value all rows repeat: its footer speaks of that value alone."""
    monkeypatch.setattr("san_hf.data.parquet_files.LARGEST_GROUP", 3_000_000)
    write(tmp_path / "a.parquet", [b"x" * 200_000] * 100, compression=compression)
    assert pq.read_metadata(tmp_path / "a.parquet").row_group(0).total_byte_size < 300_000
    with pytest.raises(DataError, match=r"a.parquet' has .* bytes, and becomes 20,.* in its group of rows 0"):
        check_parquet(tmp_path)


def test_pages_that_expand(monkeypatch, tmp_path):
    """Catches a file of zeros that are compressed a thousand times, also where its footer says that they are few."""
    monkeypatch.setattr("san_hf.data.parquet_files.LARGEST_GROUP", 3_000_000)
    file = tmp_path / "a.parquet"
    write(file, [bytes(1_000_000 + number) for number in range(5)], compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"becomes 5,000,\d+ or more"):
        check_parquet(tmp_path)
    said = pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size

    def varint(value, length):
        value, parts = value << 1, []
        for _ in range(length):
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts[:-1], parts[-1] & 127])

    content = file.read_bytes()
    true = varint(said, 4)
    assert content.count(true) >= 1
    file.write_bytes(content.replace(true, varint(99, 4)))
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 99
    with pytest.raises(DataError, match=r"becomes 5,000,\d+ or more"):
        check_parquet(tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"row_group_size": 7}]
)
def test_ordinary_files_pass(tmp_path, options):
    """Catches limits that refuse sets of images, with and without dictionaries, of each kind of page."""
    write(tmp_path / "a.parquet", [bytes([number]) * 40_000 for number in range(50)], **options)
    check_parquet(tmp_path)


def test_what_is_no_parquet(tmp_path):
    """Catches a stack trace of pyarrow's."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing PAR1")
    with pytest.raises(DataError, match="a.parquet' is no parquet file, or is damaged"):
        check_parquet(tmp_path)
