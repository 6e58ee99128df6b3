"""A tiny CLIP of the picture book: its tokenizer, its contrastive training on photographs and captions."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from san_hf.modeling.prompts_san import PROMPT_TEMPLATES
from san_hf.picture_book.objects import CLASS_NAMES, COMPOSITIONS, NOVEL, STUFF
from san_hf.picture_book.scenes import draw_photo, draw_scene


TEMPLATES = PROMPT_TEMPLATES["vild"]
CAPTIONS = (*TEMPLATES, "a {}", "the {}", "{}")

PHOTO_SIZE = 96
CLIP_PATCH_SIZE = 8
CLIP_WIDTH = 128
TEXT_WIDTH = 96
# A batch has one photograph of each class, whose captions differ in one word, and this many of several objects.
SEVERAL_OBJECTS = 35
# The share of an image's patches that CLIP sees, as in FLIP (Li et al., arXiv 2212.00794). It is faster; and SAN's
# attention biases hide patches, too, so CLIP learns to recognise an object from some of them.
KEPT_PATCHES = 0.5


PhotoJob = tuple[list[int], str, int]  # seed, subject, number of other objects
Content = tuple[str, tuple[str, ...], tuple[str, ...]]  # subject, objects and stuff of a photograph


@dataclass(frozen=True)
class CLIPPhase:
    """A part of CLIP's training, with a learning rate schedule of its own: linear warm-up, then cosine decay."""

    photos: int  # drawn of each class
    steps: int  # batches of one photograph of each class and `SEVERAL_OBJECTS` others
    steps_with_few_patches: int  # the number of first steps in which CLIP sees `KEPT_PATCHES` of the patches
    learning_rate: float  # the highest


CLIP_PHASES = (CLIPPhase(300, 2000, 1700, 1.5e-3), CLIPPhase(200, 400, 0, 7.5e-4))


def train_tokenizer() -> CLIPTokenizer:
    """
    A byte-level BPE tokenizer for the picture book's captions. Its vocabulary has CLIP's order: bytes, bytes that end a
    word, merges, special tokens.
    """
    texts = [caption.format(name) for name in CLASS_NAMES for caption in CAPTIONS]
    for i in range(200):
        rng = np.random.default_rng([3, i])
        names = [COMPOSITIONS[k] for k in rng.choice(len(COMPOSITIONS), rng.integers(2, 5), False)]
        texts.append(draw_scene(rng, (32, 32), names, scale=(0.32, 0.5)).caption)
    trained = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    # Transformers' annotation says strings, but its tokenizer is built from pairs.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)  # type: ignore[arg-type]


def train_clip(tokenizer: CLIPTokenizer, seed: int, phases: Sequence[CLIPPhase] = CLIP_PHASES) -> CLIPModel:
    """
    Contrastive training on photographs with captions, of base and novel compositions and of stuff.

    Args:
        tokenizer: for the captions.
        seed: of photographs, weights and order.
        phases: parts of the training, one after the other.

    Returns:
        The model in evaluation mode, float32.
    """
    set_seed(seed)
    clip = CLIPModel(_clip_config(tokenizer))
    for number, phase in enumerate(phases):
        _train_clip_phase(clip, tokenizer, phase, seed, number)
    return clip.eval()


