"""Time and memory of SAN at full size, against the method in its plain form, with random weights.

    python scripts/benchmarks/inference.py --model b16 --what all --json results.json
    python scripts/benchmarks/inference.py --model b16 l14 --what image post --classes 20 171 --dtype bfloat16
    python scripts/benchmarks/inference.py --page          # measures nothing: the committed rows into the page

Each row alternates, in one process, ours with `plain.py`, which stands for what the original costs; checks that both
give the same; and prints the median of each, the ratio, and the peak memory of a process of its own that does only
ours (on a GPU, the GPU's). On standard error it says what share of the machine's fastest matrix product that is.

    forward       the vision pass, 640 x 853 pixels
    text          class names in 14 templates through the text tower, for the first time; the plain form encodes 24 of
                  them, each of which takes the same time
    text-again    the same names in a new process
    post          post-processing to --size, of what a trained model gives: 30 classes present, most queries no object
    post-uniform  the same where all classes are about as likely: the worst case
    image         a photograph of --size, from its pixels to its label map
    new-names     other names for an encoded photograph, against a whole call of ours (not of the plain form)
    folder        photographs in files to label maps in files, --images of them
    train         a training step on two crops of 640 x 640: loss, backward, optimizer
    evaluate      evaluation of --images photographs with label maps
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import CASES, MODELS, Case, Setup
from runtimes import RUNTIMES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from san_hf.files import write_file
from san_hf.inference.embeddings_cache import VARIABLE as CACHE_VARIABLE
from san_hf.modeling.fast_linear_san import fast_linear
from san_hf.vocabularies import load_vocabulary


ROOT = Path(__file__).resolve().parents[2]
COMMITTED = Path(__file__).with_suffix(".json")
PAGE = ROOT / "san_hf" / "inference" / "SPEED.md"
# Around the table on the page
BLOCK = ("<!-- scripts/benchmarks/inference.json, as inference.py --page writes it -->\n", "<!-- end -->\n")
KEYS = ("model", "what", "classes", "dtype", "runtime", "ours_s", "plain_s", "ratio", "peak_bytes", "agrees")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["b16"])
    parser.add_argument("--what", nargs="+", choices=[*CASES, "all"], default=["all"])
    parser.add_argument("--classes", nargs="+", type=int, metavar="N", help="where they count; default: each row's own")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--runtime", nargs="+", choices=RUNTIMES, default=["torch"], help="of the vision pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of label maps: 1200 1600")
    parser.add_argument("--images", type=int, default=4, help="in a folder")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts; a first run never does")
    parser.add_argument("--seconds", type=float, default=60, help="after which a row isn't repeated any more")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a busy machine; with --threads 1")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="without peak memory: less to wait for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to add the rows, in place of older ones")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the table to its page")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # ours, once, in this process
    options = parser.parse_args(argv)
    for name in ("threads", "images", "repeats", *(["classes"] if options.classes else [])):
        if min(value if isinstance(value := getattr(options, name), list) else [value]) < 1:
            parser.error(f"--{name} must be at least 1.")
    most = len(load_vocabulary("ade20k-847"))
    if max(options.classes or [1]) > most:
        parser.error(f"--classes must be at most {most}, as many names as there are to encode.")
    return options


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], options: argparse.Namespace) -> float:
    """Time that a call takes; with --cpu-time that of all threads of this process, which other work doesn't change."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    synchronize(options.device)
    start = clock()
    function()
    synchronize(options.device)
    return clock() - start


def peak_of_process() -> int:
    """Bytes that this process held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at what the process held that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_alone(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak bytes of ours, in this process."""
    device = options.device
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(case.ours, options)
    peak = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_of_process()
    return {"seconds": taken, "peak_bytes": peak}


