"""Open-vocabulary transfer: mIoU on base compositions, which had masks in training, and on novel ones.

Two parts, each of which trains variants on the picture book and prints a Markdown table. `ablation` trains SAN with one
of its parts changed at a time, on the same frozen CLIP. `fine-tuning` trains the embedded checkpoint further on base
compositions: with CLIP frozen, with LoRA on it (needs `pip install peft`), and with CLIP trained.

    python scripts/benchmarks/open_vocabulary.py --clip outputs/picture-book/clip
    python scripts/benchmarks/open_vocabulary.py --clip ... --variants "full method" --check
    python scripts/benchmarks/open_vocabulary.py --part fine-tuning

The CLIP of `ablation` is the one that make_embedded_checkpoint.py leaves in its --work-dir; without --clip, one is
trained first. Each result is written to --output as soon as a training ends, so the same command resumes after an
interruption. `--check` compares with the committed results, and ends with status 1 if novel mIoU has fallen.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTokenizer

from san_hf.files import write_file
from san_hf.hub import from_pretrained
from san_hf.hub.names import EMBEDDED_MODEL
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.picture_book.clip import train_clip, train_tokenizer
from san_hf.picture_book.measure import VALIDATION_SEED, measure
from san_hf.picture_book.objects import BASE
from san_hf.picture_book.san import BATCH_SIZE, FINE_TUNING_RATE, build_processor, fine_tune_san, train_san


ABLATIONS: dict[str, dict[str, Any]] = {
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
# LoRA of all linear layers of CLIP's vision tower.
LORA = {
    "r": 8,
    "lora_alpha": 8,
    "target_modules": r"model\.vision_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
}
WAYS: dict[str, dict[str, Any]] = {
    "CLIP frozen": {},
    # LoRA's rate is ten times that of the weights themselves, as is usual.
    "LoRA on CLIP's vision tower": {"lora": LORA, "clip_learning_rate": 10 * FINE_TUNING_RATE},
    "CLIP's vision tower trained": {"freeze_clip": False},
}
FEW = [name for name in BASE if name.endswith((" house", " car"))]
UNTRAINED = "before"
FINE_TUNINGS = {
    UNTRAINED: {},
    **WAYS,
    **{f"{way}, houses and cars only": options | {"compositions": FEW} for way, options in WAYS.items()},
}


@dataclass(frozen=True)
class Part:
    """What is compared, and how long and how often each variant is trained by default."""

    variants: dict[str, dict[str, Any]]
    steps: int
    seeds: tuple[int, ...]


# The embedded checkpoint has seen the pages of seed 0.
PARTS = {"ablation": Part(ABLATIONS, 400, (0,)), "fine-tuning": Part(FINE_TUNINGS, 150, (1, 2, 3))}
COMMITTED = Path(__file__).with_suffix(".json")
TOLERANCE = 5.0  # points of novel mIoU that may differ by chance


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default="ablation")
    parser.add_argument("--clip", type=Path, help="folder of the CLIP; default: train one, which takes up to an hour")
    parser.add_argument("--output", type=Path, default=Path("outputs/open-vocabulary.json"), help="file of results")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all of the part")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0, and 1 2 3 for fine-tuning")
    parser.add_argument("--steps", type=int, help="of training, 8 pages each; default: 400, and 150 for fine-tuning")
    parser.add_argument("--pages", type=int, help="with masks; default: enough to see each once")
    parser.add_argument("--measured-pages", type=int, default=300, help="not those of the test set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time, which share the threads")
    parser.add_argument("--check", action="store_true", help=f"compare with {COMMITTED.name}")
    options = parser.parse_args(argv)
    part = PARTS[options.part]
    options.variants = options.variants or list(part.variants)
    if unknown := sorted(set(options.variants) - set(part.variants)):
        parser.error(f"--part {options.part} has no variant {unknown}; it has {list(part.variants)}.")
    options.seeds = options.seeds or list(part.seeds)
    options.steps = options.steps or part.steps
    options.pages = options.pages or BATCH_SIZE * options.steps
    return options


def train(
    variant: str, seed: int, settings: dict[str, int], clip_folder: Path
) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """Trains one variant; the one before fine-tuning is the embedded checkpoint."""
    pages, steps = settings["pages"], settings["steps"]
    if variant in ABLATIONS:
        processor = build_processor(CLIPTokenizer.from_pretrained(clip_folder))
        return train_san(clip_folder, processor, pages, steps, seed, **ABLATIONS[variant]), processor
    if variant == UNTRAINED:
        return from_pretrained(EMBEDDED_MODEL)
    return fine_tune_san(EMBEDDED_MODEL, pages, steps, seed, **FINE_TUNINGS[variant])


def run(variant: str, seed: int, settings: dict[str, int], clip_folder: Path, threads: int) -> dict[str, Any]:
    """Trains and measures one variant."""
    torch.set_num_threads(threads)
    model, processor = train(variant, seed, settings, clip_folder)
    metrics = measure(model, processor, settings["measured_pages"], VALIDATION_SEED)
    return {"variant": variant, "seed": seed, **settings, **metrics}


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


def novel_miou(results: Iterable[dict[str, Any]], variant: str) -> float:
    """A variant's mIoU on novel classes, averaged over seeds; nan if it has no results."""
    values = [row["novel_miou"] for row in results if row["variant"] == variant]
    return float(np.mean(values)) if values else math.nan


