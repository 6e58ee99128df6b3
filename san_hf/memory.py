"""Memory that weights take."""

import ctypes
import mmap
import sys

import torch


# <sys/mman.h> of Linux 5.4 and later; Python's `mmap` knows the name for its own mappings only.
MADV_PAGEOUT = 21


def page_out(module: torch.nn.Module) -> None:
    """
    Tells the system that a module's parameters won't be needed soon. Weights that are mapped from a file then leave the
    process's memory, and come back by themselves when they are read. Other systems than Linux, and accelerators, have
    nothing of the kind, and nothing happens.
    """
    if sys.platform != "linux":
        return
    if (advise := getattr(ctypes.CDLL(None), "madvise", None)) is None:
        return
    for parameter in module.parameters():
        if parameter.device.type == "cpu":
            # Whole pages only: others may hold a neighbour's values, too.
            start = -(-parameter.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (parameter.data_ptr() + parameter.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if stop > start:
                advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_PAGEOUT)
