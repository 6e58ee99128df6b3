"""Checks of a `SANConfig`: ranges of numbers, values that contradict each other, class names of carried embeddings."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.activations import ACT2FN


RECOGNITION_TOKENS = ("class", "learned", "class+learned")
BIAS_POOLINGS = ("max", "avg", "nearest", "bilinear", "bicubic")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Smallest and largest value of each number; integers where the smallest is one. Upper bounds are beyond any published
# model (ViT-22B is 6144 wide) and keep a mistyped value from asking for more memory than there is. Lower bounds above
# zero are where float32 still divides: epsilons, scales of random numbers, and the weight of no object, which alone
# weighs the classification of an image without annotations.
WIDTH, DEPTH, MAX_GRID = (1, 8192), (1, 256), 1024
RANGES: dict[str, tuple[float, float]] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": WIDTH,
    "intermediate_size": (1, 32768),
    "layer_norm_eps": (1e-12, 1.0),
    "patch_size": (1, 1024),
    "image_size": (1, 16384),
    "num_channels": (1, 64),
    "drop_path_rate": (0.0, 0.999),
    "num_queries": (1, 10000),
    "clip_image_scale": (1e-3, 4.0),
    "mask_embed_dim": WIDTH,
    "decoder_hidden_size": WIDTH,
    "decoder_num_layers": DEPTH,
    "train_num_points": (1, 1000000),
    "oversample_ratio": (1.0, 100.0),
    "importance_sample_ratio": (0.0, 1.0),
    "no_object_weight": (1e-6, 1e6),
    "class_weight": (0.0, 1e6),
    "mask_weight": (0.0, 1e6),
    "dice_weight": (0.0, 1e6),
    "initializer_range": (1e-6, 1.0),
    "semantic_loss_ignore_index": (-(2**31), 2**31 - 1),
    "vocabulary_size": (0, 1000000),
}
CLIP_RANGES: dict[str, tuple[float, float]] = {"projection_dim": WIDTH, "logit_scale_init_value": (-10.0, 10.0)}
CLIP_TOWER_RANGES: dict[str, tuple[float, float]] = {
    "hidden_size": WIDTH,
    "intermediate_size": (1, 32768),
    "num_hidden_layers": DEPTH,
    "num_attention_heads": WIDTH,
    "layer_norm_eps": (1e-12, 1.0),
    "attention_dropout": (0.0, 0.999),
    "initializer_range": (1e-6, 1.0),
    "initializer_factor": (1e-6, 100.0),
}
CLIP_VISION_RANGES = CLIP_TOWER_RANGES | {"num_channels": (1, 64), "image_size": (1, 16384), "patch_size": (1, 1024)}
CLIP_TEXT_RANGES = CLIP_TOWER_RANGES | {
    "vocab_size": (3, 10000000),
    "max_position_embeddings": (3, 65536),
    "eos_token_id": (0, 10000000),
}


def find_problems(config: Any) -> list[str]:
    """What of a `SANConfig` can't be built, run or trained, and what contradicts itself."""
    vision, text = config.clip_vision_config, config.clip_text_config
    problems = []
    for prefix, part, ranges in (
        ("", config, RANGES),
        ("clip_config.", config.clip_config, CLIP_RANGES),
        ("clip_config.vision_config.", vision, CLIP_VISION_RANGES),
        ("clip_config.text_config.", text, CLIP_TEXT_RANGES),
    ):
        for name, (low, high) in ranges.items():
            value = getattr(part, name)
            is_number = isinstance(value, type(low) if isinstance(low, int) else (int, float))
            if isinstance(value, bool) or not is_number or not low <= value <= high:
                kind = "an integer" if isinstance(low, int) else "a number"
                problems.append(f"{prefix}{name} must be {kind} in {low}..{high}, got {value!r:.80}")
        activation = getattr(part, "hidden_act", None)
        if hasattr(part, "hidden_act") and activation not in ACT2FN:
            problems.append(f"{prefix}hidden_act must be one of {sorted(ACT2FN)}, got {activation!r:.80}")
    # What follows computes with these values.
    if not problems:
        problems = [*find_contradictions(config, vision, text), *find_layer_contradictions(config, vision)]
    return problems


