"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import errno
import json
import os
import secrets
import signal
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from san_hf import files
from san_hf.files import (
    json_text,
    new_file,
    new_files,
    new_folder,
    remove_files,
    remove_folder,
    remove_leftovers,
    write_file,
)
from san_hf.paths import folder_name


posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX's modes, links, locks and SIGKILL")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_process(function) -> int:
    """Runs a function in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_is_there_when_it_is_complete(tmp_path):
    """Catches a target that is opened before its content is there, text with other line ends, and what is left."""
    file = tmp_path / "a.txt"
    with new_file(file) as opened:
        opened.write(b"one\r\n")
        assert not file.exists()
    assert file.read_bytes() == b"one\r\n"
    write_file(str(file), "zwei\nü\r\n")
    assert file.read_bytes() == "zwei\nü\r\n".encode()
    assert names(tmp_path) == ["a.txt"]


def strict(text: str):
    """JSON as readers outside of Python take it: without NaN and Infinity, and as UTF-8."""
    return json.loads(text.encode("utf-8").decode("utf-8"), parse_constant=pytest.fail)


def test_json_that_every_reader_takes():
    """Catches NaN and Infinity, which are Python's alone, at any depth, and names that can't be encoded as UTF-8."""
    value = {"a": [float("nan"), (float("inf"), {"b": -float("inf")})], "猫\udcff": 1.5, "c": [True, None, 3, 1e-300]}
    text = json_text(value)
    assert strict(text) == {"a": [None, [None, {"b": None}]], "猫\ufffd": 1.5, "c": [True, None, 3, 1e-300]}
    assert "\n" not in text and "猫" in text
    assert json_text({"a": 1}, indent=2) == '{\n  "a": 1\n}'
    with pytest.raises(TypeError):
        json_text({1, 2})


NAMES = [
    *("..", ".", "", " ", "/", "//", "../..", "/etc/passwd", "a/../../b", "a\\..\\b", "C:\\x", "a\0b", "~"),
    *(
        "x" * 300,
        "猫" * 300,
        "con",
        "NUL.txt",
        "com1",
        "a:b",
        "a?b*c",
        "tail. . ",
        "\n",
        "\x1b[2J",
        "\udcff",
        ".hidden",
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_data_are_one_folder(tmp_path, name):
    """Catches a name that leads out of its folder, to a hidden one, or that some system refuses."""
    tidy = folder_name(name)
    assert tidy not in ("", ".", "..") and not set(tidy) & set('/\\:*?"<>|\0\n\x1b') and tidy[0] != "."
    assert (
        len(tidy.encode()) <= 201
        and tidy == tidy.rstrip(" .")
        and tidy.split(".")[0].lower() not in ("con", "nul", "com1")
    )
    (tmp_path / tidy).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [tidy] and (
        tmp_path / tidy
    ).resolve().parent == tmp_path.resolve()
    assert folder_name(tidy) == tidy


def test_ordinary_names_stay():
    """Catches results that are looked for under another name after an update."""
    for name in ("voc", "ade20k-150", "My streets", "straße", "猫", "v1.2", "console", "a_b"):
        assert folder_name(name) == name
    assert folder_name("someone/streets") == "someone--streets"


def test_only_our_files_are_removed(tmp_path):
    """Catches files of the user's that go with ours, and those that a link leads to."""
    for name in ("0.pt", "12.jsonl", "mine.txt"):
        (tmp_path / "ours").mkdir(exist_ok=True)
        (tmp_path / "ours" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    for folder in ("link", "nowhere", "ours/mine.txt"):
        remove_files(tmp_path / folder, ["*"])
    assert names(tmp_path / "ours") == ["0.pt", "12.jsonl", "mine.txt"]
    remove_files(tmp_path / "ours", ["[0-9]*.pt", "[0-9]*.jsonl"])
    assert names(tmp_path / "ours") == ["mine.txt"]
    remove_files(tmp_path / "ours", ["mine.txt"])
    assert not (tmp_path / "ours").exists()


def test_an_error_changes_nothing(tmp_path):
    """Catches half a file or folder, and an old one that is lost."""
    write_file(tmp_path / "file", "old")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "file") as opened:
        opened.write(b"new")
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "folder") as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["old"]


