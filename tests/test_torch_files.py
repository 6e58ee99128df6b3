"""Pickles and checkpoints that say more than they hold: read within their size, or refused."""

import collections
import io
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from san_hf.pickles import Call, Name, read_pickle
from san_hf.torch_files import ForeignObjectError, Ignored, load_torch_file


class Foreign:
    """A class that a file asks for by name: what it would do is of no interest, as it is never imported."""

    def __init__(self, name: str, *arguments):
        self.name, self.arguments = name, arguments

    def __reduce__(self):
        function = type(self.name.rpartition(".")[2], (), {})
        function.__module__ = self.name.rpartition(".")[0]
        return function, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_in_a_pickle(protocol):
    """Catches a value that comes out as another one than Python's own unpickler gives, and a stream left elsewhere."""
    shared = ["x", -1, 2**70, 1.5, True, None, ("a",), (), ("a", "b", "c", 4)]
    value = {"a": shared, "b": shared, 3: {"ü\n": [[], {}]}, "long": "z" * 70_000, "wide": list(range(2000))}
    stream = io.BytesIO(pickle.dumps(value, protocol) + pickle.dumps("next", protocol))
    contents = read_pickle(stream)
    assert contents.value == value and contents.value["a"] is contents.value["b"]
    assert not contents.names and not contents.calls
    assert read_pickle(stream).value == "next"
    made = read_pickle(io.BytesIO(pickle.dumps([collections.OrderedDict(a=1), b"12"], protocol)))
    assert Name("collections", "OrderedDict") in made.names
    assert any(isinstance(item, Call) for item in made.value)


def laughs(depth: int) -> bytes:
    """A tuple of tuples of tuples ... as a key: its hash takes 2 ** depth steps."""
    return b"\x80\x04}" + b")\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(depth)) + b"Ns."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"]r\xff\xff\xff\x7f",  # a memo of two thousand million entries
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
        b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N",
        laughs(100),
        b"\x80\x04\x8f(K\x01\x90.",  # a set
        b"(lp0\n0.",
        b"\x82\x01.",  # an extension
        b"a.",
        b"0.",
        b"h\x05.",
        b"}(K\x01u.",
        b"I" + b"9" * 5000 + b"\n.",
    ],
)
def test_pickles_that_are_none(content):
    """Catches memory for what a few bytes announce, a hash that takes for ever, and errors of other kinds."""
    with pytest.raises(ValueError, match="not a pickle of data"):
        read_pickle(io.BytesIO(content))


