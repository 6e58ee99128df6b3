"""modeling/README.md, which says where in the code each stage of the method is."""

import ast
import re
from pathlib import Path


FOLDER = Path(__file__).parents[2] / "modeling"


def test_names_on_the_page_exist():
    """A stage that has moved to another file, or got another name."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[-2] for line in page.splitlines() if line.startswith("| ") and ".py`" in line]
    found = [
        (file, name)
        for row in rows
        for file, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, (?!`\w+\.py))?)+)", row)
        for name in re.findall(r"`(\w+)`", names)
    ]
    assert len(rows) == 11 and len(found) >= 14
    for file, name in found:
        tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{name} isn't in {file}"
