"""What `inference.py` measures: for each row, ours and the plain form, on inputs like a trained model's."""

import argparse
import copy
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import plain
import torch
import torch.nn.functional as F
from agreement import HALF_MARGIN, INT8_MARGIN, TOLERANCES, as_near, close, same_labels
from photos import draw_photo
from PIL import Image
from runtimes import make_predictor

from san_hf.conversion import RELEASES, clip_tokenizer
from san_hf.inference import Predictor, Segmenter, Vocabulary
from san_hf.inference.embeddings_cache import VARIABLE as CACHE_VARIABLE
from san_hf.modeling import SANConfig, SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.modeling.fast_linear_san import fast_linear
from san_hf.vocabularies import load_vocabulary


PLAIN_NAMES = 24  # The plain form encodes so many names, as each takes the same time: 77 tokens in every template.
PRESENT = 30  # classes in a realistic photograph


@dataclass(frozen=True)
class Sizes:
    """(height, width) in pixels: of the photograph to be scored, of the network's input, of a training crop; and the
    shortest edge that the processor makes of a photograph."""

    scored: tuple[int, int]
    input: tuple[int, int]
    crop: int
    edge: int


FULL = Sizes((1200, 1600), (640, 853), 640, 640)
SMALL = Sizes((150, 200), (96, 128), 96, 96)


def tiny_config() -> SANConfig:
    """A small SAN of B/16's structure, to try this script in seconds."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return SANConfig(
        clip_config={
            "projection_dim": 32,
            "text_config": tower | {"projection_dim": 32},
            "vision_config": tower | {"projection_dim": 32, "image_size": 48, "patch_size": 16},
        },
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=96,
        num_queries=40,
        fusion_layers=[[0, 0], [1, 1], [2, 2], [3, 3]],
        recognition_layer=3,
        deep_supervision_layers=[3, 4],
        mask_embed_dim=16,
        decoder_hidden_size=16,
        train_num_points=256,
    )


MODELS: dict[str, tuple[Callable[[], SANConfig], Sizes]] = {
    "b16": (RELEASES["san-vit-b-16"].config, FULL),
    "l14": (RELEASES["san-vit-large-14"].config, FULL),
    "tiny": (tiny_config, SMALL),
}


@torch.no_grad()
def sharpen(model: SANForSemanticSegmentation) -> None:
    """
    Makes random queries as different as a trained model's: in their masks and biases, and in what CLIP recognises; and
    CLIP as sure as it is. As they start, all queries are about alike, and so would be the labels of all pixels.
    """
    model.model.side_adapter.query_tokens.normal_(std=1.0)
    model.model.mask_decoder.query_mlp.layers[-1].weight.mul_(30)
    for layer in model.model.vision_model.encoder.layers[model.config.recognition_layer :]:
        for projection in (layer.self_attn.v_proj, layer.self_attn.out_proj):
            projection.weight.normal_(std=1.7 * projection.in_features**-0.5)
    model.model.mask_decoder.bias_scaling.weight.fill_(1.0)
    model.logit_scale.fill_(math.log(100))


class Setup:
    """What the rows of one model, runtime and dtype share, made when it is first used: most rows need little of it."""

    def __init__(self, options: argparse.Namespace, model: str, dtype: str, runtime: str):
        self.options, self.name, self.dtype_name, self.runtime = options, model, dtype, runtime
        self.make_config, self.sizes = MODELS[model]
        self.scored: tuple[int, int] = tuple(options.size or self.sizes.scored)
        self.device, self.dtype = torch.device(options.device), getattr(torch, dtype)

    def make_model(self, dtype: torch.dtype) -> SANForSemanticSegmentation:
        torch.manual_seed(0)
        model = SANForSemanticSegmentation._from_config(self.make_config(), dtype=dtype)
        sharpen(model)
        return model.to(self.device)

    @cached_property
    def model(self) -> SANForSemanticSegmentation:
        return self.make_model(self.dtype).eval()

    @cached_property
    def processor(self) -> SANProcessor:
        size = {"shortest_edge": self.sizes.edge, "longest_edge": 4 * self.sizes.edge}
        return SANProcessor(SANImageProcessor(size=size), clip_tokenizer())

    @cached_property
    def predictor(self) -> Predictor:
        return make_predictor(self)

    def photo(self, size: tuple[int, int]) -> Image.Image:
        return draw_photo(np.random.default_rng(0), 8, size)[0]

    def random_embeds(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        embeds = torch.randn(count, self.make_config().clip_embed_dim, generator=generator)
        return F.normalize(embeds, dim=-1).to(self.device)

    def vocabulary(self, classes: int) -> Vocabulary:
        """
        Classes such as a trained model has: up to `PRESENT` of them are what a query recognises in the photograph, the
        others are nowhere, and most queries are no object.
        """
        photo = self.predictor.prepare(self.photo(self.sizes.input))
        embeds = self.predictor.encode([photo])[0].views[0].mask_embeds.float()
        common = F.normalize(embeds.mean(0), dim=0)
        rows = self.random_embeds(classes + 1)
        present = min(PRESENT, classes, len(embeds) // 2)
        rows[:present] = embeds[:present]
        rows = F.normalize(rows - (rows @ common)[:, None] * common, dim=-1)
        # As near to all queries as a class is to its own, half of the way.
        own = (rows[:present] * embeds[:present]).sum(-1).mean()
        share = (own / 2 / (embeds @ common).mean()).clamp(max=1)
        no_object = share * common + (1 - share**2).sqrt() * rows[-1]
        with torch.no_grad():
            self.model.no_object_embed.copy_(no_object[None])
        names = tuple(f"class {number}" for number in range(classes))
        return Vocabulary(names, rows[:classes].to(self.dtype), classes)

    # The two ways from a photograph to a label map

    def plain_map(
        self, image: Image.Image, vocabulary: Vocabulary, exactly: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Label map and scores of the plain form; `exactly`, in float32."""
        edge, model = self.sizes.edge, copy.deepcopy(self.model).float() if exactly else self.model
        settings = self.processor.image_processor
        pixel_values, inside = plain.prepare(image, edge, 4 * edge, settings.image_mean, settings.image_std)
        pixel_values, class_embeds = pixel_values.to(self.device, model.dtype), vocabulary.class_embeds.to(model.dtype)
        last = model.config.deep_supervision_layers[-1:]
        with torch.inference_mode():
            ((masks, classes),) = plain.forward(model, pixel_values, class_embeds, last)
            padded = tuple(pixel_values.shape[-2:])
            return plain.label_map(masks[0], classes[0], padded, inside, (image.height, image.width))

    def close(self, got: torch.Tensor, expected: torch.Tensor) -> bool:
        return close(got, expected, self.dtype_name)


