"""The house's own rules: sizes, private names, one way to write files, and imports that go downwards."""

import ast
import re
from pathlib import Path

import pytest

from tests.packaging.test_sources import ROOT


SOURCES = sorted(
    path
    for folder in ("san_hf", "modeling", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_symlink() and (ROOT / "san_hf" / "modeling") not in path.parents
)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
# Typer reads a command's options off its signature; a model's `forward`, and what Transformers calls with its own
# arguments, have theirs given; a data set has as many options as it has.
MANY_PARAMETERS = {
    "evaluate",
    "export",
    "segment",
    "video",
    "forward",
    "_preprocess_image_like_inputs",
    "load_segmentation_dataset",
}
# Renaming is what publishes a prepared data set whose parts are complete; see `prepare_benchmark`.
MAY_RENAME = {"files.py", "prepare.py", "publish.py"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("san_hf", *parts) if parts[0] == "modeling" else parts
    return ".".join(parts).removesuffix(".__init__")


def imported_modules(path: Path, inside_functions: bool = False) -> set[str]:
    """Modules of the package that a file imports when it is imported, or also when its functions are called."""
    module, found = module_of(path), set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = TREES[path]
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only or (node in late and not inside_functions):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found & {module_of(other) for other in SOURCES} - {module}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path):
    """Catches files, functions and lists of parameters that have grown out of reading."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 450 or path.name == "modeling_san.py", f"{lines} lines"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 130, f"{node.name} has {length} lines"
            arguments = node.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            assert count <= 10 or node.name in MANY_PARAMETERS, f"{node.name} has {count} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_stay_private(path):
    """Catches a module that uses what another one calls its own."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("san_hf")):
            private = [alias.name for alias in node.names if re.match(r"_(?!_)", alias.name)]
            assert not private, f"{node.module}: {private}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_imports_the_package_itself(path):
    """Catches `import san_hf` inside the package, a circle through the package's own `__init__`."""
    if path.parts[len(ROOT.parts)] == "scripts":
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "san_hf" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module != "san_hf" or node.level


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_one_way_to_write_files(path):
    """Catches temporary names made by hand: files appear whole or not at all through `san_hf.files`."""
    text = path.read_text(encoding="utf-8")
    if path.name not in MAY_RENAME:
        assert not re.search(r"\bos\.(replace|rename)\(", text)
    if path.name != "files.py":
        assert not re.search(r"\.part(ial)?\b[\"']|uuid4\(\)\.hex\[:8\]\}\.", text)


def test_data_does_not_import_conversion():
    """Catches data that needs the original's checkpoints to be understood."""
    for path in SOURCES:
        if "data" in path.relative_to(ROOT).parts[:2]:
            assert not any("conversion" in module for module in imported_modules(path, inside_functions=True)), path


def test_imports_go_round_in_no_circle():
    """Catches two files that need each other to be imported."""
    needs = {module_of(path): imported_modules(path) for path in SOURCES}
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for needed in sorted(needs[module]):
                visit(needed, [*way, module])
            done.add(module)

    for module in needs:
        visit(module, [])
