"""Every module can be imported where only what setup.py requires is installed."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys

from tests.packaging.test_sources import ROOT


def requirements() -> list[str]:
    """Names of the distributions in setup.py's install_requires."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    required = next(keyword.value for keyword in call.keywords if keyword.arg == "install_requires")
    return [re.split(r"[<>=]", requirement)[0] for requirement in ast.literal_eval(required)]


def with_dependencies(names: list[str]) -> set[str]:
    """The distributions, and all that they require without extras, normalised."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        waiting += [re.split(r"[\s<>=!~;\[(]", line)[0] for line in requires if "extra ==" not in line]
    return found


def test_every_module_with_the_hard_requirements_alone():
    """Catches an import of an extra (tensorboard, wandb, peft, torchvision, ...) that nobody has to have installed."""
    allowed = with_dependencies(requirements())
    blocked = sorted(
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if module.isidentifier()
        and module not in ("san_hf", "__editable___san_hf_0_1_0_finder", "tests")
        and not any(re.sub(r"[-_.]+", "-", name).lower() in allowed for name in distributions)
    )
    assert {"pytest", "wandb", "peft"} <= set(blocked)
    code = f"""
import importlib, pkgutil, runpy, sys
from pathlib import Path

BLOCKED = set({blocked!r}) | {{"torchvision"}}

class Finder:
    # The finders of before, for which blocked modules are not there.

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *args):
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*args)

sys.meta_path[:] = [Finder(list(sys.meta_path))]
import san_hf
names = [info.name for info in pkgutil.walk_packages(san_hf.__path__, "san_hf.") if "checkpoints" not in info.name]
names = [name for name in names if not name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
for script in Path({str(ROOT)!r}, "scripts").rglob("*.py"):
    sys.path.insert(0, str(script.parent))  # as `python script.py` does
    runpy.run_path(str(script), run_name="imported")
    del sys.path[0]
print(len(names))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80
