"""Writes the page of all public names, `san_hf/README.md`, from the packages' `__all__` and docstrings.

python scripts/make_api_page.py
"""

import importlib
import inspect
from pathlib import Path

from san_hf.files import write_file


PAGE = Path(__file__).resolve().parents[1] / "san_hf" / "README.md"
# In the order of an image's way: the package itself first, then the model, inference, data, training, evaluation.
PACKAGES = (
    "san_hf",
    "san_hf.modeling",
    "san_hf.inference",
    "san_hf.export",
    "san_hf.data",
    "san_hf.training",
    "san_hf.evaluation",
    "san_hf.conversion",
    "san_hf.hub",
    "san_hf.vocabularies",
)
# What has no docstring of its own, or one that depends on what is installed.
DESCRIPTIONS = {
    "__version__": "The package's version.",
    "BENCHMARKS": "The benchmarks SAN is trained and measured on, by name.",
    "EXPANSIONS": "What a caller's classes can be expanded by: names of vocabularies, by what to call them.",
    "HUB_REPO": "The repository of the released checkpoints on the Hub.",
    "RELEASES": "The released checkpoints, by name.",
    "SANImageProcessor": "Image processor of SAN: pixels in, label maps out; on torchvision where that is installed.",
    "SANImageProcessorPil": "Image processor of SAN, on PIL and NumPy.",
    "VOCABULARIES": "Names of the class lists that come with the package.",
}


def first_paragraph(name: str, value: object) -> str:
    """
    The first paragraph of a docstring, in one line.

    Raises:
        ValueError: there is none.
    """
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    text = inspect.getdoc(value)
    if not text:
        raise ValueError(f"{name} has no docstring: every public name needs one.")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.replace("|", "\\|")


def kind(value: object) -> str:
    if inspect.isclass(value):
        return "error" if issubclass(value, Exception) else "class"
    return "function" if callable(value) else "constant"


def render() -> str:
    """The page, Markdown."""
    parts = [
        "# Public names\n\nEvery name of a package's `__all__`, with the first lines of its docstring. Written by "
        "`python scripts/make_api_page.py`; a test compares it with the code. All pages: the table in "
        "[README.md](../README.md)."
    ]
    for package in PACKAGES:
        module = importlib.import_module(package)
        rows = []
        for name in sorted(module.__all__, key=str.lower):
            value = getattr(module, name)
            rows.append(f"| `{name}` | {kind(value)} | {first_paragraph(name, value)} |")
        parts.append(f"## `{package}`\n\n| name | | what it is |\n|:--|:--|:--|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_file(PAGE, render())
