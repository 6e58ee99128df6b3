"""Configuration of SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242)."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
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


@strict
class SANConfig(PreTrainedConfig):
    r"""
    Configuration of [`SANModel`] and [`SANForSemanticSegmentation`]. The defaults are the paper's SAN on CLIP ViT-B/16.

    Args:
        clip_config (`CLIPConfig` or `dict`, *optional*, defaults to CLIP ViT-B/16's):
            The frozen CLIP: a stock [`CLIPConfig`].
        hidden_size (`int`, *optional*, defaults to 240):
            Width of the side adapter.
        num_hidden_layers (`int`, *optional*, defaults to 8):
            Number of transformer blocks in the side adapter.
        num_attention_heads (`int`, *optional*, defaults to 6):
            Attention heads of each side adapter block.
        intermediate_size (`int`, *optional*, defaults to 960):
            Width of the MLPs in the side adapter.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation in the side adapter's MLPs.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the layer norms in the side adapter and the fusion (CLIP has its own).
        patch_size (`int`, *optional*, defaults to 16):
            Side of the side adapter's patches, in pixels.
        image_size (`int`, *optional*, defaults to 640):
            Side of the square image, in pixels, that the side adapter's position embeddings are laid out for. Other
            sizes work: the embeddings are resized.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth rate of the last side adapter block; it grows linearly from 0 at the first.
        num_queries (`int`, *optional*, defaults to 100):
            Number of mask proposals.
        fusion_layers (`list[list[int]]`, *optional*, defaults to `[[0, 0], [3, 1], [6, 2], [9, 3]]`):
            Pairs [CLIP layer, side adapter layer]: the CLIP feature map after that layer is added to the adapter's
            patch tokens after that block. 0 means before the first layer or block.
        recognition_layer (`int`, *optional*, defaults to 9):
            Number of shallow CLIP layers. The recognition tokens run through the remaining, deep ones.
        deep_supervision_layers (`list[int]`, *optional*, defaults to `[7, 8]`):
            Side adapter layers whose tokens are decoded into masks in training, ascending; inference uses the last.
        clip_image_scale (`float`, *optional*, defaults to 0.5):
            Factor by which the image is resized for CLIP. 1.0 means that CLIP sees what the adapter sees.
        recognition_token (`str`, *optional*, defaults to `"class"`):
            What the recognition tokens (the paper's [SLS]) start from: CLIP's class token (`"class"`), learned tokens
            (`"learned"`), or their sum (`"class+learned"`).
        mask_embed_dim (`int`, *optional*, defaults to 256):
            Channels in which queries and pixels meet.
        decoder_hidden_size (`int`, *optional*, defaults to 256):
            Hidden width of the mask decoder's MLPs.
        decoder_num_layers (`int`, *optional*, defaults to 3):
            Depth of the mask decoder's MLPs.
        num_bias_heads (`int`, *optional*):
            Attention bias maps per query: `None` for one for each of CLIP's vision heads, 1 for one shared by all.
        num_bias_layers (`int`, *optional*, defaults to 1):
            1 to use the same attention bias in all deep CLIP layers, or their number for one each. 0 for no bias at
            all: every query then asks CLIP about the whole image, which shows by comparison what the bias does.
        rescale_attention_bias (`bool`, *optional*, defaults to `True`):
            Whether the attention bias passes through a learned scalar affine layer.
        bias_pooling (`str`, *optional*, defaults to `"max"`):
            How the attention bias is brought to CLIP's grid: adaptive `"max"` or `"avg"` pooling, or `"nearest"`,
            `"bilinear"` or `"bicubic"` interpolation.
        freeze_clip (`bool`, *optional*, defaults to `True`):
            Whether CLIP is frozen, all but its vision position embeddings (the paper's setting).
        train_num_points (`int`, *optional*, defaults to 12544):
            Points sampled per mask for the matching and for the mask losses.
        oversample_ratio (`float`, *optional*, defaults to 3.0):
            How many candidate points are drawn for each point of the mask losses.
        importance_sample_ratio (`float`, *optional*, defaults to 0.75):
            Share of the points taken for their uncertainty; the rest are random.
        no_object_weight (`float`, *optional*, defaults to 0.1):
            Weight of the no-object class in the classification loss.
        class_weight (`float`, *optional*, defaults to 2.0):
            Weight of the classification loss, and of its term in the matching.
        mask_weight (`float`, *optional*, defaults to 5.0):
            Weight of the mask cross-entropy, and of its term in the matching.
        dice_weight (`float`, *optional*, defaults to 5.0):
            Weight of the dice loss, and of its term in the matching.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation for initialising the side adapter.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Value in `labels` that marks unlabelled pixels.
        ignore_index_is_class (`bool`, *optional*, defaults to `False`):
            Whether `semantic_loss_ignore_index` is meant to be one of the classes, whose pixels then train nothing.
        vocabulary_size (`int`, *optional*, defaults to 0):
            Number of classes that the checkpoint carries embeddings for; set by `model.set_vocabulary`.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a value of the wrong type, or values that contradict each
            other; the message names them.
    """

    model_type = "san"
    # The older name of `sub_configs_defaults`, which transformers < 5.20 lacks and 5.20 wants in another form than
    # later ones; __post_init__ builds the configuration itself.
    sub_configs = {"clip_config": CLIPConfig}
    # What Trainer collects in evaluation is the rest: class_queries_logits and masks_queries_logits.
    keys_to_ignore_at_inference = [
        "loss_dict",
        "mask_embeds",
        "class_embeds",
        "attention_bias",
        "image_sizes",
        "auxiliary_logits",
        "hidden_states",
        "clip_feature_maps",
        "attentions",
        "recognition_attentions",
    ]

    clip_config: dict | CLIPConfig | None = None
    hidden_size: int = 240
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    intermediate_size: int = 960
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    patch_size: int = 16
    image_size: int = 640
    num_channels: int = 3
    drop_path_rate: float | int = 0.0
    num_queries: int = 100
    fusion_layers: list | tuple = ((0, 0), (3, 1), (6, 2), (9, 3))
    recognition_layer: int = 9
    deep_supervision_layers: list[int] | tuple[int, ...] = (7, 8)
    clip_image_scale: float | int = 0.5
    recognition_token: str = "class"
    mask_embed_dim: int = 256
    decoder_hidden_size: int = 256
    decoder_num_layers: int = 3
    num_bias_heads: int | None = None
    num_bias_layers: int = 1
    rescale_attention_bias: bool = True
    bias_pooling: str = "max"
    freeze_clip: bool = True
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    initializer_range: float = 0.02
    semantic_loss_ignore_index: int = 255
    ignore_index_is_class: bool = False
    vocabulary_size: int = 0

    def __post_init__(self, **kwargs):
        # The parent takes these as they come.
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") not in DTYPES:
            refuse("dtype", f"expected one of {DTYPES}", self.dtype)
        if self.output_hidden_states not in (None, True, False):
            refuse("output_hidden_states", "expected True, False or None", self.output_hidden_states)
        for field in ("id2label", "label2id"):
            value = getattr(self, field)
            labels = [] if value is None else value
            if isinstance(value, dict):
                labels = value if field == "id2label" else value.values()
            elif value is not None:
                refuse(field, "expected a dictionary", value)
            if not all(type(label) is int or (isinstance(label, str) and label.isdecimal()) for label in labels):
                refuse(field, "expected labels 0, 1, 2, ...", value)
        if self.clip_config is None:
            self.clip_config = CLIPConfig(vision_config={"patch_size": 16})
        elif isinstance(self.clip_config, dict):
            self.clip_config = self._build_clip_config(self.clip_config)
        # JSON has no tuples: lists here, so that a saved and loaded configuration equals the one it came from.
        self.fusion_layers = [list(pair) if isinstance(pair, tuple) else pair for pair in self.fusion_layers]
        self.deep_supervision_layers = list(self.deep_supervision_layers)
        if self.vocabulary_size:
            check_carried_names(self.__dict__, {"num_labels": kwargs.get("num_labels")})
        super().__post_init__(**kwargs)

    def _build_clip_config(self, values: dict) -> CLIPConfig:
        values = {**values, "dtype": self.dtype, "id2label": None, "label2id": None}
        for tower in ("text_config", "vision_config"):
            part = values.get(tower)
            if not isinstance(part, dict):
                continue
            # Names of classes mean nothing there.
            part = {name: value for name, value in part.items() if name not in ("id2label", "label2id", "num_labels")}
            values[tower] = part = {**part, "dtype": self.dtype}
            # CLIP's own check divides without asking, and doesn't name the fields.
            width, heads = (part.get(name, 1) for name in ("hidden_size", "num_attention_heads"))
            if "hidden_size" in part and type(width) is type(heads) is int and (heads < 1 or width % heads):
                refuse(
                    "clip_config",
                    f"expected {tower}.hidden_size to be a multiple of num_attention_heads ({heads})",
                    width,
                )
        try:
            return CLIPConfig(**values)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise StrictDataclassFieldValidationError("clip_config", ValueError(error)) from error

    @property
    def num_deep_layers(self) -> int:
        """Number of CLIP's vision layers that the recognition tokens run through."""
        return self.clip_vision_config.num_hidden_layers - self.recognition_layer

    # `clip_config` and its parts may come as dictionaries, and never are any once a configuration is built.
    @property
    def clip_vision_config(self) -> CLIPVisionConfig:
        """Configuration of CLIP's vision tower."""
        return cast(CLIPVisionConfig, cast(CLIPConfig, self.clip_config).vision_config)

    @property
    def clip_text_config(self) -> CLIPTextConfig:
        """Configuration of CLIP's text tower."""
        return cast(CLIPTextConfig, cast(CLIPConfig, self.clip_config).text_config)

    @property
    def clip_logit_scale(self) -> float:
        """Logarithm of CLIP's temperature to start from."""
        return float(cast(float, cast(CLIPConfig, self.clip_config).logit_scale_init_value))

    @property
    def clip_embed_dim(self) -> int:
        """Width of CLIP's joint embedding space."""
        return cast(int, cast(CLIPConfig, self.clip_config).projection_dim)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        [`PreTrainedConfig.from_dict`]; what is asked for goes in before the values are checked, rather than after.

        Raises:
            ValueError: class names other than those that the saved embeddings belong to.
        """
        asked = {
            name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__ and name != "dtype"
        }
        if config_dict.get("vocabulary_size") and asked.get("vocabulary_size") != 0:
            check_carried_names(config_dict, {"num_labels": kwargs.get("num_labels")} | asked)
        clip_config = asked.get("clip_config")
        if isinstance(clip_config, dict):
            asked["clip_config"] = {**(config_dict.get("clip_config") or {}), **clip_config}
        return super().from_dict({**config_dict, **asked}, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("id2label", "label2id", "num_labels") and self.__dict__.get("vocabulary_size") and self.id2label:
            check_carried_names(self.__dict__, {name: value})
        super().__setattr__(name, value)

    def validate_architecture(self):
        """Called by `@strict`: refuses values that can't be built, run or trained, and those that contradict."""
        vision, text = self.clip_vision_config, self.clip_text_config
        problems = []
        for prefix, part, ranges in (
            ("", self, RANGES),
            ("clip_config.", self.clip_config, CLIP_RANGES),
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
            problems = [*self._contradictions(vision, text), *self._layer_contradictions(vision)]
        if problems:
            raise ValueError("This SANConfig can't be built: " + "; ".join(problems) + ".")

    def _contradictions(self, vision: CLIPVisionConfig, text: CLIPTextConfig) -> Iterator[str]:
        """Problems of values that are possible each by itself."""
        for prefix, part in (("", self), ("clip_config.vision_config.", vision), ("clip_config.text_config.", text)):
            if part.hidden_size % part.num_attention_heads:
                yield (
                    f"{prefix}hidden_size ({part.hidden_size}) must be a multiple of {prefix}num_attention_heads "
                    f"({part.num_attention_heads})"
                )
        if vision.num_channels != self.num_channels:
            yield (
                f"num_channels ({self.num_channels}) must be CLIP's, clip_config.vision_config.num_channels "
                f"({vision.num_channels}): both see the same image"
            )
        # The ranges have only whole numbers here, though the stock configurations' types allow more.
        clip_patch_size = cast(int, vision.patch_size)
        for prefix, image_size, patch_size in (
            ("", self.image_size, self.patch_size),
            ("clip_config.vision_config.", cast(int, vision.image_size), clip_patch_size),
        ):
            if not 1 <= image_size // patch_size <= MAX_GRID:
                yield (
                    f"{prefix}image_size ({image_size}) must hold 1..{MAX_GRID} patches of {prefix}patch_size "
                    f"({patch_size})"
                )
        if int(self.image_size * self.clip_image_scale) < clip_patch_size:
            yield (
                f"clip_image_scale ({self.clip_image_scale}) must leave at least one of CLIP's patches "
                f"({vision.patch_size} pixels) of image_size ({self.image_size})"
            )
        if not cast(int, text.eos_token_id) < text.vocab_size:
            yield (
                f"clip_config.text_config.eos_token_id ({text.eos_token_id}) must be lower than vocab_size "
                f"({text.vocab_size})"
            )
        if self.recognition_token not in RECOGNITION_TOKENS:
            yield f"recognition_token must be one of {RECOGNITION_TOKENS}, got {self.recognition_token!r:.80}"
        if self.bias_pooling not in BIAS_POOLINGS:
            yield f"bias_pooling must be one of {BIAS_POOLINGS}, got {self.bias_pooling!r:.80}"
        if self.vocabulary_size and sorted(self.id2label or {}) != list(range(self.vocabulary_size)):
            yield (
                f"vocabulary_size ({self.vocabulary_size}) must be the number of names in id2label "
                f"({len(self.id2label or {})}): model.set_vocabulary sets both"
            )

    def _layer_contradictions(self, vision: CLIPVisionConfig) -> Iterator[str]:
        """Problems of layers that don't exist, and of biases for other layers or heads than CLIP's."""
        if not 0 <= self.recognition_layer < vision.num_hidden_layers:
            yield (
                f"recognition_layer ({self.recognition_layer}) must leave at least one of CLIP's "
                f"{vision.num_hidden_layers} vision layers (num_hidden_layers) for recognition: 0 <= "
                f"recognition_layer < {vision.num_hidden_layers}"
            )
        for pair in self.fusion_layers:
            if not isinstance(pair, list) or len(pair) != 2 or not all(type(layer) is int for layer in pair):
                yield f"fusion_layers must hold pairs [CLIP layer, side adapter layer], got {pair!r:.80}"
            elif not (0 <= pair[0] <= self.recognition_layer and 0 <= pair[1] <= self.num_hidden_layers):
                yield (
                    f"fusion_layers has {pair}, outside CLIP layers 0..{self.recognition_layer} (recognition_layer) "
                    f"or side adapter layers 0..{self.num_hidden_layers} (num_hidden_layers)"
                )
        targets = [pair[-1] for pair in self.fusion_layers if isinstance(pair, list) and pair]
        if any(targets.count(target) > 1 for target in targets):
            yield f"fusion_layers names a side adapter layer twice: {self.fusion_layers!r:.80}"
        supervised = self.deep_supervision_layers
        if not supervised or sorted(set(supervised)) != supervised:
            yield f"deep_supervision_layers must be ascending and not empty, got {supervised!r:.80}"
        elif not (1 <= supervised[0] and supervised[-1] <= self.num_hidden_layers):
            yield f"deep_supervision_layers {supervised} must lie in 1..{self.num_hidden_layers} (num_hidden_layers)"
        if self.num_bias_heads not in (None, 1, vision.num_attention_heads):
            yield (
                f"num_bias_heads must be None, 1 or CLIP's {vision.num_attention_heads} heads, got "
                f"{self.num_bias_heads}"
            )
        if self.num_bias_layers not in (0, 1, self.num_deep_layers):
            yield (
                f"num_bias_layers must be 0, 1 or the number of deep CLIP layers ({self.num_deep_layers}), got "
                f"{self.num_bias_layers}"
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


SANConfig.register_for_auto_class()

__all__ = ["SANConfig"]
