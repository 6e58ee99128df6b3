"""Makes the embedded checkpoint, `san_hf/checkpoints/picture-book`, from a seed: about an hour on two CPU cores.

A tokenizer, a tiny CLIP and a tiny SAN, each trained on the pages of `san_hf.data.picture_book`:
1. a byte-level BPE tokenizer in CLIP's manner, on the book's captions;
2. CLIP, contrastively, on pictures with captions, of base and novel compositions alike;
3. SAN on the frozen CLIP, on pages with masks that show base compositions only;
4. mIoU on novel against base compositions, on test pages that show both.

    python scripts/make_embedded_checkpoint.py
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.utils.data import Dataset
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from san_hf.cards import load_facts
from san_hf.data import picture_book as book
from san_hf.hub import save_pretrained
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.modeling.processing_san import PROMPT_TEMPLATES


NAME = "picture-book"
ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = PROMPT_TEMPLATES["vild"]
CAPTIONS = (*TEMPLATES, "a {}", "the {}", "{}")


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    photos: int  # pictures with captions, for each class
    clip_steps: int
    pages: int  # pages with masks
    san_steps: int
    test_pages: int


FULL = Recipe(photos=300, clip_steps=1800, pages=6000, san_steps=2500, test_pages=150)
FAST = Recipe(photos=4, clip_steps=3, pages=8, san_steps=3, test_pages=4)

PHOTO_SIZE = 64
CLIP_WIDTH = 128
TEXT_WIDTH = 96
# Beside one picture of each class, which differ from each other in one word, a batch has some of several objects.
CROWDED = 27
CLIP_LEARNING_RATE = 1.5e-3

IMAGE_SIZE = 128  # shortest edge that SAN works at
SAMPLE_SEED = (31, 58)
SAMPLE = ("white ball", "blue car", "red car")  # novel, novel, base
SAN = {
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "num_queries": 16,
    # A CLIP this shallow has mixed things and their surroundings after few layers, so recognition starts early.
    "recognition_layer": 1,
    "fusion_layers": [[0, 0], [1, 1]],
    "deep_supervision_layers": [3, 4],
    "clip_image_scale": 0.75,
    "mask_embed_dim": 64,
    "decoder_hidden_size": 64,
    "train_num_points": 1024,
}


def train_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE like CLIP's, vocabulary laid out like CLIP's: bytes, bytes that end a word, merges, specials."""
    texts = [caption.format(name) for name in book.CLASS_NAMES for caption in CAPTIONS]
    for i in range(200):
        rng = np.random.default_rng([3, i])
        names = [book.COMPOSITIONS[k] for k in rng.choice(len(book.COMPOSITIONS), rng.integers(2, 5), False)]
        texts.append(book.draw_scene(rng, (32, 32), names, scale=(0.32, 0.5)).caption)
    trained = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


def to_array(image: Image.Image) -> np.ndarray:
    """PIL image to (3, H, W) uint8."""
    return np.array(image).transpose(2, 0, 1)


def draw_all(draw, jobs) -> list:
    """Draws in two processes. They are forked, so they must not touch torch, whose threads don't survive that."""
    with Pool(2) as pool:
        return pool.map(draw, jobs, chunksize=64)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) uint8 to float32, normalised with CLIP's mean and standard deviation."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels.float() - mean) / std


def draw_photo(job):
    """Job (seed, subject, others) to the picture's pixels and its content."""
    image, things, stuff = book.draw_photo(*job[:2], PHOTO_SIZE, job[2])
    return to_array(image), (job[1], things, stuff)


def describe(rng: np.random.Generator, subject: str, things: tuple[str, ...], stuff: tuple[str, ...]) -> str:
    """A caption: the objects in any order, half the time with where they are; or the stuff."""
    if things:
        first, *others = [things[i] for i in rng.permutation(len(things))]
        text = ", ".join([first, *(f"a {thing}" for thing in others[:-1])])
        text += "".join(f" and a {thing}" for thing in others[-1:])
        if stuff and rng.random() < 0.5:
            text += " with " + " and ".join(stuff[i] for i in rng.permutation(len(stuff)))
    else:
        text = " and ".join(dict.fromkeys([subject, *stuff]))
    return CAPTIONS[rng.integers(len(CAPTIONS))].format(text)