@dataclass(frozen=True)
class Case:
    """
    A row's two ways.

    ours, plain: do the work once and return its result.
    agree: whether two results are the same.
    scale: how much more ours does than plain, whose time is multiplied by it.
    new_process: whether ours is timed as the first thing in a process of its own.
    """

    ours: Callable[[], Any]
    plain: Callable[[], Any]
    agree: Callable[[Any, Any], bool]
    scale: float = 1.0
    new_process: bool = False


def forward(setup: Setup, classes: int | None) -> Case:
    prepared = setup.predictor.prepare(setup.photo(setup.sizes.input))
    pixel_values = prepared.views[0]["pixel_values"].to(setup.device, setup.dtype)
    class_embeds = setup.random_embeds(100).to(setup.dtype)
    model = setup.model
    last = model.config.deep_supervision_layers[-1:]

    @torch.inference_mode()
    def plainly() -> tuple[torch.Tensor, torch.Tensor]:
        return plain.forward(model, pixel_values, class_embeds, last)[0]

    def agree(encoded, expected) -> bool:
        (view,) = encoded[0].views
        logits = model.class_logits(view.mask_embeds, model.build_classifier(class_embeds=class_embeds))
        return setup.close(view.mask_logits, expected[0][0]) and setup.close(logits, expected[1][0])

    return Case(lambda: setup.predictor.encode([prepared]), plainly, agree)


def names_of(classes: int) -> list[str]:
    return load_vocabulary("coco-stuff" if classes <= 171 else "ade20k-847")[:classes]


def text(setup: Setup, classes: int) -> Case:
    names, model, processor = names_of(classes), setup.model, setup.processor
    few = names[:PLAIN_NAMES]

    def ours() -> torch.Tensor:
        with patch.dict(os.environ, {CACHE_VARIABLE: "off"}):  # for the first time, each time
            return setup.predictor.vocabulary(names).class_embeds

    @torch.inference_mode()
    def plainly() -> torch.Tensor:
        tokens = processor(text=few, padding="max_length").to(setup.device)
        return plain.encode_text(model, tokens["input_ids"])

    return Case(ours, plainly, lambda got, expected: setup.close(got[: len(few)], expected), len(names) / len(few))


def text_again(setup: Setup, classes: int) -> Case:
    """Every process of the benchmark has the cache's folder from the first one."""
    case, predictor = text(setup, classes), setup.predictor
    return replace(case, ours=lambda: predictor.vocabulary(names_of(classes)).class_embeds, new_process=True)