def find_contradictions(config: Any, vision: CLIPVisionConfig, text: CLIPTextConfig) -> Iterator[str]:
    """Problems of values that are possible each by itself."""
    for prefix, part in (("", config), ("clip_config.vision_config.", vision), ("clip_config.text_config.", text)):
        if part.hidden_size % part.num_attention_heads:
            yield (
                f"{prefix}hidden_size ({part.hidden_size}) must be a multiple of {prefix}num_attention_heads "
                f"({part.num_attention_heads})"
            )
    if vision.num_channels != config.num_channels:
        yield (
            f"num_channels ({config.num_channels}) must be CLIP's, clip_config.vision_config.num_channels "
            f"({vision.num_channels}): both see the same image"
        )
    # The ranges have only whole numbers here, though the stock configurations' types allow more.
    clip_patch_size = cast(int, vision.patch_size)
    for prefix, image_size, patch_size in (
        ("", config.image_size, config.patch_size),
        ("clip_config.vision_config.", cast(int, vision.image_size), clip_patch_size),
    ):
        if not 1 <= image_size // patch_size <= MAX_GRID:
            yield (
                f"{prefix}image_size ({image_size}) must hold 1..{MAX_GRID} patches of {prefix}patch_size "
                f"({patch_size})"
            )
    if int(config.image_size * config.clip_image_scale) < clip_patch_size:
        yield (
            f"clip_image_scale ({config.clip_image_scale}) must leave at least one of CLIP's patches "
            f"({vision.patch_size} pixels) of image_size ({config.image_size})"
        )
    if not cast(int, text.eos_token_id) < text.vocab_size:
        yield (
            f"clip_config.text_config.eos_token_id ({text.eos_token_id}) must be lower than vocab_size "
            f"({text.vocab_size})"
        )
    if config.recognition_token not in RECOGNITION_TOKENS:
        yield f"recognition_token must be one of {RECOGNITION_TOKENS}, got {config.recognition_token!r:.80}"
    if config.bias_pooling not in BIAS_POOLINGS:
        yield f"bias_pooling must be one of {BIAS_POOLINGS}, got {config.bias_pooling!r:.80}"
    if config.vocabulary_size and sorted(config.id2label or {}) != list(range(config.vocabulary_size)):
        yield (
            f"vocabulary_size ({config.vocabulary_size}) must be the number of names in id2label "
            f"({len(config.id2label or {})}): model.set_vocabulary sets both"
        )


def find_layer_contradictions(config: Any, vision: CLIPVisionConfig) -> Iterator[str]:
    """Problems of layers that don't exist, and of biases for other layers or heads than CLIP's."""
    if not 0 <= config.recognition_layer < vision.num_hidden_layers:
        yield (
            f"recognition_layer ({config.recognition_layer}) must leave at least one of CLIP's "
            f"{vision.num_hidden_layers} vision layers (num_hidden_layers) for recognition: 0 <= "
            f"recognition_layer < {vision.num_hidden_layers}"
        )
    for pair in config.fusion_layers:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(layer) is int for layer in pair):
            yield f"fusion_layers must hold pairs [CLIP layer, side adapter layer], got {pair!r:.80}"
        elif not (0 <= pair[0] <= config.recognition_layer and 0 <= pair[1] <= config.num_hidden_layers):
            yield (
                f"fusion_layers has {pair}, outside CLIP layers 0..{config.recognition_layer} (recognition_layer) "
                f"or side adapter layers 0..{config.num_hidden_layers} (num_hidden_layers)"
            )
    targets = [pair[-1] for pair in config.fusion_layers if isinstance(pair, list) and pair]
    if any(targets.count(target) > 1 for target in targets):
        yield f"fusion_layers names a side adapter layer twice: {config.fusion_layers!r:.80}"
    supervised = config.deep_supervision_layers
    if not supervised or sorted(set(supervised)) != supervised:
        yield f"deep_supervision_layers must be ascending and not empty, got {supervised!r:.80}"
    elif not (1 <= supervised[0] and supervised[-1] <= config.num_hidden_layers):
        yield f"deep_supervision_layers {supervised} must lie in 1..{config.num_hidden_layers} (num_hidden_layers)"
    if config.num_bias_heads not in (None, 1, vision.num_attention_heads):
        yield (
            f"num_bias_heads must be None, 1 or CLIP's {vision.num_attention_heads} heads, got {config.num_bias_heads}"
        )
    if config.num_bias_layers not in (0, 1, config.num_deep_layers):
        yield (
            f"num_bias_layers must be 0, 1 or the number of deep CLIP layers ({config.num_deep_layers}), got "
            f"{config.num_bias_layers}"
        )


def refuse(field: str, expected: str, value: Any) -> NoReturn:
    """Raises the error that a field of another type gets."""
    raise StrictDataclassFieldValidationError(field, ValueError(f"{field}: {expected}, got {value!r:.80}"))


def check_carried_names(carried: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """
    Refuses other names for classes whose embeddings are carried: the model would find the old ones and call them new.

    Args:
        carried: fields of the configuration of a model that carries a vocabulary.
        asked: what is to replace some of `id2label`, `label2id`, `num_labels` and `vocabulary_size`; `None` for what
            is not.

    Raises:
        ValueError: they contradict each other.
    """
    # Keys are strings in JSON.
    names = {int(label): name for label, name in (carried.get("id2label") or {}).items()}
    same = {
        "id2label": lambda value: {int(label): name for label, name in value.items()} == names,
        "label2id": lambda value: {int(label): name for name, label in value.items()} == names,
        "num_labels": lambda value: value == len(names),
        "vocabulary_size": lambda value: value == carried.get("vocabulary_size"),
    }
    for field, is_same in same.items():
        if asked.get(field) is not None and not is_same(asked[field]):
            raise ValueError(
                f"{field}={asked[field]!r:.80} contradicts the {len(names)} class names that this model carries with "
                "their embeddings: the classes that it finds would get other names. Load it as it is, or with "
                "vocabulary_size=0 to leave its vocabulary out; then model.set_vocabulary(names, ...) gives it another "
                "one, or, with class_embeds=model.class_embeds, other names for the same classes."
            )
