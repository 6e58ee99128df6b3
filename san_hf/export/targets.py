"""The targets of an export, a file each, and what has to be installed for them."""

from importlib.util import find_spec
from types import ModuleType

import transformers

from . import to_onnx, to_openvino, to_torch
from .errors import ExportError


TARGETS: dict[str, ModuleType] = {"onnx": to_onnx, "openvino": to_openvino, "torch": to_torch}


def find_target(name: str) -> ModuleType:
    """
    The module of a target, which can be used here.

    Raises:
        ExportError: there is no such target, or what it needs isn't installed.
    """
    if name not in TARGETS:
        raise ExportError(f"Got the target {name!r:.40}, expected one of {', '.join(TARGETS)}.")
    target = TARGETS[name]
    require(target.PACKAGES, target.EXTRA, f"The target {name!r}")
    if find_spec(target.EXPORTER) is None:
        raise ExportError(
            f"transformers {transformers.__version__} has no exporter for the target {name!r} (OpenVINO's came with "
            "5.20): pip install -U transformers"
        )
    return target


def require(packages: tuple[str, ...], extra: str | None, what: str) -> None:
    """
    Raises:
        ExportError: one of the packages isn't installed.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ExportError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'san_hf[{extra}]'")