def post_logits(setup: Setup, classes: int, realistic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mask logits (Q, h, w) and class logits (Q, C + 1), on the CPU, for an input of the network's size.

    Realistic: a photograph of `PRESENT` regions. For each of them one query is sure of its class and has a steep mask;
    the other queries have flatter masks of the same regions, and are most likely no object.
    Uniform: smooth random masks, and classes that are all about as likely everywhere.
    """
    config, (height, width) = setup.make_config(), setup.sizes.input
    queries = config.num_queries
    grid = (-(-height // 32) * 32 // config.patch_size, -(-width // 32) * 32 // config.patch_size)
    generator = torch.Generator().manual_seed(0)

    def smooth(count: int, coarse: tuple[int, int]) -> torch.Tensor:
        noise = torch.randn(1, count, *coarse, generator=generator)
        return F.interpolate(noise, size=grid, mode="bicubic", align_corners=False)[0]

    if not realistic:
        return 4 * smooth(queries, (8, 10)), torch.rand(queries, classes + 1, generator=generator)
    center_y, center_x = torch.rand(2, PRESENT, 1, 1, generator=generator) * torch.tensor(grid)[:, None, None, None]
    y, x = torch.arange(grid[0])[:, None] + 0.5, torch.arange(grid[1]) + 0.5
    distances = torch.hypot(y - center_y, x - center_x) + 1.5 * smooth(PRESENT, (8, 10))
    nearest = distances.topk(2, 0, largest=False).values
    inside = torch.where(distances == nearest[0], nearest[1], nearest[0]) - distances  # in cells, from the border
    query = torch.arange(queries)
    region, sure = query % PRESENT, query < PRESENT
    masks = torch.where(sure[:, None, None], 4 * inside[region], 2 * inside[region] - 2).clamp(-14, 12)
    class_logits = 1.5 * torch.randn(queries, classes + 1, generator=generator)
    ids = torch.randperm(max(classes, PRESENT), generator=generator)[:PRESENT] % classes
    class_logits[query, ids[region]] += torch.where(sure, 9.0, 4.0)
    class_logits[~sure, -1] += 10
    return masks + 0.7 * smooth(queries, (12, 16)), class_logits


def post(setup: Setup, classes: int, realistic: bool = True) -> Case:
    mask_logits, class_logits = (
        logits.to(setup.device, setup.dtype) for logits in post_logits(setup, classes, realistic)
    )
    patch = setup.make_config().patch_size
    padded = tuple(side * patch for side in mask_logits.shape[-2:])
    outputs = SimpleNamespace(
        masks_queries_logits=mask_logits[None],
        class_queries_logits=class_logits[None],
        padded_sizes=[padded],
        patch_sizes=[(patch, patch)],
        image_sizes=[setup.sizes.input],
    )
    process = setup.processor.post_process_semantic_segmentation

    @torch.inference_mode()
    def plainly() -> tuple[torch.Tensor, torch.Tensor]:
        return plain.label_map(mask_logits, class_logits, padded, setup.sizes.input, setup.scored)

    return Case(
        lambda: process(outputs, target_sizes=[setup.scored])[0],
        plainly,
        lambda got, expected: same_labels(got, *expected, setup.dtype_name),
    )


def post_uniform(setup: Setup, classes: int) -> Case:
    return post(setup, classes, realistic=False)


def image(setup: Setup, classes: int) -> Case:
    photo, vocabulary = setup.photo(setup.scored), setup.vocabulary(classes)

    def agree(got: torch.Tensor, plain_map: tuple[torch.Tensor, torch.Tensor]) -> bool:
        int8 = setup.runtime.endswith("int8")
        if setup.dtype == torch.float32 and not int8:
            return same_labels(got, *plain_map, setup.dtype_name)
        exact, _ = setup.plain_map(photo, vocabulary, exactly=True)
        return as_near(got, plain_map[0], exact, INT8_MARGIN if int8 else HALF_MARGIN)

    return Case(lambda: setup.predictor([photo], vocabulary)[0], lambda: setup.plain_map(photo, vocabulary), agree)


def new_names(setup: Setup, classes: int) -> Case:
    photo, vocabulary = setup.photo(setup.sizes.input), setup.vocabulary(classes)
    encoded = setup.predictor.encode([photo])

    def ours() -> torch.Tensor:
        setup.predictor.vocabulary(names_of(classes))  # kept in memory; of random weights all would be about alike
        return setup.predictor.classify(encoded, vocabulary)[0]

    return Case(ours, lambda: setup.predictor([photo], vocabulary)[0], torch.equal)


def photos_in(folder: Path, count: int, size: tuple[int, int], num_labels: int) -> list[Path]:
    """Files images/0.jpg, ... with labels/0.png, ... below the folder."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    paths = [folder / "images" / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        photo, labels = draw_photo(np.random.default_rng(number), num_labels, size)
        photo.save(path, quality=90)
        labels.save(folder / "labels" / f"{number}.png")
    return paths


def folder(setup: Setup, classes: int) -> Case:
    place = Path(setup.options.scratch, f"folder-{setup.dtype_name}-{classes}-{setup.runtime}")
    place.mkdir()
    paths = photos_in(place, setup.options.images, setup.sizes.input, classes)
    vocabulary = setup.vocabulary(classes)
    segmenter = Segmenter(setup.model, setup.processor, vocabulary)

    def ours() -> list[np.ndarray]:
        for path, segmentation in zip(paths, segmenter(iter(paths))):
            segmentation.save(place / "ours" / path.stem, ["png-labels"])
        return [np.asarray(Image.open(place / "ours" / f"{path.stem}.labels.png")) for path in paths]

    def plainly() -> list[np.ndarray]:
        (place / "plain").mkdir(exist_ok=True)
        files = [place / "plain" / f"{path.stem}.png" for path in paths]
        for path, file in zip(paths, files):
            labels, _ = setup.plain_map(Image.open(path).convert("RGB"), vocabulary)
            Image.fromarray(labels.cpu().numpy().astype(np.uint8 if classes <= 256 else np.uint16)).save(file)
        return [np.asarray(Image.open(file)) for file in files]

    def agree(got: list[np.ndarray], expected: list[np.ndarray]) -> bool:
        return float(np.mean(np.stack(got) != np.stack(expected))) <= TOLERANCES[setup.dtype_name][1]

    return Case(ours, plainly, agree)


def train(setup: Setup, classes: int) -> Case:
    """In half precision the weights are float32 and the step is under autocast, as trainings are."""
    from san_hf.training import parameter_groups  # here, as its memory would count in all other rows

    model, config = setup.make_model(torch.float32).train(), setup.make_config()
    generator, crop, batch = torch.Generator().manual_seed(0), setup.sizes.crop, 2
    pixel_values = torch.randn(batch, 3, crop, crop, generator=generator).to(setup.device)
    drawn = (draw_photo(np.random.default_rng(number), classes, (crop, crop))[1] for number in range(batch))
    ignore = config.semantic_loss_ignore_index
    labels = torch.stack([torch.from_numpy(np.array(label_map)).long() for label_map in drawn]).to(setup.device)
    class_embeds = setup.random_embeds(classes)
    trained = [parameter for group in parameter_groups(model) for parameter in group["params"]]
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.0)  # so that all steps are the same
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its state is there from the start, as within a training

    def step(loss_of: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(0)  # of the points where losses look at the masks
        optimizer.zero_grad()
        with torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.01)
        optimizer.step()
        return [loss.detach(), *(parameter.grad for parameter in trained)]

    def agree(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
        flat = [torch.cat([part.flatten() for part in parts[1:]]) for parts in (got, expected)]
        return setup.close(got[0], expected[0]) and setup.close(*flat)

    def ours() -> list[torch.Tensor]:
        with fast_linear(setup.device):  # as trainings do
            return step(lambda: model(pixel_values, class_embeds=class_embeds, labels=labels).loss)

    return Case(
        ours,
        lambda: step(lambda: plain.loss(model, pixel_values, class_embeds, labels, ignore)),
        agree,
    )


def evaluate(setup: Setup, classes: int) -> Case:
    from san_hf.data import load_segmentation_dataset
    from san_hf.evaluation import evaluate as evaluate_model

    place = Path(setup.options.scratch, f"evaluate-{setup.dtype_name}-{classes}-{setup.runtime}")
    place.mkdir()
    photos_in(place, setup.options.images, setup.sizes.input, classes)
    vocabulary = setup.vocabulary(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few photographs show few of the classes
        data = load_segmentation_dataset(place, "train", class_names=vocabulary.class_names)

    def ours() -> float:
        return evaluate_model(setup.model, setup.processor, data, vocabulary=vocabulary).metrics["pACC"]

    def plainly() -> float:
        counts = torch.zeros(classes, classes)
        for photo, truth, _ in data:
            labels, _ = setup.plain_map(photo, vocabulary)
            labelled = torch.from_numpy(truth.astype(np.int64))
            known = labelled != data.ignore_index
            pairs = labelled[known] * classes + labels.cpu()[known]
            counts += pairs.bincount(minlength=classes**2).view(classes, classes)
        return 100 * float(counts.trace() / counts.sum())

    def agree(got: float, expected: float) -> bool:
        return abs(got - expected) <= 100 * TOLERANCES[setup.dtype_name][1]

    return Case(ours, plainly, agree)


# The rows, and for how many classes they are measured by default.
CASES: dict[str, tuple[Callable[[Setup, Any], Case], tuple[int | None, ...]]] = {
    "forward": (forward, (None,)),
    "text": (text, (24, 171, 847)),
    "text-again": (text_again, (171, 847)),
    "post": (post, (20, 171, 847)),
    "post-uniform": (post_uniform, (20, 171, 847)),
    "image": (image, (20, 171, 847)),
    "new-names": (new_names, (171,)),
    "folder": (folder, (171,)),
    "train": (train, (171,)),
    "evaluate": (evaluate, (171,)),
}