def in_new_process(options: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """[`run_alone`] in a process that does nothing else."""
    command = [sys.executable, __file__, "--alone"]
    for name in ("model", "what", "classes", "dtype", "runtime"):
        if row[name] is not None:
            command += [f"--{name}", str(row[name])]
    command += ["--device", options.device, "--threads", str(options.threads), "--images", str(options.images)]
    if options.cpu_time:
        command.append("--cpu-time")
    if options.size:
        command += ["--size", *map(str, options.size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def count_flops(function: Callable[[], Any]) -> tuple[Any, int]:
    """What the function returns, and the floating point operations of its matrix products."""
    # The counter knows no fused attention on a CPU, but the products that it is made of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function()
    return result, counter.get_total_flops()


def measure(case: Case, options: argparse.Namespace, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The row with what was measured, and ours' floating point operations."""
    device = options.device
    if case.new_process:
        case.ours()  # what it leaves for later ones
    got, flops = count_flops(case.ours)
    row["agrees"] = bool(case.agree(got, case.plain()))
    del got
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + options.seconds
    while not times[0] or (len(times[0]) < options.repeats and time.perf_counter() < until):
        times[0].append(in_new_process(options, row)["seconds"] if case.new_process else seconds(case.ours, options))
        times[1].append(case.scale * seconds(case.plain, options))
    row["ours_s"], row["plain_s"] = (round(statistics.median(taken), 6) for taken in times)
    row["ratio"] = round(row["plain_s"] / row["ours_s"], 3)
    row["peak_bytes"] = None
    if options.peak:
        alone = run_alone(case, options) if device.startswith("cuda") else in_new_process(options, row)
        row["peak_bytes"] = int(alone["peak_bytes"])
    return {key: row[key] for key in KEYS}, flops


def matrix_peak(dtype: str, options: argparse.Namespace) -> float:
    """
    Floating point operations per second in square matrix products, by the fastest library that there is for the dtype:
    torch's own choice (MKL's float32 on most CPUs), oneDNN's float32, NumPy's OpenBLAS.
    """
    device = options.device
    side = 8192 if device.startswith("cuda") else 2048

    def rate(matrix: torch.Tensor) -> float:
        return 2 * side**3 / min(seconds(lambda: matrix @ matrix, options) for _ in range(5))

    matrix = torch.rand(side, side, device=device)
    rates = [rate(matrix)]
    if device == "cpu":
        with fast_linear(device):
            rates.append(rate(matrix))
        clock = "process_time" if options.cpu_time else "perf_counter"
        program = f"import numpy, time\nx = numpy.ones(({side}, {side}), 'float32')\n"
        program += f"def product():\n    start = time.{clock}()\n    x @ x\n    return time.{clock}() - start\n"
        program += "print(min(product() for _ in range(5)))"
        environment = os.environ | dict.fromkeys(["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"], str(options.threads))
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        rates.append(2 * side**3 / float(done.stdout))
    if dtype != "float32":
        rates.append(rate(matrix.to(getattr(torch, dtype))))
    return max(rates)


def rows(options: argparse.Namespace) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The rows that are asked for, made one by one."""
    wanted = list(CASES) if "all" in options.what else [what for what in CASES if what in options.what]
    for model in options.model:
        for runtime in options.runtime:
            for dtype in options.dtype:
                setup = Setup(options, model, dtype, runtime)
                for what in wanted:
                    make, counts = CASES[what]
                    for classes in counts if counts == (None,) else options.classes or counts:
                        row = {"model": model, "what": what, "classes": classes, "dtype": dtype, "runtime": runtime}
                        yield make(setup, classes), row


def table(measured: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | what | classes | dtype | runtime | ours | plain | ratio | peak memory |"]
    lines.append("|:--|:--|--:|:--|:--|--:|--:|--:|--:|")
    for row in measured:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
        ratio = f"{row['ratio']:.1f}x" + ("" if row["agrees"] else " (differs)")
        classes = "" if row["classes"] is None else row["classes"]
        names = f"| {row['model']} | {row['what']} | {classes} | {row['dtype']} | {row['runtime']} "
        lines.append(f"{names}| {row['ours_s']:.3g} s | {row['plain_s']:.3g} s | {ratio} | {peak} |")
    return "\n".join(lines) + "\n"


def add_rows(path: Path, measured: list[dict[str, Any]]) -> None:
    """Adds rows to the file, in place of those of the same model, work, classes, dtype and runtime."""

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[name] for name in KEYS[:5])

    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {key(row): row for row in (*known, *measured)}
    lines = ",\n".join(json.dumps(row) for row in merged.values())
    write_file(path, f"[\n{lines}\n]\n".encode())


def write_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BLOCK[0])
    after = rest.split(BLOCK[1], 1)[1]
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    write_file(PAGE, (before + BLOCK[0] + table(committed) + BLOCK[1] + after).encode())


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.page:
        return write_page()
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        options.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.alone:
            ((case, _),) = rows(options)
            return print(json.dumps(run_alone(case, options)))
        stack.enter_context(patch.dict(os.environ, {CACHE_VARIABLE: str(options.scratch / "embeddings")}))
        peaks = {dtype: matrix_peak(dtype, options) for dtype in options.dtype}
        measured = []
        for case, row in rows(options):
            done, flops = measure(case, options, row)
            measured.append(done)
            peak = peaks[done["dtype"]]
            share = f"{flops / done['ours_s'] / peak:.0%} of the {peak / 1e9:.0f} GFLOP/s of a matrix product"
            print(f"{json.dumps(done)} {flops / 1e9:.1f} GFLOP: {share}", file=sys.stderr)
            if options.json:
                add_rows(options.json, [done])
    print(table(measured), end="")


if __name__ == "__main__":
    main()
