"""Configuration of SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242)."""

from typing import cast

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig


RECOGNITION_TOKENS = ("class", "learned", "class+learned")
BIAS_POOLINGS = ("max", "avg", "nearest", "bilinear", "bicubic")


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
    vocabulary_size: int = 0

    def __post_init__(self, **kwargs):
        if self.clip_config is None:
            self.clip_config = CLIPConfig(vision_config={"patch_size": 16})
        elif isinstance(self.clip_config, dict):
            self.clip_config = CLIPConfig(**self.clip_config)
        # JSON has no tuples: lists here, so that a saved and loaded configuration equals the one it came from.
        self.fusion_layers = [list(pair) for pair in self.fusion_layers]
        self.deep_supervision_layers = list(self.deep_supervision_layers)
        super().__post_init__(**kwargs)

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

    def validate_architecture(self):
        """Called by `@strict`: refuses values that contradict each other."""
        vision = self.clip_vision_config
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if not 0 <= self.recognition_layer < vision.num_hidden_layers:
            problems.append(
                f"recognition_layer ({self.recognition_layer}) must leave at least one of CLIP's "
                f"{vision.num_hidden_layers} vision layers for recognition: 0 <= recognition_layer < "
                f"{vision.num_hidden_layers}"
            )
        for pair in self.fusion_layers:
            if len(pair) != 2 or not all(isinstance(layer, int) for layer in pair):
                problems.append(f"fusion_layers must hold pairs [CLIP layer, side adapter layer], got {pair}")
            elif not (0 <= pair[0] <= self.recognition_layer and 0 <= pair[1] <= self.num_hidden_layers):
                problems.append(
                    f"fusion_layers has {pair}, outside CLIP layers 0..{self.recognition_layer} (recognition_layer) "
                    f"or side adapter layers 0..{self.num_hidden_layers} (num_hidden_layers)"
                )
        targets = [pair[-1] for pair in self.fusion_layers]
        if len(set(targets)) != len(targets):
            problems.append(f"fusion_layers names a side adapter layer twice: {self.fusion_layers}")
        supervised = self.deep_supervision_layers
        if not supervised or sorted(set(supervised)) != supervised:
            problems.append(f"deep_supervision_layers must be ascending and not empty, got {supervised}")
        elif not (1 <= supervised[0] and supervised[-1] <= self.num_hidden_layers):
            problems.append(
                f"deep_supervision_layers {supervised} must lie in 1..{self.num_hidden_layers} (num_hidden_layers)"
            )
        if self.recognition_token not in RECOGNITION_TOKENS:
            problems.append(f"recognition_token must be one of {RECOGNITION_TOKENS}, got {self.recognition_token!r}")
        if self.bias_pooling not in BIAS_POOLINGS:
            problems.append(f"bias_pooling must be one of {BIAS_POOLINGS}, got {self.bias_pooling!r}")
        if self.num_bias_heads not in (None, 1, vision.num_attention_heads):
            problems.append(
                f"num_bias_heads must be None, 1 or CLIP's {vision.num_attention_heads} heads, got "
                f"{self.num_bias_heads}"
            )
        if self.num_bias_layers not in (0, 1, self.num_deep_layers):
            problems.append(
                f"num_bias_layers must be 0, 1 or the number of deep CLIP layers ({self.num_deep_layers}), got "
                f"{self.num_bias_layers}"
            )
        if not self.clip_image_scale > 0:
            problems.append(f"clip_image_scale must be positive, got {self.clip_image_scale}")
        if not 0 <= self.drop_path_rate < 1:
            problems.append(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")
        for name in ("num_queries", "patch_size", "image_size", "mask_embed_dim", "decoder_num_layers"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if problems:
            raise ValueError("This SANConfig can't be built: " + "; ".join(problems) + ".")


SANConfig.register_for_auto_class()

__all__ = ["SANConfig"]