def cell(values: Sequence[float]) -> str:
    """The mean of a metric over seeds and, if there are several, its sample standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def table(results: Sequence[dict[str, Any]], variants: Iterable[str]) -> str:
    """A Markdown table of those of the variants that have results."""
    lines = ["| variant | base | novel | novel / base | stuff |", "|:--|--:|--:|--:|--:|"]
    for variant in variants:
        if rows := [row for row in results if row["variant"] == variant]:
            base, novel, stuff = ([row[f"{kind}_miou"] for row in rows] for kind in ("base", "novel", "stuff"))
            ratio = np.mean(novel) / max(np.mean(base), 1e-9)
            lines.append(f"| {variant} | {cell(base)} | {cell(novel)} | {ratio:.0%} | {cell(stuff)} |")
    return "\n".join(lines)


def regressions(results: Sequence[dict[str, Any]], committed: Sequence[dict[str, Any]]) -> list[str]:
    """A message for each variant whose novel mIoU is lower than committed, by more than `TOLERANCE` points."""
    found = []
    for variant in dict.fromkeys(row["variant"] for row in committed):
        now, before = novel_miou(results, variant), novel_miou(committed, variant)
        if now < before - TOLERANCE:
            found.append(f"{variant}: novel mIoU {now:.1f}, was {before:.1f}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    settings = {"steps": options.steps, "pages": options.pages, "measured_pages": options.measured_pages}
    committed = json.loads(COMMITTED.read_text()) if options.check else []
    committed = [row for row in committed if row["variant"] in PARTS[options.part].variants]
    if any(row[key] != value for row in committed for key, value in settings.items()):
        sys.exit(f"Error: {COMMITTED.name} has results of other --steps, --pages or --measured-pages than {settings}.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else []

    def done(variant: str, seed: int) -> bool:
        wanted = {"variant": variant, "seed": seed, **settings}
        return any(wanted.items() <= row.items() for row in results)

    todo = [
        (variant, seed)
        for seed in options.seeds
        for variant in options.variants
        # What isn't trained is the same for all seeds.
        if not done(variant, seed) and (variant != UNTRAINED or seed == options.seeds[0])
    ]
    with tempfile.TemporaryDirectory() as temporary:
        clip_folder = options.clip
        if clip_folder is None and options.part == "ablation":
            clip_folder = Path(temporary) / "clip"
            tokenizer = train_tokenizer()
            train_clip(tokenizer, seed=0).save_pretrained(clip_folder)
            tokenizer.save_pretrained(clip_folder)
        threads = max(1, torch.get_num_threads() // options.jobs)
        for row in run_all([(*training, settings, clip_folder, threads) for training in todo], options.jobs):
            results.append(row)
            write_file(options.output, json.dumps(results, indent=1) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)

    chosen = [row for row in results if settings.items() <= row.items() and row["variant"] in options.variants]
    print(table(chosen, PARTS[options.part].variants))
    if problems := regressions(chosen, committed):
        sys.exit("Open-vocabulary transfer has become worse:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