@pytest.mark.parametrize("step", ["fsync", "replace", "rename"])
def test_a_full_disk(tmp_path, monkeypatch, step):
    """Catches errors of the disk at the last moment that leave something behind, or are swallowed."""
    write_file(tmp_path / "file", "old")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "old").touch()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "renameat2", None)
    monkeypatch.setattr(files.os, step, fail)
    if step != "rename":
        with pytest.raises(OSError, match=r"No space left.*/file'"):
            write_file(tmp_path / "file", "new")
    if step != "replace":
        with pytest.raises(OSError, match=r"No space left.*/folder'"), new_folder(tmp_path / "folder") as folder:
            (folder / "new").touch()
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["old"]


def save_by_torch(folder: Path) -> None:
    with new_file(folder / "file") as file, open("/dev/full", "wb", buffering=0) as full:
        torch.save({"a": torch.zeros(10**5)}, full)
        file.write(b"never")


def save_by_safetensors(folder: Path) -> None:
    with new_folder(folder / "file"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("save", [save_by_torch, save_by_safetensors])
def test_a_full_disk_under_other_libraries(tmp_path, save):
    """Catches errors of torch and safetensors for a full disk, which are no OSError and name no file."""
    with pytest.raises(OSError) as raised:
        save(tmp_path)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "file")
    assert names(tmp_path) == []


def test_a_folder_replaces_another_as_a_whole(tmp_path):
    """Catches files of the old folder that stay, and folders above that aren't made."""
    target = tmp_path / "a" / "b"
    for name in ("one", "two"):
        with new_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
    assert names(target) == ["sub"] and names(target / "sub") == ["two"]
    assert names(tmp_path / "a") == ["b"]


def test_names_are_unpredictable_and_short_enough(tmp_path):
    """Catches temporary names that can be guessed, and names that the file system has no room for."""
    seen = set()
    for _ in range(5):
        with new_file(tmp_path / ("x" * 250)):
            seen.update(names(tmp_path))
    assert len(seen) == 5 + 1 and max(len(name) for name in seen) <= 255


@posix_only
def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    """Catches writing through a link: at the target, or at a temporary name that somebody has guessed."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "new"
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0123456789abcdef")
    (tmp_path / ".guessed.0123456789abcdef.partial").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "guessed", "new")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "guessed"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@posix_only
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_is_honoured(tmp_path, umask):
    """Catches files that others can't read, or can although they must not; also those that a library made private."""
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", "x")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "sub").mkdir()
            for private in (folder / "weights", folder / "sub" / "more"):
                private.touch(mode=0o600)
    finally:
        os.umask(before)

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(tmp_path / "file") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder" / "weights") == mode(tmp_path / "folder" / "sub" / "more") == 0o666 & ~umask


@posix_only
def test_a_killed_process_leaves_the_old_and_the_next_one_tidies_up(tmp_path):
    """Catches half a file under its name after SIGKILL, and leftovers that pile up."""
    write_file(tmp_path / "file", "old")

    def write_half():
        with new_file(tmp_path / "file") as opened:
            opened.write(b"half")
            opened.flush()
            kill_self()

    def make_half():
        with new_folder(tmp_path / "folder") as folder:
            (folder / "half").touch()
            kill_self()

    assert in_a_process(write_half) == in_a_process(make_half) == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old" and not (tmp_path / "folder").exists()
    (leftover,) = set(names(tmp_path)) - {"file"}  # the second one has removed what the first one left
    assert leftover.startswith(".folder.")
    assert in_a_process(lambda: (write_file(tmp_path / "other", "x"), os._exit(0))) == 0
    assert names(tmp_path) == ["file", "other"]


@posix_only
def test_what_another_process_is_writing_stays(tmp_path):
    """Catches a file of a living process that is taken for a leftover."""
    with new_file(tmp_path / "file") as opened, new_folder(tmp_path / "folder") as folder:
        opened.write(b"x")
        assert in_a_process(lambda: (remove_leftovers(tmp_path), os._exit(0))) == 0
        (folder / "inside").touch()
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["inside"]


