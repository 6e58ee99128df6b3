"""Locks: one process at a time, as long as it lives."""

import os
import re
import signal
import socket
import sys
import threading
import time

import pytest

from san_hf import locks
from san_hf.locks import InUseError, locked
from tests.test_files import in_a_process


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX's locks and SIGKILL")
TASK = "A training in 'run'"


def hold(file, ready: int) -> None:
    """Takes the lock, says so, and keeps it until it is killed."""
    with locked(file, TASK):
        os.write(ready, b"x")
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        hold(tmp_path / "lock", theirs)
    os.read(ours, 1)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_second_one_is_told_who_holds_it(tmp_path, holder):
    """Catches two processes in one folder, and a message that doesn't say which one to look for."""
    with pytest.raises(InUseError) as raised, locked(tmp_path / "lock", TASK):
        pass
    assert re.fullmatch(
        rf"A training in 'run' is under way already, by process {holder} on {re.escape(socket.gethostname())}, since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S*\. Wait for it or end it, or choose another folder\.",
        str(raised.value),
    )


def test_a_lock_goes_with_its_process(tmp_path):
    """Catches a lock that outlives its holder: by its file, or in a process that the holder has forked."""
    ours, theirs = os.pipe()

    def fork_and_die():
        with locked(tmp_path / "lock", TASK):
            grandchild = os.fork()
            if grandchild == 0:
                time.sleep(60)
            os.write(theirs, str(grandchild).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(fork_and_die) == -signal.SIGKILL
    grandchild = int(os.read(ours, 20))
    try:
        assert (tmp_path / "lock").exists()
        with locked(tmp_path / "lock", TASK):
            pass
        assert not (tmp_path / "lock").exists()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_one_thread_at_a_time_and_again_in_the_same(tmp_path):
    """Catches a command that locks out its own library calls, and two threads that pass for one."""
    outcomes = []

    def try_it():
        try:
            with locked(tmp_path / "lock", TASK):
                outcomes.append("in")
        except InUseError as error:
            outcomes.append(str(error))

    with locked(tmp_path / "lock", TASK):
        try_it()
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert (tmp_path / "lock").exists()
    try_it()
    assert outcomes[0] == outcomes[2] == "in" and f"process {os.getpid()} on" in outcomes[1]


def test_waiting_for_a_lock(tmp_path):
    """Catches two that hold a lock at once, where the first removes its file as the second gets it."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(30):
            with locked(tmp_path / "lock", TASK, wait=True):
                value = int(counter.read_text())
                time.sleep(0.0005)
                counter.write_text(str(value + 1))
        os._exit(0)

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            count()
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert counter.read_text() == "120"
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Catches a command that fails there, or that doesn't say what isn't looked after."""

    def refuse(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no file locks: see to it that no other process"):
        with locked(tmp_path / "lock", TASK):
            assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
