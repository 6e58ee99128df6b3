"""What commands print of texts from files, and what becomes of names from data on the disk."""

import json

import pytest
import typer

from san_hf.cli import console, results
from san_hf.cli.evaluate_folders import check_folder, remove_drawings
from san_hf.paths import paths_for
from san_hf.progress import progress_bar


EVIL = "a\x1b[2Jb\u202ec\x07\r[red]x[/]"


def shown_by_console(capsys) -> str:
    output = capsys.readouterr()
    return output.out + output.err


def test_nothing_printed_is_obeyed(capsys):
    """Catches a name of a class, a file or a data set that clears the screen, turns the line round, or is markup."""
    console.show(EVIL)
    console.show(EVIL, error=True)
    console.show_error(ValueError("x"), f"{EVIL} at https://me:secret@host/x")
    with pytest.raises(typer.Exit):
        console.fail(EVIL)
    from san_hf.evaluation.tables import console_table

    console.table_console().print(console_table(["name", "x"], [[EVIL, "1.0"]]))
    with progress_bar() as bar:
        bar.add_task(EVIL, total=1, speed="")
    text = shown_by_console(capsys)
    assert "secret" not in text and "***@host" in text and text.count("[red]x[/]") >= 5 and text.count("[red]x[") == 6
    assert not set(text) & set("\u202e\x07") and "\x1b[2J" not in text


def test_stack_traces_hide_passwords(capsys):
    """Catches a password that --debug prints."""
    console.show_stack_traces(True)
    try:
        console.show_error(ValueError("can't reach https://me:secret@host/x"), "")
    finally:
        console.show_stack_traces(False)
    text = shown_by_console(capsys)
    assert "ValueError: can't reach https://***@host/x" in text and "secret" not in text


def test_json_on_a_terminal(capsys):
    """Catches JSON whose names a terminal obeys, or that holds other names than were given."""
    results.PRINTERS["json"]([{"report": FakeReport(), "comparison": [], "not comparable": []}], True)
    text = shown_by_console(capsys)
    assert json.loads(text)[0]["report"]["name"] == f"{EVIL} 猫" and "猫" in text
    assert all(letter == "\n" or letter.isprintable() for letter in text)


class FakeReport:
    def model_dump(self, exclude):
        return {"name": f"{EVIL} 猫"}


def test_folders_of_data_sets(tmp_path):
    """Catches results that are written above the output folder, or two sets in one where capitals don't count."""
    names = ["..", "voc", "VOC", "../x", "a/b", "", "x" * 300]
    folders = paths_for([(name,) for name in names], tmp_path)
    assert all(folder.resolve().parent == tmp_path.resolve() for folder in folders)
    assert len({str(folder).casefold() for folder in folders}) == len(names)
    assert [folders[1].name, folders[2].name, folders[4].name] == ["voc", "VOC-2", "a--b"]


def test_files_of_the_user_stay(tmp_path):
    """Catches --overwrite that deletes what no evaluation has written, and results replaced without it."""
    ours = ["pictures.png", "compared/results.json", "compared/results.md", "compared/progress/0.pt"]
    for name in [*ours, "compared/mine.txt", "mine.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds results \(pictures\.png\)"):
        check_folder(tmp_path, resume=False, overwrite=False)
    remove_drawings([tmp_path])
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["compared/mine.txt", "mine.txt"]
    check_folder(tmp_path, resume=False, overwrite=False)
    (tmp_path / "results.md").touch()
    with pytest.raises(ValueError, match=r"holds results \(results\.md\)"):
        check_folder(tmp_path, resume=False, overwrite=False)
