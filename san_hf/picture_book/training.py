"""How a tiny CLIP and a tiny SAN learn from the picture book: captions for the one, masks for the other.

The embedded checkpoint is made with it, and the benchmark of SAN's parts. In order:
1. `train_tokenizer`: a byte-level BPE in CLIP's manner, on the book's captions;
2. `train_clip`: contrastively, on pictures with captions, of base and novel compositions alike;
3. `train_san`: on the frozen CLIP, on pages with masks that show base compositions only;
4. `measure`: mIoU on novel against base compositions, on pages that show both.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

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

from san_hf.inference import Predictor
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.modeling.prompts_san import PROMPT_TEMPLATES
from san_hf.picture_book import scenes as book
from san_hf.training.optimization import parameter_groups


TEMPLATES = PROMPT_TEMPLATES["vild"]
CAPTIONS = (*TEMPLATES, "a {}", "the {}", "{}")

PHOTO_SIZE = 96
CLIP_PATCH_SIZE = 8
CLIP_WIDTH = 128
TEXT_WIDTH = 96
# Beside one picture of each class, which differ from each other in one word, a batch has some of several objects.
CROWDED = 35
# Of the patches of a picture, as in FLIP (Li et al., arXiv 2212.00794): faster, and a CLIP that has learned to do with
# some of the patches is at home where attention biases hide the others.
KEPT_PATCHES = 0.5


@dataclass(frozen=True)
class CLIPPhase:
    """A part of CLIP's training, with a learning rate that rises and falls."""

    photos: int  # pictures that are drawn of each class
    steps: int  # of one picture of each class and `CROWDED` others
    steps_with_few_patches: int  # how many of them, from the first on, see `KEPT_PATCHES` only
    learning_rate: float


CLIP_PHASES = (CLIPPhase(300, 2000, 1700, 1.5e-3), CLIPPhase(200, 400, 0, 7.5e-4))

