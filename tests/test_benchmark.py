"""The benchmark of speed and memory, on its tiny model: every row runs, and ours and the plain form agree."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module; its neighbours are found as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    names = ("inference", "cases", "photos", "plain")
    yield importlib.import_module("inference")
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(benchmark, tmp_path, *arguments) -> list[dict]:
    file = tmp_path / "rows.json"
    options = ["--model", "tiny", "--threads", "1", "--repeats", "1", "--images", "2", "--json", file, *arguments]
    benchmark.main(list(map(str, options)))
    return json.loads(file.read_text())


def test_all_rows_agree(benchmark, tmp_path, capsys):
    """Catches a row that doesn't run any more, a plain form that is another function, and rows left out."""
    fast = [what for what in benchmark.CASES if what != "text-again"]  # which starts processes: below
    rows = run(benchmark, tmp_path, "--what", *fast, "--classes", 30, "--no-peak")
    assert [row["what"] for row in rows] == fast
    for row in rows:
        assert tuple(row) == benchmark.KEYS
        assert row["agrees"], row
        assert row["ratio"] == pytest.approx(row["plain_s"] / row["ours_s"], rel=0.01)
        assert row["classes"] == (None if row["what"] == "forward" else 30) and row["peak_bytes"] is None
    assert benchmark.table(rows) in capsys.readouterr().out