def archive(path: Path, obj, change=None, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """A file of torch.save whose pickle, and perhaps other parts, are changed."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl") and change is not None:
                assert change[0] in content
                content = content.replace(*change)
            new.writestr(record.filename, more.get(record.filename.rpartition("/")[2], content))
    return path


def test_files_that_torch_writes(tmp_path):
    """Catches tensors, views, parameters and precisions that are refused or come out otherwise."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "view": base[1:, ::2], "transposed": base.T, "expanded": torch.tensor(3.0).expand(1000, 1000),
        "empty": torch.empty(0, 5), "scalar": torch.tensor(1.0), "parameter": torch.nn.Parameter(torch.ones(2)),
        **{str(kind): torch.ones(3).to(kind) for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int64,
           torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)},
    }  # fmt: skip
    content = {"model": collections.OrderedDict(tensors), "step": 3, "groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    for new in (True, False):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        loaded = load_torch_file(tmp_path / "x.pth")
        assert {key: loaded[key] for key in ("step", "groups")} == {key: content[key] for key in ("step", "groups")}
        for key, tensor in tensors.items():
            assert torch.equal(loaded["model"][key], tensor) and loaded["model"][key].dtype == tensor.dtype


def test_objects_that_are_ignored(tmp_path):
    """Catches training state that keeps a checkpoint from being read, and that which is imported all the same."""
    state = Foreign("some.where.History", np.float64(1.5), np.arange(3))
    torch.save({"a": torch.ones(2), "log": state}, tmp_path / "x.pth", pickle_module=FakePickle)
    with pytest.raises(ForeignObjectError):
        load_torch_file(tmp_path / "x.pth")
    names = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    names += ["numpy.ndarray", "numpy.dtype", "_codecs.encode", "some.where.History"]
    loaded = load_torch_file(tmp_path / "x.pth", names)
    assert torch.equal(loaded["a"], torch.ones(2)) and isinstance(loaded["log"], Ignored)
    assert "some" not in sys.modules


class FakePickle:
    """Pickles classes by name alone, also those that can't be imported here."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj.__module__.startswith("some."):
                self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = {**pickle._Pickler.dispatch, type: save_global}

    dumps, dump, load = pickle.dumps, pickle.dump, pickle.load


FOUR = b"X\x03\x00\x00\x00cpuq\x06K\x04t"  # numbers of the only storage
CLAIMS = {
    "storage": ((FOUR, b"X\x03\x00\x00\x00cpuq\x06J\x00\x00\x00\x7ft"), "of which the file holds 16"),
    "smaller storage": ((FOUR, b"X\x03\x00\x00\x00cpuq\x06K\x03t"), "of which the file holds 16"),
    "negative storage": ((FOUR, b"X\x03\x00\x00\x00cpuq\x06J\x00\x00\x00\xfft"), "stored in no known way"),
    "shape": ((b"K\x04\x85", b"J\x00\x00\x00\x7f\x85"), "a tensor of 2,130,706,432 numbers"),
    "offset": ((b"QK\x00K\x04", b"QK\x01K\x04"), "a tensor of 5 numbers"),
    "stride": ((b"K\x01\x85", b"K\x02\x85"), "a tensor of 7 numbers"),
    "other type": ((b"FloatStorage", b"DoubleStorage"), "of which the file holds 16"),
    "another function": ((b"_rebuild_tensor_v2", b"_rebuild_qtensor"), "objects other than tensors"),
    "called class": ((b"torch._utils\n_rebuild_tensor_v2", b"torch\nTensor"), "objects other than tensors"),
    "code": ((b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem"), "os.system"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_of_an_archive(tmp_path, claim):
    """Catches tensors made of memory that the file doesn't have: gigabytes of it, or what lies beside it."""
    change, message = CLAIMS[claim]
    file = archive(tmp_path / "x.pth", {"a": torch.arange(4.0)}, change)
    with pytest.raises(ValueError, match=message):
        load_torch_file(file)


def test_compressed_archives(tmp_path):
    """Catches a few kilobytes that become gigabytes, and compressed bytes that are read as a tensor's numbers."""
    tensors = {"a": torch.zeros(4_000_000)}
    file = archive(tmp_path / "x.pth", tensors, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    with pytest.raises(ValueError, match="it is compressed"):
        load_torch_file(file)
    with pytest.raises(ValueError, match="of which the file holds 4"):
        load_torch_file(archive(tmp_path / "y.pth", tensors, **{"0": b"1234"}))


def test_a_bytearray_of_a_terabyte(tmp_path):
    """Catches memory that torch's own reader gives to whoever asks for it."""
    file = archive(
        tmp_path / "x.pth", {"a": torch.ones(4)}, (b".", b"0cbuiltins\nbytearray\n\x8a\x06" + b"\0" * 5 + b"\1\x85R.")
    )
    with pytest.raises(ValueError):
        load_torch_file(file)


def test_claims_of_a_file_of_an_old_torch(tmp_path):
    """Catches memory for numbers that an old file announces and doesn't have."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pth").read_bytes()
    start = content.index(b"X\x03\x00\x00\x00cpu")
    changed = content[:start] + content[start:].replace(b"K\x04", b"J\x00\x00\x00\x7f", 1)
    (tmp_path / "x.pth").write_bytes(changed)
    with pytest.raises(ValueError, match="tensors of 8,522,825,728 bytes in a file of"):
        load_torch_file(tmp_path / "x.pth")
