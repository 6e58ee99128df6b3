"""A tiny SAN of the picture book: its training on pages with masks, on a frozen CLIP, with transformers' Trainer."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import CLIPTokenizer, Trainer, TrainingArguments, set_seed

from san_hf.hub import from_pretrained
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.picture_book.clip import PHOTO_SIZE, draw_all, normalize, to_array
from san_hf.picture_book.objects import BASE, CLASS_NAMES, STUFF
from san_hf.picture_book.scenes import PAGE_SIZE, draw_scene
from san_hf.training.model import freeze_text_tower
from san_hf.training.optimization import parameter_groups


SAN_LEARNING_RATE = 1e-3
FINE_TUNING_RATE = SAN_LEARNING_RATE / 5  # as in the recipe `finetune`, whose rate is a fifth of the paper's
BATCH_SIZE = 8
# The configuration, see `SANConfig`.
SAN: dict[str, Any] = {
    "image_size": PAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_queries": 16,
    # In a CLIP of few layers, patches of things and stuff mix early, so recognition starts early.
    "recognition_layer": 1,
    "fusion_layers": [[0, 0], [1, 1]],
    "deep_supervision_layers": [3, 4],
    "clip_image_scale": PHOTO_SIZE / PAGE_SIZE,
    "mask_embed_dim": 64,
    "decoder_hidden_size": 64,
    "num_bias_heads": 1,
    "train_num_points": 1024,
}


def build_processor(tokenizer: CLIPTokenizer) -> SANProcessor:
    """A SAN processor for pages: their size, and the tokenizer of the CLIP."""
    size = {"shortest_edge": PAGE_SIZE, "longest_edge": 4 * PAGE_SIZE}
    return SANProcessor(image_processor=SANImageProcessor(size=size), tokenizer=tokenizer)


class Pages(Dataset):
    """
    A training set: pages with base compositions and stuff, mirrored half of the time. An example has `pixel_values`
    (3, H, W) float32 and `labels` (H, W) int64, indices into `classes`.

    Args:
        count: number of pages.
        seed: of the pages.
        compositions: what they show.
    """

    def __init__(self, count: int, seed: int, compositions: Sequence[str] = BASE):
        self.classes = [*compositions, *STUFF]
        drawn = draw_all(partial(_draw_page, compositions=compositions), [[seed, 2, i] for i in range(count)])
        self.pixels = torch.from_numpy(np.stack([pixels for pixels, _ in drawn]))
        label_maps = torch.from_numpy(np.stack([label_map for _, label_map in drawn])).long()
        to_training = torch.full((len(CLASS_NAMES),), -1)
        to_training[[CLASS_NAMES.index(name) for name in self.classes]] = torch.arange(len(self.classes))
        self.labels = to_training[label_maps]
        if (self.labels < 0).any():
            raise RuntimeError("A training page shows a composition that it shouldn't.")

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
    Trains a SAN on a frozen CLIP, with the model's own loss.

    Args:
        clip_folder: a saved CLIP.
        processor: see [`build_processor`].
        pages: number of pages with masks.
        steps: number of optimizer steps; a batch has `BATCH_SIZE` pages.
        seed: of pages, weights, order and the loss's random points.
        **changes: values to replace in the configuration `SAN`, for ablations.

    Returns:
        The model in evaluation mode, float32, with the base compositions and stuff as its vocabulary.
    """
    set_seed(seed)
    model = SANForSemanticSegmentation.from_clip(str(clip_folder), **SAN | changes)
    _freeze_vision_tower(model)
    _train(model, processor, Pages(pages, seed), steps, seed, SAN_LEARNING_RATE)
    return model


def fine_tune_san(
    checkpoint: str | Path,
    pages: int,
    steps: int,
    seed: int,
    *,
    freeze_clip: bool = True,
    lora: dict[str, Any] | None = None,
    clip_learning_rate: float | None = None,
    compositions: Sequence[str] = BASE,
) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """
    Trains a SAN of the picture book further, on new pages, at `FINE_TUNING_RATE`. Text is not trained.

    Args:
        checkpoint: name or folder of the model.
        pages, steps, seed: see [`train_san`]. The embedded checkpoint has seen the pages of seed 0.
        freeze_clip: `False` trains CLIP's vision tower, too.
        lora: arguments of PEFT's `LoraConfig`, for LoRA weights in CLIP.
        clip_learning_rate: of what is trained of CLIP or in it; `None` for `FINE_TUNING_RATE`.
        compositions: what the pages show; these and stuff are the only classes in training.

    Returns:
        The model in evaluation mode, float32, with these classes as its vocabulary; and its processor.

    Raises:
        ImportError: for `lora`, PEFT isn't installed.
    """
    set_seed(seed)
    model, processor = from_pretrained(checkpoint, freeze_clip=freeze_clip)
    freeze_text_tower(model)
    if freeze_clip:
        _freeze_vision_tower(model)
    if lora is not None:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(**lora))
    _train(model, processor, Pages(pages, seed, compositions), steps, seed, FINE_TUNING_RATE, clip_learning_rate)
    return model, processor


def _freeze_vision_tower(model: SANForSemanticSegmentation) -> None:
    """All of it. The paper trains its position embeddings, but here CLIP sees grids of the size it was trained on."""
    model.model.vision_model.requires_grad_(False)


def _train(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    pages: Pages,
    steps: int,
    seed: int,
    learning_rate: float,
    clip_learning_rate: float | None = None,
) -> None:
    """Trains what isn't frozen, with the pages' classes as vocabulary. The model is then in evaluation mode."""
    model.set_vocabulary(pages.classes, **processor(text=pages.classes))
    optimizer = torch.optim.AdamW(parameter_groups(model, clip_learning_rate=clip_learning_rate), lr=learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
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
        Trainer(model, arguments, train_dataset=pages, optimizers=(optimizer, None)).train()
    model.eval()


def _draw_page(seed: list[int], compositions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, (3, H, W) uint8, and the label map, (H, W) uint8, of a page of these compositions only."""
    page = draw_scene(seed, choose_from=compositions)
    return to_array(page.image), page.label_map
