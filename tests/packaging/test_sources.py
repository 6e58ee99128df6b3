"""Rules for the sources that nothing else would notice."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PYTHON_FILES = sorted(
    path
    for folder in ("san_hf", "scripts", "tests", "modeling")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
) + [ROOT / "setup.py"]
MODELING_FILES = sorted(path for path in (ROOT / "modeling").glob("*.py") if path.name != "__init__.py")

# Always there where transformers is: huggingface_hub and safetensors are requirements of its own.
MODELING_MAY_IMPORT = {
    "huggingface_hub",
    "numpy",
    "PIL",
    "safetensors",
    "torch",
    "transformers",
    *sys.stdlib_module_names,
}


def imports(path: Path, optional: bool = True) -> list[tuple[int, str]]:
    """All imports of a file as (level, module); without those inside `try` unless `optional`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attempts = [] if optional else [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    skipped = {inner for attempt in attempts for inner in ast.walk(attempt)}
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_modeling_from_the_root(path):
    """Catches `import modeling`: it works at the root of a checkout, as a second set of classes."""
    assert not [name for level, name in imports(path) if level == 0 and name.split(".")[0] == "modeling"]


@pytest.mark.parametrize("path", MODELING_FILES, ids=lambda path: path.name)
def test_modeling_travels(path):
    """Catches what breaks saving with the code, or loading where only torch and transformers are installed."""
    for level, name in imports(path):
        if level:
            assert level == 1 and name and "." not in name, f"relative imports must be flat: {'.' * level}{name}"
            assert (ROOT / "modeling" / f"{name}.py").exists(), name
        else:
            assert name.split(".")[0] != "san_hf", name
    needed = {name.split(".")[0] for level, name in imports(path, optional=False) if not level}
    assert needed <= MODELING_MAY_IMPORT
    # The files are searched for imports by pattern, so that even prose is taken for one.
    quoted = re.findall(r"^\s*from\s+\.(\S*)\s+import|^\s*import\s+\.(\S+)\s*$", path.read_text(), re.MULTILINE)
    assert len(quoted) == sum(1 for level, _ in imports(path) if level)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_or_host_of_one_machine():
    """Catches absolute paths of somebody's machine and addresses of package registries."""
    paths, hosts = r"(?<![\w.])/(?:work|root|home|Users|opt)/\w", r"(?:pypi|pythonhosted|download\.pytorch)\.org"
    machine = re.compile(f"{paths}|{hosts}|index-url")
    found = []
    for path in tracked_files():
        if path == Path(__file__) or path.is_symlink():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in machine.finditer(text)]
    assert not found


def test_pins_cover_what_is_asked_for():
    """Catches a requirement without a pin: the next installation would draw whatever is newest."""
    pins = {re.split(r"[=;\s]", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open()}
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if getattr(node.func, "id", "") == "setup"]
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    required = ast.literal_eval(options["install_requires"])
    required += [name for extra in ast.literal_eval(options["extras_require"]).values() for name in extra]
    names = {re.split(r"[<>=\[;\s]", name)[0].lower().replace("_", "-") for name in required}
    assert len(names) > 15
    assert names <= pins