@torch.no_grad()
def encode_names(clip: CLIPModel, tokenizer: CLIPTokenizer, names: list[str]) -> torch.Tensor:
    """Class embeddings (C, D): normalised mean over the prompt templates."""
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    prompts = tokenizer(prompts, padding=True, return_tensors="pt")
    embeds = F.normalize(clip.get_text_features(**prompts).pooler_output, dim=-1)
    return F.normalize(embeds.unflatten(0, (len(names), len(TEMPLATES))).mean(1), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int, rounds: int) -> dict[str, float]:
    """Share, in percent, of unseen pictures of one object whose name is the nearest of all class names."""
    jobs = [([seed, 3, r, i], name, 0) for r in range(rounds) for i, name in enumerate(book.COMPOSITIONS)]
    pixels = normalize(torch.from_numpy(np.stack([to_array(book.draw_photo(*job[:2], PHOTO_SIZE)[0]) for job in jobs])))
    embeds = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    nearest = (embeds @ encode_names(clip, tokenizer, book.CLASS_NAMES).T).argmax(1)
    hits = {name: [] for name in ("base", "novel")}
    for (_, name, _), index in zip(jobs, nearest.tolist()):
        hits["novel" if name in book.NOVEL else "base"].append(book.CLASS_NAMES[index] == name)
    return {f"{name}_zero_shot": 100 * float(np.mean(values)) for name, values in hits.items()}