SAN_LEARNING_RATE = 1e-3
# What the attention biases are multiplied with at first. At 1, the recognition tokens of so small a model see but a few
# patches, from which a colour can be told, but not a shape.
BIAS_SCALE = 0.1
SAN: dict[str, Any] = {
    "image_size": book.PAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_queries": 16,
    # A CLIP this shallow has mixed things and their surroundings after few layers, so recognition starts early.
    "recognition_layer": 1,
    "fusion_layers": [[0, 0], [1, 1]],
    "deep_supervision_layers": [3, 4],
    "clip_image_scale": PHOTO_SIZE / book.PAGE_SIZE,
    "mask_embed_dim": 64,
    "decoder_hidden_size": 64,
    "num_bias_heads": 1,
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
    trainer = BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


def build_processor(tokenizer: CLIPTokenizer) -> SANProcessor:
    """The processor of a SAN of pages."""
    size = {"shortest_edge": book.PAGE_SIZE, "longest_edge": 4 * book.PAGE_SIZE}
    return SANProcessor(image_processor=SANImageProcessor(size=size), tokenizer=tokenizer)


def train_clip(tokenizer: CLIPTokenizer, seed: int, phases: Sequence[CLIPPhase] = CLIP_PHASES) -> CLIPModel:
    """
    Contrastive training on pictures and captions.

    Args:
        tokenizer: for the captions.
        seed: of pictures, weights and order.
        phases: how much of what, one after the other.

    Returns:
        The model in evaluation mode, float32.
    """
    set_seed(seed)
    clip = CLIPModel(_clip_config(tokenizer))
    for number, phase in enumerate(phases):
        _train_clip_phase(clip, tokenizer, phase, seed, number)
    return clip.eval()


def _train_clip_phase(clip: CLIPModel, tokenizer: CLIPTokenizer, phase: CLIPPhase, seed: int, number: int) -> None:
    jobs = []
    for i, name in enumerate(book.COMPOSITIONS * phase.photos):
        jobs.append(([seed, 3 * number + 1, i], name, (0, 0, 1, 2)[i // len(book.COMPOSITIONS) % 4]))
    jobs += [([seed, 3 * number + 2, i], name, 0) for i, name in enumerate(book.STUFF * phase.photos)]
    drawn = _draw_all(_draw_photo, jobs)
    photos = torch.from_numpy(np.stack([photo for photo, _ in drawn]))
    contents = [content for _, content in drawn]
    by_class = [[i for i, job in enumerate(jobs) if job[1] == name] for name in book.CLASS_NAMES]
    crowded = [i for i, (_, things, _) in enumerate(contents) if len(things) > 1]

    rng = np.random.default_rng([seed, number])
    decayed = [p for p in clip.parameters() if p.ndim > 1]
    others = [p for p in clip.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=phase.learning_rate,
        betas=(0.9, 0.98),
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(100, phase.steps // 3), phase.steps)
    start, hits, losses = time.time(), [], []
    for step in range(1, phase.steps + 1):
        chosen = [*(int(rng.choice(photos_of)) for photos_of in by_class), *map(int, rng.choice(crowded, CROWDED))]
        pixels = normalize(photos[chosen])
        mirrored = torch.from_numpy(rng.random(len(chosen)) < 0.5)
        pixels[mirrored] = pixels[mirrored].flip(-1)
        captions = [_describe(rng, *contents[i]) for i in chosen]
        # "a red car and a blue house" is not "a blue car and a red house" (Yuksekgonul et al., arXiv 2210.01936): who
        # tells them apart looks at which patch has which colour.
        wrong = [_swap_attributes(contents[i][1]) for i in chosen]
        captions += [
            _describe(rng, contents[i][0], things, contents[i][2])
            for i, things in zip(chosen, wrong)
            if set(things) != set(contents[i][1])
        ]
        texts = tokenizer(captions, padding=True, return_tensors="pt")

        hidden_states = clip.vision_model.embeddings(pixels)
        if step <= phase.steps_with_few_patches:
            hidden_states = _drop_patches(rng, hidden_states)
        hidden_states = clip.vision_model.pre_layrnorm(hidden_states)
        class_tokens = clip.vision_model.encoder(inputs_embeds=hidden_states).last_hidden_state[:, 0]
        image_embeds = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(class_tokens)), dim=-1)
        text_embeds = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)
        logits = clip.logit_scale.exp() * image_embeds @ text_embeds.T  # pictures x captions, the wrong ones last
        own = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(chosen)].T, own)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))  # as CLIP's authors do
        losses.append(loss.item())
        hits.append((logits.argmax(1) == own).float().mean().item())
        if step % 100 == 0 or step == phase.steps:
            print(
                f"clip step {step}: loss {np.mean(losses[-100:]):.3f}, pictures matched {np.mean(hits[-100:]):.1%}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )


@torch.no_grad()
def zero_shot_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int, rounds: int) -> dict[str, float]:
    """Share, in percent, of unseen pictures of one object whose name is the nearest of all class names."""
    jobs = [([seed, 3, r, i], name, 0) for r in range(rounds) for i, name in enumerate(book.COMPOSITIONS)]
    pixels = normalize(torch.from_numpy(np.stack([_draw_photo(job)[0] for job in jobs])))
    embeds = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    prompts = [template.format(name) for name in book.CLASS_NAMES for template in TEMPLATES]
    texts = tokenizer(prompts, padding=True, return_tensors="pt")
    names = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)
    names = F.normalize(names.unflatten(0, (len(book.CLASS_NAMES), len(TEMPLATES))).mean(1), dim=-1)
    nearest = (embeds @ names.T).argmax(1)
    hits: dict[str, list[bool]] = {"base": [], "novel": []}
    for (_, name, _), index in zip(jobs, nearest.tolist()):
        hits["novel" if name in book.NOVEL else "base"].append(book.CLASS_NAMES[index] == name)
    return {f"{name}_zero_shot": 100 * float(np.mean(values)) for name, values in hits.items()}


class Pages(Dataset):
    """
    Pages with masks of base compositions and stuff, mirrored half the time: `pixel_values` (3, H, W) float32 and
    `labels` (H, W), indices into `Pages.classes`.

    Args:
        count: how many are drawn.
        seed: of the pages.
    """

    classes = (*book.BASE, *book.STUFF)

    def __init__(self, count: int, seed: int):
        drawn = _draw_all(_draw_page, [[seed, 2, i] for i in range(count)])
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


