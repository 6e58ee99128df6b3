"""
What parquet files claim and hold, compared before any of their contents is unpacked.

The names of fields and their numbers are those of Apache Parquet's parquet.thrift; the encoding of its page headers is
Thrift's compact protocol.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from san_hf.messages import one_line

from .errors import DataError


# Of one group of rows, in bytes: it is unpacked as a whole. Ours have some 10 MB, those of others some 100.
LARGEST_GROUP = 1_000_000_000
MOST_ROWS = 100_000_000
# Of a whole file, how many times its size; images are compressed already and hardly become larger.
LARGEST_EXPANSION = 128
DICTIONARY_PAGE = 2
# Of the header before each page.
LARGEST_HEADER = 1 << 20


class Page(NamedTuple):
    """Size in bytes when unpacked, and whether it is a dictionary, whose values the rows may repeat."""

    size: int
    is_dictionary: bool


def check_parquet(folder: Path) -> None:
    """
    Refuses files below a folder that would become far more than they are.

    Raises:
        DataError: a file claims, or its pages say, that unpacking it takes more than a group of rows may; or it is no
            parquet file. The message names it.
    """
    for path in sorted(folder.rglob("*.parquet")):
        if path.is_file():
            try:
                _check_file(path)
            except DataError as error:
                raise DataError(f"'{path}' {error}. Prepare or get the data set again.") from error
            except Exception as error:  # pyarrow has errors of many kinds for a damaged file
                raise DataError(
                    f"'{path}' is no parquet file, or is damaged: {one_line(error)}. Prepare or get it again."
                ) from error


def _check_file(path: Path) -> None:
    size = path.stat().st_size
    metadata = pq.read_metadata(path)
    if metadata.num_rows > MOST_ROWS:
        raise DataError(f"has {metadata.num_rows:,} rows, expected at most {MOST_ROWS:,}")
    with path.open("rb") as file:
        total = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            unpacked = 0
            for column in (group.column(index) for index in range(group.num_columns)):
                pages = list(_pages(file, column, size))
                dictionary = sum(page.size for page in pages if page.is_dictionary)
                stored = sum(page.size for page in pages)
                # Rows that repeat a value of the dictionary: at worst all of them its largest.
                repeated = (dictionary if column.physical_type == "BYTE_ARRAY" else 16) * column.num_values
                if dictionary and stored + repeated > min(LARGEST_GROUP, LARGEST_EXPANSION * size):
                    if column.physical_type == "BYTE_ARRAY" and stored <= LARGEST_GROUP:
                        repeated = _repeated_bytes(path, number, column.path_in_schema)
                unpacked += max(stored, column.total_uncompressed_size) + repeated
            total += unpacked
            if unpacked > LARGEST_GROUP or total > LARGEST_EXPANSION * size + LARGEST_GROUP:
                raise DataError(
                    f"has {size:,} bytes, and becomes {unpacked:,} or more in its group of rows {number}, {total:,} "
                    f"so far: expected at most {LARGEST_GROUP:,} in a group"
                )


def _repeated_bytes(path: Path, group: int, column: str) -> int:
    """How many bytes all values of a column are, found without making them: each row has the number of its value."""
    with pq.ParquetFile(path, read_dictionary=[column]) as file:
        values = file.read_row_group(group, columns=[column]).column(0)
    total = 0
    for part in values.chunks:
        while pa.types.is_nested(part.type):
            part = part.flatten()[0] if pa.types.is_struct(part.type) else part.flatten()
        part = part if pa.types.is_dictionary(part.type) else part.dictionary_encode()
        lengths = pc.binary_length(part.dictionary).to_numpy(zero_copy_only=False)
        used = part.indices.drop_null().to_numpy(zero_copy_only=False)
        total += int((np.bincount(used, minlength=len(lengths)) * lengths).sum())
    return total


def _pages(file: BinaryIO, column: Any, size: int) -> Iterator[Page]:
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    end = start + column.total_compressed_size
    if not 0 <= start <= end <= size:
        raise DataError(f"has a column of {column.total_compressed_size:,} bytes, which it doesn't hold")
    while start < end:
        file.seek(start)
        header = file.read(min(LARGEST_HEADER, end - start))
        fields, length = _read_struct(header, 0)
        unpacked, packed = fields.get(2), fields.get(3)
        if not (isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 and packed >= 0):
            raise DataError("has a page without a size")
        yield Page(unpacked, fields.get(1) == DICTIONARY_PAGE)
        start += length + packed


def _read_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """A struct's integers by the numbers of their fields, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[position]) != 0:
        position += 1
        if head >> 4:
            number += head >> 4
        else:
            delta, position = _read_varint(data, position)
            number = _signed(delta)
        fields[number], position = _read_value(data, position, head & 15)
    return fields, position + 1


def _read_value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true and false, which have no value of their own
        return kind == 1, position
    if kind == 3:
        return None, position + 1
    if kind in (4, 5, 6):
        value, position = _read_varint(data, position)
        return _signed(value), position
    if kind == 7:
        return None, position + 8
    if kind == 8:
        length, position = _read_varint(data, position)
        return None, position + length
    if kind == 12:
        return None, _read_struct(data, position)[1]
    raise DataError(f"has the header of a page with a field of the unknown kind {kind}")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        value |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if not data[position - 1] & 128:
            return value, position
    raise DataError("has a number of more than 64 bits")


def _signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)
