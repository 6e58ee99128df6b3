"""Ablation of SAN's parts: mIoU on base compositions, which had masks in training, and on novel ones.

It trains SAN on the picture book with one part changed at a time, on the same frozen CLIP, and prints a Markdown table.

    python scripts/benchmarks/open_vocabulary.py --clip outputs/picture-book/clip
    python scripts/benchmarks/open_vocabulary.py --clip ... --variants "full method" --check

The CLIP is the one that make_embedded_checkpoint.py leaves in its --work-dir; without --clip, one is trained first.
Each result is written to --output as soon as a training ends, so the same command resumes after an interruption.
`--check` compares with the committed results, and ends with status 1 if novel mIoU has fallen.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTokenizer

from san_hf.files import write_file
from san_hf.picture_book.clip import train_clip, train_tokenizer
from san_hf.picture_book.measure import VALIDATION_SEED, measure
from san_hf.picture_book.san import build_processor, train_san


VARIANTS: dict[str, dict[str, Any]] = {
    "full method": {},
    "no attention bias": {"num_bias_layers": 0},
    "no fusion": {"fusion_layers": []},
    "single supervision": {"deep_supervision_layers": [4]},
    "bias pooling avg": {"bias_pooling": "avg"},
    "bias pooling bilinear": {"bias_pooling": "bilinear"},
    "recognition token learned": {"recognition_token": "learned"},
    "recognition token class+learned": {"recognition_token": "class+learned"},
    "a bias for each head": {"num_bias_heads": None},
    "a bias for each layer": {"num_bias_layers": 5},
}
COMMITTED = Path(__file__).with_suffix(".json")
TOLERANCE = 5.0  # points of novel mIoU that may differ by chance


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, help="folder of the CLIP; default: train one, which takes up to an hour")
    parser.add_argument("--output", type=Path, default=Path("outputs/open-vocabulary.json"), help="file of results")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400, help="of training, 8 pages each")
    parser.add_argument("--pages", type=int, default=3200, help="with masks")
    parser.add_argument("--measured-pages", type=int, default=300, help="not those of the test set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, with as many cores each")
    parser.add_argument("--check", action="store_true", help=f"compare with {COMMITTED.name}")
    return parser.parse_args(argv)


def run(clip_folder: Path, variant: str, seed: int, settings: dict[str, int], threads: int) -> dict[str, Any]:
    """Trains and measures one variant."""
    torch.set_num_threads(threads)
    processor = build_processor(CLIPTokenizer.from_pretrained(clip_folder))
    model = train_san(clip_folder, processor, settings["pages"], settings["steps"], seed, **VARIANTS[variant])
    return {
        "variant": variant,
        "seed": seed,
        **settings,
        **measure(model, processor, settings["measured_pages"], VALIDATION_SEED),
    }


def run_all(todo: list[tuple], jobs: int) -> Iterator[dict[str, Any]]:
    """Results of [`run`] with each of these arguments, as soon as they are there; `jobs` trainings at a time."""
    if jobs == 1:
        for arguments in todo:
            yield run(*arguments)
        return
    # Spawned: processes that are forked after torch has started its threads may hang.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, *arguments) for arguments in todo]):
            yield future.result()


def mean(results: Iterable[dict[str, Any]], variant: str) -> dict[str, float] | None:
    """A variant's mIoU on base, novel and stuff classes, averaged over seeds; `None` if it has no results."""
    rows = [row for row in results if row["variant"] == variant]
    keys = ("base_miou", "novel_miou", "stuff_miou")
    return {key: float(np.mean([row[key] for row in rows])) for key in keys} if rows else None


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, in the order of VARIANTS."""
    lines = ["| variant | base | novel | novel / base | stuff |", "|:--|--:|--:|--:|--:|"]
    for variant in VARIANTS:
        if metrics := mean(results, variant):
            base, novel, stuff = metrics.values()
            lines.append(f"| {variant} | {base:.1f} | {novel:.1f} | {novel / max(base, 1e-9):.0%} | {stuff:.1f} |")
    return "\n".join(lines)


def regressions(results: list[dict[str, Any]], committed: list[dict[str, Any]]) -> list[str]:
    """A message for each variant whose novel mIoU is lower than committed, by more than `TOLERANCE` points."""
    found = []
    for variant in VARIANTS:
        now, before = mean(results, variant), mean(committed, variant)
        if now and before and now["novel_miou"] < before["novel_miou"] - TOLERANCE:
            found.append(f"{variant}: novel mIoU {now['novel_miou']:.1f}, was {before['novel_miou']:.1f}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    settings = {"steps": options.steps, "pages": options.pages, "measured_pages": options.measured_pages}
    committed = json.loads(COMMITTED.read_text()) if options.check else []
    if options.check and any(row[key] != value for row in committed for key, value in settings.items()):
        sys.exit(f"Error: {COMMITTED.name} has results of other --steps, --pages or --measured-pages than {settings}.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else []

    def done(variant: str, seed: int) -> bool:
        wanted = {"variant": variant, "seed": seed, **settings}
        return any(wanted.items() <= row.items() for row in results)

    with tempfile.TemporaryDirectory() as temporary:
        clip_folder = options.clip
        if clip_folder is None:
            clip_folder = Path(temporary) / "clip"
            tokenizer = train_tokenizer()
            train_clip(tokenizer, seed=0).save_pretrained(clip_folder)
            tokenizer.save_pretrained(clip_folder)
        todo = [(variant, seed) for seed in options.seeds for variant in options.variants if not done(variant, seed)]
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        for row in run_all([(clip_folder, *job, settings, threads) for job in todo], options.jobs):
            results.append(row)
            write_file(options.output, json.dumps(results, indent=1) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)

    chosen = [row for row in results if settings.items() <= row.items() and row["variant"] in options.variants]
    print(table(chosen))
    if options.check and (problems := regressions(chosen, committed)):
        sys.exit("Open-vocabulary transfer has become worse:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
