"""Configuration of SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242)."""

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .configuration_checks_san import DTYPES, check_carried_names, find_problems, refuse


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
        freeze_positions (`bool`, *optional*, defaults to `False`):
            Whether a frozen CLIP's vision position embeddings are frozen, too. Not the paper's training, but a cheaper
            one: no gradient runs through CLIP's shallow layers.
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
        base_model_name_or_path (`str`, *optional*):
            The CLIP that the side adapter was trained on, a folder or a repository; set by `from_clip` and where a
            side adapter is saved without its CLIP.
        base_model_revision (`str`, *optional*):
            Its commit.
        base_model_sha256 (`str`, *optional*):
            SHA-256 of its tensors' values, without those that are trained with the adapter.
        base_model_sha256_half (`dict`, *optional*):
            The same of the values rounded to `"bfloat16"` and `"float16"`.
        lora_folder (`str`, *optional*):
            The folder beside `config.json` with LoRA weights of CLIP that belong to the side adapter.

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
    freeze_positions: bool = False
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
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_sha256: str | None = None
    base_model_sha256_half: dict | None = None
    lora_folder: str | None = None

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
        if self._is_installed():
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    @classmethod
    def _is_installed(cls) -> bool:
        """
        Whether this code is installed rather than a checkpoint's. Its pipelines are registered then; by their names in
        `custom_pipelines`, which checkpoints need elsewhere, Transformers would ask for trust in remote code.
        """
        return not cls.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)

    def save_pretrained(self, *args, **kwargs):
        """[`PreTrainedConfig.save_pretrained`]"""
        super().save_pretrained(*args, **kwargs)
        if self._is_installed():
            self.__dict__.pop("custom_pipelines", None)

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
        problems = find_problems(self)
        if problems:
            raise ValueError("This SANConfig can't be built: " + "; ".join(problems) + ".")


SANConfig.register_for_auto_class()

__all__ = ["SANConfig"]
