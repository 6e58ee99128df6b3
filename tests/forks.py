"""Processes of their own for tests, forked: without the seconds that importing torch and Transformers takes."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch


class Run:
    """A function in forked processes: real ones, which can be killed, without the seconds that importing takes."""

    def __init__(self, function, *args, processes: int = 1):
        # The kernel picks a free port.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.results = context.SimpleQueue()
        self.processes = [
            context.Process(target=self._run, args=(function, args, rank, processes, port)) for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def _run(self, function, args, rank: int, processes: int, port: int) -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        # One process too many would make every collective wait for good.
        torch.set_num_threads(1)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if processes > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        try:
            outcome = function(*args)
        except Exception as error:
            outcome = (type(error).__name__, str(error))
            if "-s" in sys.argv:
                traceback.print_exc()
        self.results.put((rank, outcome))
        # Not what the test runner wants done when it ends.
        sys.stdout.flush()
        os._exit(0)

    def outcomes(self, timeout: float = 120) -> list:
        """What the function returned, or the name and the message of its error, by rank; None where killed."""
        outcomes = [None] * len(self.processes)
        deadline = time.monotonic() + timeout
        running = True
        while running:
            # Asked before the results are: a process that has ended has sent its own. And a long one is read while it
            # is being sent, as a pipe holds little.
            running = any(process.is_alive() for process in self.processes)
            while not self.results.empty():
                rank, outcome = self.results.get()
                outcomes[rank] = outcome
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"A run did not end within {timeout} s.")
            time.sleep(0.005)
        return outcomes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait_for_step(self, output: Path, step: int, timeout: float = 120) -> None:
        """Until log.jsonl has that many lines."""
        deadline = time.monotonic() + timeout
        file = output / "log.jsonl"
        while not file.is_file() or file.read_bytes().count(b"\n") < step:
            if time.monotonic() > deadline or not any(process.is_alive() for process in self.processes):
                self.kill()
                raise TimeoutError(f"The run never came to step {step}.")
            time.sleep(0.005)


def printing(file: Path, function, *args):
    """Runs a function, in a forked process, with what it prints going to a file, in ASCII."""
    sys.stdout = sys.stderr = file.open("w", encoding="ascii")
    return function(*args)
