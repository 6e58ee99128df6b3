"""Prints the oldest version that setup.py allows of each requirement, as pins for pip. Needs nothing installed.

python scripts/oldest_requirements.py > oldest.txt
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def oldest_requirements() -> list[str]:
    """Lines such as "transformers==5.17"; of torch the version in constraints.txt."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    required = ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == "install_requires"))
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pins = [requirement.replace(">=", "==") for requirement in required]
    return [torch.group() if torch and pin.startswith("torch==") else pin for pin in pins]


if __name__ == "__main__":
    print("\n".join(oldest_requirements()))
