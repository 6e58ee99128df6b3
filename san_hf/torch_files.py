"""Files of `torch.save`, checked before torch reads them.

`torch.load(weights_only=True)` runs no foreign code, but believes what a file says about sizes: a few bytes can ask for
any amount of memory, be unpacked to it, or have tensors that reach beyond what is stored. Here a file's claims are
compared with what it holds first.
"""

import io
import os
import zipfile
from collections.abc import Collection
from typing import IO, Any

import torch

from san_hf.pickles import Call, Contents, Name, Stored, read_pickle


TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED_DICT = "collections.OrderedDict"
# What may be made: these hold nothing but what the file stores.
CALLS = {TENSOR, PARAMETER, ORDERED_DICT, "torch.Size", "torch.device"}
# Bytes of a number, by the name of its storage's class in module torch.
NUMBER_SIZES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip
# Before its object, a file of torch 1.5 and earlier has a magic number, a version and facts about the machine.
LEGACY_HEADERS = 3


class ForeignObjectError(ValueError):
    """A file that holds objects other than tensors; `name` is one of their classes."""

    def __init__(self, name: str):
        super().__init__(f"it holds objects other than tensors: {name}")
        self.name = name


class Ignored:
    """Stands for an object that isn't needed."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any):
        pass


def load_torch_file(path: str | os.PathLike | io.BytesIO, ignored: Collection[str] = ()) -> Any:
    """
    What a file of `torch.save` holds, on the CPU; memory stays within the file's size. Tensors may be views of the
    file.

    Args:
        path: the file, a zip archive or, of torch 1.5 and earlier, a row of pickles; or what it holds.
        ignored: classes and functions, as "module.name", whose objects are replaced by [`Ignored`].

    Raises:
        ForeignObjectError: it holds objects that are neither tensors nor plain containers, nor to be ignored.
        ValueError: it is none, compressed, damaged, or says something of its tensors that isn't so.
    """
    with path if isinstance(path, io.BytesIO) else open(path, "rb") as stream:
        zipped, size = zipfile.is_zipfile(stream), stream.seek(0, os.SEEK_END)
        stream.seek(0)
        contents, sizes = _read_archive(stream, size) if zipped else _read_legacy(stream)
        _check_calls(contents, ignored)
        _check_tensors(contents, sizes, size)
        if isinstance(path, io.BytesIO):
            return _load(path, ignored, mmap=False)
    # Files older than torch 1.6 are no zip archives and can't be mapped into memory.
    return _load(path, ignored, mmap=zipped)


def _load(source: str | os.PathLike | io.BytesIO, ignored: Collection[str], mmap: bool) -> Any:
    if isinstance(source, io.BytesIO):
        source.seek(0)
    with torch.serialization.safe_globals([(Ignored, name) for name in ignored]):
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _read_archive(file: IO[bytes], size: int) -> tuple[Contents, dict[str, int]]:
    """What the archive's pickle says, and the size in bytes of each stored tensor, by its key."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("it is compressed, which torch's files never are")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its parts are larger than the file")
        # torch itself doesn't look at the checksums that it has written.
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its part {damaged} isn't as it was written")
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} parts data.pkl, expected one")
        folder = pickles[0].filename.removesuffix("data.pkl") + "data/"
        sizes: dict[str, int] = {}
        for record in records:
            if record.filename.startswith(folder):
                if record.filename in sizes:
                    raise ValueError(f"it has two parts {record.filename}")
                sizes[record.filename.removeprefix(folder)] = record.file_size
        with archive.open(pickles[0]) as stream:
            return read_pickle(stream), sizes


def _read_legacy(file: IO[bytes]) -> tuple[Contents, None]:
    for _ in range(LEGACY_HEADERS):
        read_pickle(file)
    return read_pickle(file), None


def _check_calls(contents: Contents, ignored: Collection[str]) -> None:
    for name in contents.names:
        if name.module.split(".")[0] not in ("torch", "collections") and _full(name) not in ignored:
            raise ForeignObjectError(_full(name))
    for call in contents.calls:
        if not isinstance(call.function, Name) or _full(call.function) not in CALLS | set(ignored):
            raise ForeignObjectError(_full(call.function) if isinstance(call.function, Name) else "a nameless one")
        if _full(call.function) == ORDERED_DICT and call.arguments:
            raise ValueError("an ordered dictionary with arguments")
        # Only methods of what is ignored, too.
        if _full(call.function) == "builtins.getattr" and not isinstance(call.arguments[0], Name):
            raise ForeignObjectError("builtins.getattr")


def _check_tensors(contents: Contents, sizes: dict[str, int] | None, file_size: int) -> None:
    """Each tensor is within what is stored for it, and that is in the file."""
    stored: dict[str, int] = {}
    for item in contents.stored:
        key, size = _storage(item)[0], _storage_bytes(item)
        if sizes is not None and sizes.get(key) != size:
            raise ValueError(f"a tensor of {size:,} bytes, of which the file holds {sizes.get(key, 0):,}")
        stored[key] = size
    if sum(stored.values()) > file_size:
        raise ValueError(f"tensors of {sum(stored.values()):,} bytes in a file of {file_size:,}")
    for call in contents.calls:
        if _full(call.function) == TENSOR:
            _check_extent(call)


def _check_extent(call: Call) -> None:
    storage, offset, shape, strides = call.arguments[:4]
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, Stored) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor without a shape")
    if len(shape) != len(strides):
        raise ValueError("a tensor with other strides than sides")
    if 0 not in shape:
        end = offset + sum((side - 1) * stride for side, stride in zip(shape, strides)) + 1
        if end > _storage(storage)[1]:
            raise ValueError(f"a tensor of {end:,} numbers, of which the file holds {_storage(storage)[1]:,}")


def _storage(item: Stored) -> tuple[str, int]:
    """The key of what is stored, and how many numbers it has."""
    match item.key:
        case ("storage", Name(), str(key), str(), int(count), *view) if count >= 0 and view in ([], [None]):
            return key, count
    raise ValueError("a tensor that is stored in no known way")


def _storage_bytes(item: Stored) -> int:
    name = item.key[1]
    if name.name not in NUMBER_SIZES:
        raise ForeignObjectError(_full(name))
    return item.key[4] * NUMBER_SIZES[name.name]


def _full(name: Name) -> str:
    """As Python 3 calls it."""
    return f"{'builtins' if name.module == '__builtin__' else name.module}.{name.name}"
