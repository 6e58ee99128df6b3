"""Weights that are mapped from a file leave the process's memory when they are not needed, and come back."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from san_hf.memory import page_out
from tests.forks import Run


def resident() -> int:
    """Bytes of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("RssFile"))
    return int(kib) * 1024


def page_out_mapped(path: str) -> tuple[list[int], bool]:
    """Bytes of files in memory with the weights read, paged out and read again; whether they are still the same."""
    linear = torch.nn.Linear(2048, 4096)
    linear.load_state_dict(load_file(path), assign=True)
    total, sizes = float(linear.weight.double().sum()), []
    for action in (lambda: None, lambda: page_out(linear), lambda: linear.weight.sum()):
        action()
        sizes.append(resident())
    return sizes, float(linear.weight.double().sum()) == total


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's madvise")
def test_mapped_weights_leave_the_memory(tmp_path):
    """Catches advice for the wrong addresses, and weights that are lost by it."""
    path = str(tmp_path / "weights.safetensors")
    save_file(torch.nn.Linear(2048, 4096).state_dict(), path)
    (((read, paged_out, again), same),) = Run(page_out_mapped, path).outcomes()
    assert same
    size = 4 * 2048 * 4096
    assert read - paged_out > 0.9 * size
    assert again - paged_out > 0.9 * size


def test_weights_in_memory_stay():
    """Catches changed weights that are lost, as they are in no file."""
    linear = torch.nn.Linear(300, 3000)
    with torch.no_grad():
        linear.weight.fill_(3.0)
    page_out(linear)
    assert (linear.weight == 3).all()
