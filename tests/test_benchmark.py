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
    names = ("inference", "agreement", "cases", "photos", "plain", "runtimes")
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


def test_half_precision_and_8_bits(benchmark, tmp_path):
    """Catches rows of inexact arithmetic that are compared as if they were exact."""
    (row,) = run(benchmark, tmp_path, "--what", "image", "--classes", 30, "--no-peak", "--dtype", "bfloat16")
    assert row["agrees"] and row["dtype"] == "bfloat16"
    agreement = importlib.import_module("agreement")
    exact = torch.arange(100).view(10, 10)
    wrong, worse = (exact.masked_fill(exact < count, 50) for count in (3, 5))
    assert agreement.as_near(wrong, worse, exact, 0.01) and not agreement.as_near(worse, wrong, exact, 0.01)


def test_processes_of_their_own(benchmark, tmp_path):
    """Catches a peak that isn't measured, one of this larger process, and a row that can't be made in a new one."""
    ballast = torch.ones(300_000_000, dtype=torch.uint8)  # this process holds it, the row's own doesn't
    rows = run(benchmark, tmp_path, "--what", "text-again", "--classes", 30)
    assert rows[0]["agrees"] and 1e8 < rows[0]["peak_bytes"] < benchmark.peak_of_process()
    assert len(ballast) < benchmark.peak_of_process()


def test_rows_take_the_place_of_older_ones(benchmark, tmp_path):
    """Catches a file that loses the other models' rows, or has a row twice."""
    row = dict.fromkeys(benchmark.KEYS, 1) | {"model": "b16", "what": "post"}
    file = tmp_path / "rows.json"
    benchmark.add_rows(file, [row, row | {"classes": 2}])
    benchmark.add_rows(file, [row | {"ours_s": 5}])
    assert [(each["classes"], each["ours_s"]) for each in json.loads(file.read_text())] == [(1, 5), (2, 1)]


def test_the_page_has_the_table_as_committed(benchmark):
    """Catches a table that is not what was measured, and rows of another form."""
    rows = json.loads(benchmark.COMMITTED.read_text(encoding="utf-8"))
    assert rows and all(tuple(row) == benchmark.KEYS for row in rows)
    assert all(row["agrees"] for row in rows if not row["runtime"].endswith("int8"))  # random weights, at 8 bits
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert page.split(benchmark.BLOCK[0])[1].split(benchmark.BLOCK[1])[0] == benchmark.table(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "speed"], "invalid choice: 'speed'"),
        (["--model", "b32"], "invalid choice: 'b32'"),
        (["--runtime", "abacus"], "invalid choice: 'abacus'"),
        (["--classes", "0"], "--classes must be at least 1"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--what", "text", "--model", "tiny", "--classes", "848"], "at most 847"),
    ],
)
def test_wrong_options(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert message in f"{error.value}{capsys.readouterr().err}"
