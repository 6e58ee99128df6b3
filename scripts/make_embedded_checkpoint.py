"""Makes the embedded checkpoint, `san_hf/checkpoints/picture-book`, from a seed.

Tokenizer, CLIP and SAN are trained as `san_hf.picture_book` says; then SAN is measured on test pages. On two
CPU cores without AVX-512 this takes an hour and a half (CLIP 55 minutes, 5,000 steps of SAN 0.37 s each).

    python scripts/make_embedded_checkpoint.py
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPModel, CLIPTokenizer

from san_hf.cards import load_facts
from san_hf.files import write_file
from san_hf.hub import save_pretrained
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.picture_book.clip import CLIP_PHASES, CLIPPhase, train_clip, train_tokenizer, zero_shot_accuracy
from san_hf.picture_book.measure import measure
from san_hf.picture_book.objects import CLASS_NAMES
from san_hf.picture_book.san import build_processor, train_san
from san_hf.picture_book.scenes import draw_scene


NAME = "picture-book"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Recipe:
    """The size of a run."""

    clip: tuple[CLIPPhase, ...]
    zero_shot_rounds: int  # photographs of each composition that CLIP is measured on
    pages: int  # pages with masks
    san_steps: int
    test_pages: int


FULL = Recipe(clip=CLIP_PHASES, zero_shot_rounds=4, pages=10000, san_steps=5000, test_pages=300)
FAST = Recipe(clip=(CLIPPhase(3, 2, 1, 1e-3),), zero_shot_rounds=1, pages=4, san_steps=2, test_pages=4)

SAMPLE_SEED = (31, 1)
SAMPLE = ("blue bird", "orange house")  # both novel


def card_facts(results: dict[str, Any]) -> dict[str, Any]:
    """Facts for the model card: the static ones, and the measured mIoU."""
    rows = [
        {"dataset": f"picture book, {kind}", "mIoU": round(results[f"{key}_miou"], 1)}
        for kind, key in (("base compositions", "base"), ("novel compositions", "novel"), ("stuff", "stuff"))
    ]
    return load_facts(NAME) | {"results": rows}


def save(model: SANForSemanticSegmentation, processor: SANProcessor, results: dict[str, Any], folder: Path) -> None:
    """Writes the folder: weights in half precision, configuration, processor, card, results and sample image.

    The code is left out, as the checkpoint is part of the package.
    """
    save_pretrained(model.half(), processor, folder, facts=card_facts(results), model_id=NAME)
    for code in folder.glob("*.py"):
        code.unlink()
    for path in folder.glob("*config.json"):
        content = without_auto_map(json.loads(path.read_text(encoding="utf-8")))
        if path.name == "config.json":
            content["dtype"] = "float32"  # stored in half precision, loaded in single
        write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "results.json", json.dumps(results, indent=2) + "\n")
    draw_scene(SAMPLE_SEED, (512, 384), SAMPLE).image.save(folder / "sample.png")


def without_auto_map(content: Any) -> Any:
    """A configuration without its entries about remote code."""
    if isinstance(content, dict):
        return {key: without_auto_map(value) for key, value in content.items() if key != "auto_map"}
    return content


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "san_hf" / "checkpoints" / NAME, help="folder to write")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / NAME, help="folder for the CLIP alone")
    parser.add_argument("--reuse-clip", action="store_true", help="go on from the CLIP that an earlier run left there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps of everything, to show that it runs")
    arguments = parser.parse_args(argv)
    recipe = FAST if arguments.fast else FULL
    start = time.time()

    clip_folder = arguments.work_dir / "clip"
    if not arguments.reuse_clip:
        tokenizer = train_tokenizer()
        train_clip(tokenizer, arguments.seed, recipe.clip).save_pretrained(clip_folder)
        tokenizer.save_pretrained(clip_folder)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    results: dict[str, Any] = zero_shot_accuracy(
        CLIPModel.from_pretrained(clip_folder), tokenizer, arguments.seed, recipe.zero_shot_rounds
    )
    print(f"clip, photographs of one object: {results}; {time.time() - start:.0f} s", flush=True)

    processor = build_processor(tokenizer)
    model = train_san(clip_folder, processor, recipe.pages, recipe.san_steps, arguments.seed)
    model.set_vocabulary(list(CLASS_NAMES), **processor(text=list(CLASS_NAMES)))
    model.half().float()  # what is measured is what the files hold
    results |= {"test_pages": recipe.test_pages, **measure(model, processor, recipe.test_pages)}
    print(json.dumps(results, indent=2), flush=True)
    save(model, processor, results, arguments.output)
    print(f"{arguments.output} is complete after {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()