def _train_clip_phase(clip: CLIPModel, tokenizer: CLIPTokenizer, phase: CLIPPhase, seed: int, number: int) -> None:
    jobs: list[PhotoJob] = []
    for i, name in enumerate(COMPOSITIONS * phase.photos):
        jobs.append(([seed, 3 * number + 1, i], name, (0, 0, 1, 2)[i // len(COMPOSITIONS) % 4]))
    jobs += [([seed, 3 * number + 2, i], name, 0) for i, name in enumerate(STUFF * phase.photos)]
    drawn = draw_all(_draw_photo, jobs)
    photos = torch.from_numpy(np.stack([photo for photo, _ in drawn]))
    contents = [content for _, content in drawn]
    by_class = [[i for i, job in enumerate(jobs) if job[1] == name] for name in CLASS_NAMES]
    of_several = [i for i, (_, things, _) in enumerate(contents) if len(things) > 1]

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
        chosen = [
            *(int(rng.choice(photos_of)) for photos_of in by_class),
            *map(int, rng.choice(of_several, SEVERAL_OBJECTS)),
        ]
        pixels = normalize(photos[chosen])
        mirrored = torch.from_numpy(rng.random(len(chosen)) < 0.5)
        pixels[mirrored] = pixels[mirrored].flip(-1)
        captions = [_describe(rng, *contents[i]) for i in chosen]
        # Negatives: "a blue car and a red house" for "a red car and a blue house" (Yuksekgonul et al., arXiv
        # 2210.01936). To tell them apart, CLIP has to learn which patch has which colour.
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
        logits = (
            clip.logit_scale.exp() * image_embeds @ text_embeds.T
        )  # (photographs, captions), the wrong captions last
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
                f"clip step {step}: loss {np.mean(losses[-100:]):.3f}, photos matched {np.mean(hits[-100:]):.1%}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )


@torch.no_grad()
def zero_shot_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, seed: int, rounds: int) -> dict[str, float]:
    """
    Zero-shot accuracy on new photographs of one object, among all class names.

    Args:
        clip: in evaluation mode, float32.
        tokenizer: the model's.
        seed: of the photographs.
        rounds: number of photographs of each composition.

    Returns:
        `base_zero_shot` and `novel_zero_shot`, in percent.
    """
    jobs = [([seed, 3, r, i], name, 0) for r in range(rounds) for i, name in enumerate(COMPOSITIONS)]
    pixels = normalize(torch.from_numpy(np.stack([_draw_photo(job)[0] for job in jobs])))
    embeds = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    prompts = [template.format(name) for name in CLASS_NAMES for template in TEMPLATES]
    texts = tokenizer(prompts, padding=True, return_tensors="pt")
    names = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)
    names = F.normalize(names.unflatten(0, (len(CLASS_NAMES), len(TEMPLATES))).mean(1), dim=-1)
    nearest = (embeds @ names.T).argmax(1)
    hits: dict[str, list[bool]] = {"base": [], "novel": []}
    for (_, name, _), index in zip(jobs, nearest.tolist()):
        hits["novel" if name in NOVEL else "base"].append(CLASS_NAMES[index] == name)
    return {f"{name}_zero_shot": 100 * float(np.mean(values)) for name, values in hits.items()}


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


def draw_all(draw: Callable[[Any], Any], jobs: Sequence[Any]) -> list:
    """
    Applies a drawing function to each job, in two processes, in the order of the jobs.

    The processes are forked, and torch's threads do not survive a fork: `draw` must not use torch.
    """
    with Pool(2) as pool:
        return pool.map(draw, jobs, chunksize=64)


def _draw_photo(job: PhotoJob) -> tuple[np.ndarray, Content]:
    """The pixels of a photograph, (3, H, W) uint8, and what it shows."""
    seed, subject, others = job
    image, things, stuff = draw_photo(seed, subject, PHOTO_SIZE, others)
    return to_array(image), (subject, things, stuff)


def to_array(image: Image.Image) -> np.ndarray:
    """PIL image to (3, H, W) uint8."""
    return np.array(image).transpose(2, 0, 1)


def _describe(rng: np.random.Generator, subject: str, things: Sequence[str], stuff: Sequence[str]) -> str:
    """A caption: the objects in random order, half of the time with the stuff too; or the stuff alone."""
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
    """(B, 1 + N, W) tokens, the class token first, to the class token and a random `KEPT_PATCHES` of the others."""
    batch_size, num_tokens, width = hidden_states.shape
    order = torch.from_numpy(rng.random((batch_size, num_tokens - 1))).argsort(dim=1)
    kept = 1 + order[:, : int(KEPT_PATCHES * (num_tokens - 1))]
    kept = torch.cat([kept.new_zeros(batch_size, 1), kept], dim=1)
    return hidden_states.gather(1, kept[:, :, None].expand(-1, -1, width))
