"""Packages that only some functions need."""

import importlib
from types import ModuleType


class MissingPackageError(ImportError, RuntimeError):
    """A package that isn't among the requirements and is needed now; the message says how to install it."""


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """
    A module of an optional requirement.

    Args:
        module: its full name.
        extra: of setup.py, which lists its package.
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        MissingPackageError: it isn't installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise  # a package of its own that is missing
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which isn't installed: pip install 'san_hf[{extra}]'"
        ) from error