@posix_only
def test_several_files_at_once(tmp_path):
    """Catches half of several files, hidden ones that stay, and what a killed process leaves of them."""
    write_file(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), new_files(tmp_path) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"

    def write_some():
        with new_files(tmp_path) as folder:
            (folder / "a").write_text("new")
            kill_self()

    assert in_a_process(write_some) == -signal.SIGKILL
    with new_files(tmp_path) as folder:
        for name in ("b", "a", ".scratch"):
            (folder / name).write_text("new")
        assert in_a_process(lambda: (remove_leftovers(tmp_path), os._exit(0))) == 0
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "a").read_text() == "new"
    with new_files(tmp_path / "there" / "too") as folder:
        (folder / "c").touch()
    assert names(tmp_path / "there" / "too") == ["c"]


def die_at(count: int, function, *arguments) -> None:
    """Kills this process just before the `count`-th time that `function` renames, removes or makes something."""
    seen = 0

    def count_changes(event, _):
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            seen += 1
            if seen == count:
                kill_self()

    sys.addaudithook(count_changes)
    function(*arguments)
    os._exit(0)


@posix_only
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_moment_while_a_folder_is_replaced(tmp_path, monkeypatch, exchange):
    """Catches a moment at which neither the old folder nor the new one is there whole, and leftovers that stay."""
    if not exchange:  # as on systems and file systems that can't
        monkeypatch.setattr(files, "renameat2", None)
    elif files.renameat2 is None:
        pytest.skip("needs renameat2")

    def replace(name: str):
        with new_folder(tmp_path / "folder") as folder:
            for number in range(2):
                (folder / f"{name}{number}").touch()

    replace("old")
    outcomes = []
    for count in range(1, 20):
        status = in_a_process(partial(die_at, count, replace, "new"))
        if not exchange:  # a reader may find nothing for a moment; the next writer puts it right
            remove_leftovers(tmp_path)
        outcomes.append(names(tmp_path / "folder"))
        if status == 0:
            break
        replace("old")
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["folder"]
    assert status == 0 and len(outcomes) > 5
    assert outcomes[0] == ["old0", "old1"] and outcomes[-1] == ["new0", "new1"]
    assert all(outcome in (outcomes[0], outcomes[-1]) for outcome in outcomes)


@posix_only
def test_a_link_to_a_folder_is_replaced(tmp_path):
    """Catches a replacement that empties the folder that a link points to."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "link").symlink_to("precious")
    with new_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["link", "precious"] and names(tmp_path / "precious") == ["file"]
    assert not (tmp_path / "link").is_symlink() and names(tmp_path / "link") == ["new"]


def test_removing_a_folder(tmp_path, monkeypatch):
    """Catches half of a removed folder that still has its name."""
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a").touch()

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "folder")
    monkeypatch.undo()
    assert not (tmp_path / "folder").exists()
    remove_folder(tmp_path / "folder")  # nothing to do
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_other_hidden_files_are_nobodys_leftovers(tmp_path):
    """Catches files of the user's that only look like ours."""
    for name in (".a.partial", ".a.0123.partial", "a.0123456789abcdef.partial", ".git"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert len(names(tmp_path)) == 4
    remove_leftovers(tmp_path / "nowhere")


@posix_only
def test_many_processes_and_threads_write_to_one_folder(tmp_path):
    """
    A new temporary file that another process, or another thread, takes for a leftover before it is locked. (Names
    made of process ids would meet, too: each container has a process 1.)
    """

    def write():
        for number in range(25):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            write_file(folder / "same.json", "complete")
            with new_folder(folder / "own" / secrets.token_hex(4)):
                pass

    def write_by_threads():
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(write) for _ in range(3)]:
                done.result()

    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            status = 1
            try:
                write_by_threads()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert not list(tmp_path.rglob(".*"))
    assert {path.read_text() for path in tmp_path.rglob("*.json")} == {"complete"}