def train_san(
    clip_folder: Path, processor: SANProcessor, pages: int, steps: int, seed: int, **changes: Any
) -> SANForSemanticSegmentation:
    """
    SAN on the frozen CLIP, by transformers' Trainer and the model's own loss.

    Args:
        clip_folder: where the CLIP lies.
        processor: the model's.
        pages: how many pages with masks are drawn.
        steps: of 8 pages.
        seed: of pages, weights, order and loss.
        **changes: to the configuration `SAN`, for ablations.

    Returns:
        The model in evaluation mode, float32, with the base compositions and stuff as its vocabulary.
    """
    set_seed(seed)
    model = SANForSemanticSegmentation.from_clip(clip_folder, **SAN | changes)
    # All of CLIP. Its position embeddings train in the paper; here CLIP sees grids of the size it has learned on.
    model.model.vision_model.requires_grad_(False)
    model.set_vocabulary(list(Pages.classes), **processor(text=list(Pages.classes), return_tensors="pt"))
    if (scaling := model.model.mask_decoder.bias_scaling) is not None:
        torch.nn.init.constant_(scaling.weight, BIAS_SCALE)
    arguments = TrainingArguments(
        output_dir=clip_folder.parent / "san-training",
        max_steps=steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 3),
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        logging_steps=min(100, steps),
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=SAN_LEARNING_RATE)
    Trainer(model, arguments, train_dataset=Pages(pages, seed), optimizers=(optimizer, None)).train()
    return model.eval()


@torch.no_grad()
def measure(
    model: SANForSemanticSegmentation, processor: SANProcessor, pages: int, seed: int = book.TEST_SEED
) -> dict[str, float]:
    """What [`san_hf.picture_book.scenes.measure`] says of the model, every class name of the book competing."""
    names = list(book.CLASS_NAMES)
    predictor = Predictor(model, processor)
    vocabulary = predictor.vocabulary(names)

    def segment(image: Image.Image) -> np.ndarray:
        return predictor([image], vocabulary)[0].numpy()

    return book.measure(segment, pages, seed)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) uint8 to float32, normalised with CLIP's mean and standard deviation."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels.float() - mean) / std


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    end = tokenizer.eos_token_id
    return CLIPConfig(
        projection_dim=TEXT_WIDTH,
        vision_config={
            "hidden_size": CLIP_WIDTH,
            "intermediate_size": 3 * CLIP_WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": PHOTO_SIZE,
            "patch_size": CLIP_PATCH_SIZE,
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
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    )


def _draw_all(draw, jobs) -> list:
    """Draws in two processes. They are forked, so they must not touch torch, whose threads don't survive that."""
    with Pool(2) as pool:
        return pool.map(draw, jobs, chunksize=64)


def _draw_photo(job):
    """Job (seed, subject, others) to the picture's pixels and its content (subject, things, stuff)."""
    image, things, stuff = book.draw_photo(*job[:2], PHOTO_SIZE, job[2])
    return _to_array(image), (job[1], things, stuff)


def _draw_page(seed):
    """Pixels and label map of a page without novel compositions."""
    page = book.draw_scene(seed, choose_from=book.BASE)
    return _to_array(page.image), page.label_map


def _to_array(image: Image.Image) -> np.ndarray:
    """PIL image to (3, H, W) uint8."""
    return np.array(image).transpose(2, 0, 1)


def _describe(rng: np.random.Generator, subject: str, things: Sequence[str], stuff: Sequence[str]) -> str:
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


def _swap_attributes(things: Sequence[str]) -> tuple[str, ...]:
    """Each object with the next one's attribute."""
    attributes, objects = [name.split(" ")[0] for name in things], [name.split(" ")[1] for name in things]
    return tuple(f"{attribute} {thing}" for attribute, thing in zip(attributes[1:] + attributes[:1], objects))


def _drop_patches(rng: np.random.Generator, hidden_states: torch.Tensor) -> torch.Tensor:
    """Of the tokens (B, 1 + N, W), class token first, the class token and a random share of the others."""
    batch_size, num_tokens, width = hidden_states.shape
    order = torch.from_numpy(rng.random((batch_size, num_tokens - 1))).argsort(dim=1)
    kept = 1 + order[:, : int(KEPT_PATCHES * (num_tokens - 1))]
    kept = torch.cat([kept.new_zeros(batch_size, 1), kept], dim=1)
    return hidden_states.gather(1, kept[:, :, None].expand(-1, -1, width))
