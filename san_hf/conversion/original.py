"""Reading a checkpoint in the original's layout, which is a pickle that nobody should trust."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from san_hf.loading import foreign_content
from san_hf.messages import join_some, one_line
from san_hf.torch_files import ForeignObjectError, load_torch_file

from .errors import ConversionError
from .mmsegmentation import PREFIXES, UNUSED, original_form, original_name


# Training state beside the tensors: mmengine's log, and NumPy's numbers and arrays.
TRAINING_STATE = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # of its methods
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    *(
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    ),
)


def read_original(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint in the original's layout, on the CPU, in the precision it was stored in.

    Only tensors and plain containers are unpickled (torch's `weights_only`): a file that holds code is refused. The
    state dict may be at the top level or under `model` or `state_dict`, with training state beside it; its names may
    begin with "module.", as DistributedDataParallel has them, or be those of mmsegmentation's SAN. Tensors may be views
    of the file: copy before the file changes.

    Args:
        path: a `.pth` file, or a `.safetensors` file with the same names in it.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ConversionError: a truncated or damaged file, one that holds code, or one that is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder: expected a checkpoint file in the original's layout (.pth).")
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint '{path}'.")
    content = _load(path)
    if isinstance(content, Mapping):
        for nest in ("model", "state_dict"):
            if isinstance(content.get(nest), Mapping):
                content = content[nest]
                break
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"'{path}' holds {_describe(content)}: expected a state dict of the original SAN.")
    not_tensors = [
        key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if not_tensors:
        raise ConversionError(
            f"'{path}' is no state dict of the original SAN: {join_some(not_tensors)} "
            f"{'is' if len(not_tensors) == 1 else 'are'} not tensors."
        )
    return original_names(content)


def original_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A state dict of the original SAN, of the original under DistributedDataParallel, or of mmsegmentation's SAN, under
    the original's names.

    Raises:
        ConversionError: two tensors of the same name.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        name = key
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in UNUSED:
            continue
        if name.startswith(PREFIXES):
            name, tensor = original_name(name), original_form(name, tensor)
        if name in renamed:
            raise ConversionError(f"The state dict has {name} twice, once as {key}: expected each tensor once.")
        renamed[name] = tensor
    return renamed


def _load(path: Path):
    # A missing permission is an error of its own here; below, OSError means a damaged archive.
    if problem := foreign_content(path):
        raise ConversionError(f"'{path}' {problem}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return load_torch_file(path, ignored=TRAINING_STATE)
    except ForeignObjectError as error:
        raise ConversionError(
            f"'{path}' is refused: beside tensors it holds Python objects ({error.name}), which could run code when "
            "loaded. Where you trust it, load it yourself and save its tensors alone: torch.save(state_dict, ...)."
        ) from error
    except Exception as error:  # a damaged file can fail in any way at all
        raise ConversionError(
            f"'{path}' can't be read as a checkpoint: it is truncated, damaged, or something else altogether "
            f"({one_line(error)}). Compare its size and checksum with its publisher's, and download it again."
        ) from error


def _describe(content) -> str:
    return f"an empty {type(content).__name__}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
