"""Label maps out of annotation files that nobody should trust: run-length codes, and MATLAB's variables.

Sizes are compared with the image's before anything is decoded, so that memory is bounded by the image.
"""

import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np

# A text of COCO's: six bits a letter, of which one says whether the number goes on, and one is its sign at its end.
FIRST_LETTER, NUMBER_BITS, GOES_ON, SIGN = 48, 5, 0x20, 0x10
MOST_LETTERS = 7  # 35 bits
MAT_HEADER, MAT_COMPRESSED = 128, 15
# A label map's largest number type, and room for the names and sizes beside it.
MAT_BYTES_PER_PIXEL, MAT_ROOM = 8, 1 << 16
MAT_NUMBERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "single", "double", "logical")


def decode_rle(region: Any, size: tuple[int, int]) -> "np.ndarray":
    """
    A region of COCO's run-length codes: lengths of runs, column by column, of pixels outside and inside in turn.

    Args:
        region: {"size": [height, width], "counts": a list of lengths, or a text of COCO's API}.
        size: the (height, width) that it must have.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: it is none, of another size, or its lengths aren't those of so many pixels.
    """
    import numpy as np

    if not isinstance(region, dict) or not {"size", "counts"} <= set(region):
        raise ValueError(f"a region is {region!r:.60}, expected a run-length code with size and counts")
    if not _same_size(region["size"], size):
        raise ValueError(f"a region has the size {region['size']!r:.40}, its image {list(size)} (height, width)")
    counts = region["counts"]
    if isinstance(counts, str):
        lengths = _read_counts(counts, size[0] * size[1])
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        lengths = counts
    else:
        raise ValueError(f"a region's counts are {counts!r:.40}, expected a text or a list of integers")
    if any(length < 0 for length in lengths) or sum(lengths) != size[0] * size[1]:
        raise ValueError(
            f"a region's counts add up to {sum(lengths):,}"
            f"{', some of them negative' if any(length < 0 for length in lengths) else ''}: expected the image's "
            f"{size[0] * size[1]:,} pixels"
        )
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(size[1], size[0]).T


def _same_size(given: Any, size: tuple[int, int]) -> bool:
    return isinstance(given, list) and all(type(side) is int for side in given) and tuple(given) == size


def _read_counts(text: str, pixels: int) -> list[int]:
    """The lengths in a text of COCO's API: each but the first three as its difference to the last but one."""
    import numpy as np

    if not text or not text.isascii() or not all(0 <= ord(letter) - FIRST_LETTER < 64 for letter in set(text)):
        raise ValueError(f"a region's counts are {text!r:.40}, expected a run-length code of COCO's API")
    if len(text) > MOST_LETTERS * (pixels + 2):
        raise ValueError("a region has more runs than its image has pixels")
    letters = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - FIRST_LETTER
    ends = np.flatnonzero(letters & GOES_ON == 0)
    if not len(ends) or ends[-1] != len(letters) - 1:
        raise ValueError("a region's counts are cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > MOST_LETTERS:
        raise ValueError("a region has a run longer than any image")
    place = np.arange(len(letters)) - np.repeat(starts, length)
    numbers = np.add.reduceat((letters & (GOES_ON - 1)) << (NUMBER_BITS * place), starts)
    numbers -= np.where(letters[ends] & SIGN != 0, np.int64(1) << (NUMBER_BITS * length), 0)
    # Sums within int64: as many numbers of 35 bits as there are in any text that fits into memory.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers.tolist()


def read_mat(file: Path, variable: str, size: tuple[int, int]) -> "np.ndarray":
    """
    A variable of numbers in a MATLAB 5 file.

    Args:
        file: the file.
        variable: its name.
        size: the (height, width) that it must have.

    Raises:
        ValueError: no such file, or the variable isn't in it, is of another kind or size, or isn't all there.
    """
    from scipy.io import loadmat, whosmat

    limit = size[0] * size[1] * MAT_BYTES_PER_PIXEL + MAT_ROOM
    if file.stat().st_size > 2 * limit:
        raise ValueError(f"has {file.stat().st_size:,} bytes, too many for labels of {size[1]} x {size[0]} pixels")
    content = _decompress(file.read_bytes(), limit)
    found = {name: (shape, kind) for name, shape, kind in whosmat(io.BytesIO(content))}
    if variable not in found:
        raise ValueError(f"has no variable {variable}")
    shape, kind = found[variable]
    if kind not in MAT_NUMBERS:
        raise ValueError(f"its {variable} is of the type {kind}, expected numbers")
    if tuple(shape) != size:
        sides = " x ".join(map(str, shape[1::-1] if len(shape) == 2 else shape))
        raise ValueError(f"its {variable} is {sides}, its image {size[1]} x {size[0]} pixels")
    values = loadmat(io.BytesIO(content), variable_names=[variable])[variable]
    if values.dtype.kind == "c":
        raise ValueError(f"its {variable} has complex numbers, expected integers")
    return values


def _decompress(content: bytes, limit: int) -> bytes:
    """A MATLAB 5 file without its compression, of at most so many bytes."""
    order = {b"IM": "little", b"MI": "big"}.get(content[126:MAT_HEADER])
    if order is None:
        raise ValueError("is no MATLAB 5 file")
    position, parts, total = MAT_HEADER, [content[:MAT_HEADER]], 0
    while position < len(content):
        kind, length = (int.from_bytes(content[position + at : position + at + 4], order) for at in (0, 4))  # type: ignore[arg-type]  # one of the two
        end = position + 8 + length
        if end > len(content):
            raise ValueError("is cut short")
        part = content[position:end]
        if kind == MAT_COMPRESSED:
            stream = zlib.decompressobj()
            try:
                part = stream.decompress(part[8:], limit - total)
            except zlib.error as error:
                raise ValueError(f"is damaged ({error})") from error
            if stream.unconsumed_tail:
                raise ValueError(f"unpacks to more than {limit:,} bytes, too many for its image's labels")
            if not stream.eof:
                raise ValueError("is cut short")
        parts.append(part)
        total += len(part)
        position = end
    return b"".join(parts)


def to_ids(values: "np.ndarray", num_ids: int) -> "np.ndarray":
    """
    Numbers of any type as ids.

    Args:
        values: the numbers.
        num_ids: how many ids there are, from 0 on.

    Returns:
        The same shape, int32.

    Raises:
        ValueError: some are no integers, or none of the ids.
    """
    import numpy as np

    # Of floats also nan and infinity; of 64 bits those that 32 bits can't hold.
    wrong = ~((values >= 0) & (values < num_ids))
    if values.dtype.kind == "f":
        wrong |= values != np.floor(np.where(wrong, 0, values))
    if wrong.any():
        from san_hf.messages import join_some

        raise ValueError(
            f"has the values {join_some(np.unique(values[wrong]).tolist())}: expected integers, 0..{num_ids - 1}"
        )
    return values.astype(np.int32)