def train_clip(tokenizer: CLIPTokenizer, recipe: Recipe, seed: int) -> CLIPModel:
    """Contrastive training on pictures and captions."""
    set_seed(seed)
    rng = np.random.default_rng(seed)
    jobs = []
    for i, name in enumerate(book.COMPOSITIONS * recipe.photos):
        jobs.append(([seed, 1, i], name, (0, 0, 1, 2)[i // len(book.COMPOSITIONS) % 4]))
    jobs += [([seed, 2, i], name, 0) for i, name in enumerate(book.STUFF * recipe.photos)]
    drawn = draw_all(draw_photo, jobs)
    photos = torch.from_numpy(np.stack([photo for photo, _ in drawn]))
    contents = [content for _, content in drawn]
    by_class = [[i for i, job in enumerate(jobs) if job[1] == name] for name in book.CLASS_NAMES]
    crowded = [i for i, (_, things, _) in enumerate(contents) if len(things) > 1]

    end = tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        projection_dim=TEXT_WIDTH,
        vision_config={
            "hidden_size": CLIP_WIDTH,
            "intermediate_size": 3 * CLIP_WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": PHOTO_SIZE,
            "patch_size": 8,
            "projection_dim": TEXT_WIDTH,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 3 * TEXT_WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": tokenizer.model_max_length,
            "projection_dim": TEXT_WIDTH,
            **ids,
        },
    )
    clip = CLIPModel(config)
    decayed = [p for p in clip.parameters() if p.ndim > 1]
    others = [p for p in clip.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=CLIP_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(100, recipe.clip_steps // 3), recipe.clip_steps)
    start, hits, losses = time.time(), [], []
    for step in range(1, recipe.clip_steps + 1):
        chosen = [*(int(rng.choice(photos_of)) for photos_of in by_class), *map(int, rng.choice(crowded, CROWDED))]
        pixels = normalize(photos[chosen])
        mirrored = torch.from_numpy(rng.random(len(chosen)) < 0.5)
        pixels[mirrored] = pixels[mirrored].flip(-1)
        texts = tokenizer([describe(rng, *contents[i]) for i in chosen], padding=True, return_tensors="pt")
        outputs = clip(**texts, pixel_values=pixels, return_loss=True)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))  # as CLIP's authors do
        losses.append(outputs.loss.item())
        hits.append((outputs.logits_per_image.argmax(1) == torch.arange(len(chosen))).float().mean().item())
        if step % 100 == 0 or step == recipe.clip_steps:
            print(
                f"clip step {step}: loss {np.mean(losses[-100:]):.3f}, pictures matched {np.mean(hits[-100:]):.1%}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
    return clip.eval()


class Pages(Dataset):
    """Pages with masks of base compositions and stuff, mirrored half the time."""

    classes = (*book.BASE, *book.STUFF)

    def __init__(self, count: int, seed: int):
        drawn = draw_all(draw_page, [[seed, 2, i] for i in range(count)])
        self.pixels = torch.from_numpy(np.stack([pixels for pixels, _ in drawn]))
        label_maps = torch.from_numpy(np.stack([label_map for _, label_map in drawn])).long()
        to_training = torch.full((len(book.CLASS_NAMES),), -1)
        to_training[[book.CLASS_NAMES.index(name) for name in self.classes]] = torch.arange(len(self.classes))
        self.labels = to_training[label_maps]
        if (self.labels < 0).any():
            raise RuntimeError("A training page shows a novel composition.")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels, labels = self.pixels[index], self.labels[index]
        if torch.rand(()) < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return {"pixel_values": normalize(pixels), "labels": labels}


def draw_page(seed):
    """Pixels and label map of a page without novel compositions."""
    page = book.draw_scene(seed, (IMAGE_SIZE, IMAGE_SIZE), choose_from=book.BASE)
    return to_array(page.image), page.label_map


def train_san(clip_folder: Path, processor: SANProcessor, recipe: Recipe, seed: int) -> SANForSemanticSegmentation:
    """SAN on the frozen CLIP, by transformers' Trainer and the model's own loss."""
    set_seed(seed)
    model = SANForSemanticSegmentation.from_clip(clip_folder, **SAN)
    model.set_vocabulary(list(Pages.classes), **processor(text=list(Pages.classes), return_tensors="pt"))
    arguments = TrainingArguments(
        output_dir=clip_folder.parent / "san-training",
        max_steps=recipe.san_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        weight_decay=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, recipe.san_steps // 3),
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=True,
        remove_unused_columns=False,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        logging_steps=min(100, recipe.san_steps),
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Pages(recipe.pages, seed)).train()
    return model.eval()


def measure(model: SANForSemanticSegmentation, processor: SANProcessor, pages: int) -> dict[str, float]:
    """mIoU on test pages, every class name of the book competing."""
    names = list(book.CLASS_NAMES)
    with torch.no_grad():
        class_embeds = model.get_class_embeds(**processor(text=names, return_tensors="pt"))

    def segment(image):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"), class_embeds=class_embeds)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].numpy()

    return book.measure(segment, pages)


def save(model: SANForSemanticSegmentation, processor: SANProcessor, results: dict, folder: Path) -> None:
    """Writes the folder: weights in half precision, everything else, card, figures and sample picture.

    The model's code is linked, not copied: here it lies beside the folder, and two copies would drift apart.
    """
    for code in folder.glob("*.py"):
        code.unlink()
    rows = [
        {"dataset": f"picture book, {kind}", "mIoU": round(results[f"{key}_miou"], 1)}
        for kind, key in (("base compositions", "base"), ("novel compositions", "novel"), ("surroundings", "stuff"))
    ]
    save_pretrained(model.half(), processor, folder, facts=load_facts(NAME) | {"results": rows})
    for code in folder.glob("*.py"):
        code.unlink()
        code.symlink_to(os.path.relpath(ROOT / "modeling" / code.name, folder.resolve()))
    # Stored in half precision, loaded in single.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    book.draw_scene(SAMPLE_SEED, (512, 384), SAMPLE).image.save(folder / "sample.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "san_hf" / "checkpoints" / NAME, help="folder to write")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / NAME, help="folder for the CLIP alone")
    parser.add_argument("--reuse-clip", action="store_true", help="go on from the CLIP that an earlier run left there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few steps of everything, to show that it runs")
    arguments = parser.parse_args()
    recipe = FAST if arguments.fast else FULL
    torch.set_num_threads(2)
    start = time.time()

    clip_folder = arguments.work_dir / "clip"
    if not arguments.reuse_clip:
        tokenizer = train_tokenizer()
        train_clip(tokenizer, recipe, arguments.seed).save_pretrained(clip_folder)
        tokenizer.save_pretrained(clip_folder)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    results = zero_shot_accuracy(CLIPModel.from_pretrained(clip_folder), tokenizer, arguments.seed, rounds=4)
    print(f"clip, pictures of one object: {results}; {time.time() - start:.0f} s", flush=True)

    processor = SANProcessor(
        image_processor=SANImageProcessor(size={"shortest_edge": IMAGE_SIZE, "longest_edge": 4 * IMAGE_SIZE}),
        tokenizer=tokenizer,
    )
    model = train_san(clip_folder, processor, recipe, arguments.seed)
    model.set_vocabulary(list(book.CLASS_NAMES), **processor(text=list(book.CLASS_NAMES), return_tensors="pt"))
    model.half().float()  # what is measured is what the files hold
    results |= {"test_pages": recipe.test_pages, **measure(model, processor, recipe.test_pages)}
    print(json.dumps(results, indent=2), flush=True)
    save(model, processor, results, arguments.output)
    print(f"{arguments.output} is complete after {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()
