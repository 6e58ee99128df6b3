"""SAN, the Side Adapter Network for open-vocabulary semantic segmentation (Xu et al., CVPR 2023, arXiv 2302.12242).

A frozen CLIP recognises; a light side network proposes masks and predicts attention biases that steer CLIP's own deep
layers to look at each mask. `forward` of the two models below is the paper's figure 2, from left to right; its stages
are those of the paper's section 3.
Shapes: B images, Q queries, C classes, D CLIP's joint embedding width, W its vision width, Hc x Wc its grid, h its
vision heads; Ca the side adapter's width, Hs x Ws its grid; n bias layers.
"""

import math
import os
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from .adapter_folder_san import HUB_ARGUMENTS, complete_with_base, find_lora, find_side_adapter, load_lora
from .adapters_san import SideAdapterMixin
from .base_clip_san import CLIP_PARTS, POSITION_EMBEDDING, clip_name, find_commit
from .clip_recognition_san import encode_shallow, pool_attention_bias, prepare_clip, recognize
from .configuration_checks_san import check_carried_names
from .configuration_san import SANConfig
from .loss_san import (
    check_whole_step,
    classes_of_maps,
    count_targets,
    mask_classification_loss,
    split_semantic_map,
)
from .outputs_san import (
    SANForSemanticSegmentationOutput,
    SANModelOutput,
    SANTargets,
    select_hidden_states,
    sizes_of_batch,
)
from .pipeline_san import custom_pipelines
from .push_san import CompletePushMixin
from .side_adapter_san import AttentionBiasScaling, MaskDecoder, SideAdapter
from .text_tree_san import encode_prompts, hook_text_tree


# Prompts that are encoded together: bounds memory for large vocabularies.
TEXT_BATCH_SIZE = 16384


class SANPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and freezing shared by the SAN models."""

    config: SANConfig
    config_class = SANConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image", "text")  # type: ignore[assignment]  # given as a list or a tuple
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings", "SideAdapter", "MaskDecoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # `forward` takes further targets by name, not the count of items that `Trainer` would have the loss divided by.
    accepts_loss_kwargs = False

    def __init__(self, config: SANConfig, *args, **kwargs):
        config.validate()  # its fields may have been set one by one
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # As the original starts them: by what its libraries do for each kind of layer.
        # Of code outside transformers, only modules with parameters of their own come here, not their parents.
        super()._init_weights(module)
        if isinstance(module, SideAdapter):
            for tokens in (module.query_tokens, module.query_position_embeddings, module.position_embeddings):
                init.trunc_normal_(tokens, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear | nn.Conv2d) and (bounds := getattr(module, "initial_bounds", None)):
            for parameter, bound in zip(module.parameters(recurse=False), bounds):  # weight, bias
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, AttentionBiasScaling):
            init.uniform_(module.weight, -1.0, 1.0)
            init.uniform_(module.bias, -1.0, 1.0)
        elif isinstance(module, SANModel):
            if module.recognition_tokens is not None:
                init.normal_(module.recognition_tokens, std=self.config.clip_vision_config.hidden_size**-0.5)
        elif isinstance(module, SANForSemanticSegmentation):
            init.constant_(module.logit_scale, self.config.clip_logit_scale)
            init.normal_(module.no_object_embed, std=self.config.clip_embed_dim**-0.5)
            if module.class_embeds is not None:
                init.zeros_(module.class_embeds)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config=None,
        output_loading_info: bool = False,
        base_model: str | None = None,
        **kwargs,
    ):
        """
        [`PreTrainedModel.from_pretrained`], and CLIP frozen as `config.freeze_clip` says.

        A folder or repository may also hold a side adapter alone; the CLIP that it was trained on is then loaded from
        where its configuration says, or from `base_model`, and compared with the digest there.

        Raises:
            OSError: there is no such checkpoint, or the base of a side adapter isn't there.
            ValueError: `config` or the other arguments name other classes than those that the checkpoint carries
                embeddings for, or it lacks these embeddings; or the base of a side adapter is another CLIP.
        """
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        name, adapter_file = pretrained_model_name_or_path, None
        is_given = isinstance(config, PreTrainedConfig)
        if is_given and name is not None and config.vocabulary_size:
            saved = SANConfig.get_config_dict(name, **where)[0]
            if saved.get("vocabulary_size"):
                carried = ("id2label", "num_labels", "vocabulary_size")
                check_carried_names(saved, {field: getattr(config, field) for field in carried})
        if name is not None:
            known = config.to_dict() if is_given else SANConfig.get_config_dict(config or name, **where)[0]
            adapter_file = find_side_adapter(name, known, **where)
        load: Any = super().from_pretrained
        if adapter_file is None:
            model, info = load(name, *args, config=config, output_loading_info=True, **kwargs)
        else:
            if not is_given:
                fields = {field: kwargs.pop(field) for field in list(kwargs) if field in SANConfig.__dataclass_fields__}
                kwargs |= {field: fields.pop(field) for field in ("dtype",) if field in fields}
                config = SANConfig.from_pretrained(config or name, **where, **fields)
            hub_options = {option: value for option, value in where.items() if option not in ("revision", "subfolder")}
            state_dict = complete_with_base(config, adapter_file, base_model, **hub_options)
            kwargs = {option: value for option, value in kwargs.items() if option not in where}
            model, info = load(None, config=config, state_dict=state_dict, output_loading_info=True, **kwargs)
            model.config.name_or_path = model.name_or_path = os.fspath(name)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(
                    f"'{adapter_file}' is incomplete: {len(missing)} tensors are missing ({', '.join(missing[:3])}). "
                    "Get the folder again."
                )
        if name is not None and (lora := find_lora(name, model.config, **where)) is not None:
            load_lora(model, lora)
            model.eval()
        lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        if "class_embeds" in lacking:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' lacks the embeddings of the {model.config.vocabulary_size} classes "
                "that its configuration names, or has another number of them. Load it with vocabulary_size=0; then "
                "model.set_vocabulary makes them."
            )
        # Loading makes new parameters, all of them trainable.
        model.freeze_clip()
        return (model, info) if output_loading_info else model

    def complete_config(self) -> None:
        """Puts into the configuration what has to be saved of this model beside its weights."""
        # Transformers adds the auto class of this very model, of which there can be one only.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**auto_map, "AutoModel": "modeling_san.SANModel"}
        self.config.custom_pipelines = custom_pipelines()
        # It writes this model's dtype into the configuration, and not into CLIP's.
        for part in (self.config.clip_config, self.config.clip_vision_config, self.config.clip_text_config):
            cast(CLIPConfig, part).dtype = self.dtype

    def save_pretrained(self, *args, **kwargs):
        """[`PreTrainedModel.save_pretrained`]; [`AutoModel`] finds [`SANModel`] in the folder, whatever was saved."""
        self.complete_config()
        # Engines that spread a model over processes can't spread a tensor without dimensions: it has one meanwhile.
        logit_scale = cast(torch.Tensor | None, getattr(self, "logit_scale", None))
        if logit_scale is not None and logit_scale.dim():
            state = self.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]
            kwargs["state_dict"] = {
                name: tensor.reshape(()) if name == "logit_scale" else tensor for name, tensor in state.items()
            }
        super().save_pretrained(*args, **kwargs)

    def freeze_clip(self):
        """Freezes CLIP if `config.freeze_clip`; its vision position embeddings only if `config.freeze_positions`."""
        if not self.config.freeze_clip:
            return
        for name, parameter in self.named_parameters():
            is_position = name.removeprefix("model.") == POSITION_EMBEDDING
            if clip_name(name) is not None or (is_position and self.config.freeze_positions):
                parameter.requires_grad_(False)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        """[`PreTrainedModel.set_attn_implementation`]; CLIP's towers are reached under the key `"clip_config"`."""
        if not isinstance(attn_implementation, dict):
            # This model alone first: it checks the name before anything is changed.
            super().set_attn_implementation({"": attn_implementation}, *args, **kwargs)
            attn_implementation = dict.fromkeys(["", *self.config.sub_configs], self.config._attn_implementation)
        # Not each of CLIP's configurations has a module here, and transformers warns when it changes one without.
        if "clip_config" in attn_implementation:
            cast(CLIPConfig, self.config.clip_config)._attn_implementation = attn_implementation["clip_config"]
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @staticmethod
    def is_clip_parameter(name: str) -> bool:
        """Whether the parameter `name` of a SAN model is one of CLIP's."""
        return name.removeprefix("model.").split(".")[0] in CLIP_PARTS

    def get_input_embeddings(self) -> nn.Module:
        """CLIP's embedding of patches and positions, as one: FSDP gives it a unit, which can't be within another's."""
        return self.base_model.get_submodule("vision_model.embeddings")

    def set_input_embeddings(self, value: nn.Module):
        self.base_model.get_submodule("vision_model").embeddings = value

    def resize_token_embeddings(self, *args, **kwargs):
        """
        Raises:
            ValueError: always. The text tower has the tokens that CLIP was trained with.
        """
        raise ValueError(
            "SAN's tokens are those of its CLIP, whose text tower is trained: they can't be resized. Class names need "
            "no new tokens; use the tokenizer that belongs to the checkpoint."
        )


class SANModel(SANPreTrainedModel):
    """
    SAN without text: an image in, mask logits and mask embeddings in CLIP's joint space out.

    Args:
        config ([`SANConfig`]): sizes, and the CLIP configuration.
    """

    input_modalities = ("image",)
    # The parts of SANForSemanticSegmentation that this one leaves out of its checkpoints.
    _keys_to_ignore_on_load_unexpected = [
        r"^(text_model|text_projection)\.|^(logit_scale|no_object_embed|class_embeds)$"
    ]

    def __init__(self, config: SANConfig):
        super().__init__(config)
        vision_config = config.clip_vision_config
        # By itself it would take the dtype that its own configuration was saved with, whatever was asked for.
        self.vision_model = CLIPVisionModel._from_config(vision_config, dtype=torch.get_default_dtype())
        prepare_clip(self.vision_model)
        self.visual_projection = nn.Linear(vision_config.hidden_size, config.clip_embed_dim, bias=False)
        self.side_adapter = SideAdapter(config)
        self.mask_decoder = MaskDecoder(config)
        self.recognition_tokens = (
            nn.Parameter(torch.empty(1, config.num_queries, vision_config.hidden_size))
            if "learned" in config.recognition_token
            else None
        )
        self.post_init()
        self.freeze_clip()

    def resize_for_clip(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The image as CLIP sees it: (B, channels, floor(height * scale), floor(width * scale))."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be of shape (batch, {self.config.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be normalised floating point numbers, got {pixel_values.dtype}. SANImageProcessor "
                "makes them of an image."
            )
        scale = float(self.config.clip_image_scale)
        patch_size = cast(int, self.config.clip_vision_config.patch_size)
        height, width = (math.floor(side * scale) for side in pixel_values.shape[-2:])
        if min(height, width) < patch_size or min(pixel_values.shape[-2:]) < self.config.patch_size:
            raise ValueError(
                f"pixel_values of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} are too small: each side must "
                f"hold a patch of the side adapter ({self.config.patch_size}) and, times {scale}, one of CLIP's "
                f"({patch_size}). Use SANImageProcessor, or pad the image."
            )
        if scale == 1.0:
            return pixel_values
        # The scale itself gives the sampling positions, not the ratio of the rounded sizes: as the original does.
        return F.interpolate(
            pixel_values, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=False
        )

    def start_recognition_tokens(self, class_token: torch.Tensor) -> torch.Tensor:
        """Recognition tokens, one for each query, from CLIP's class token (B, 1, W): (B, Q, W)."""
        batch_size, _, width = class_token.shape
        start = self.config.recognition_token
        if start == "class":
            return class_token.expand(batch_size, self.config.num_queries, width)
        learned = cast(nn.Parameter, self.recognition_tokens).expand(batch_size, -1, -1)
        return learned if start == "learned" else learned + class_token

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        output_clip_feature_maps: bool | None = None,
    ) -> SANModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape (B, channels, height, width)):
                RGB, normalised with CLIP's mean and standard deviation, padded with zeros.
            image_sizes (`torch.Tensor` of shape (B, 2), *optional*):
                (height, width) of each image before padding. Not used here: handed through for post-processing.
            output_auxiliary_logits (`bool`, *optional*):
                Whether to run the earlier supervised layers, too.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the side adapter's tokens, or the indices of those to return.
            output_attentions (`bool`, *optional*):
                Whether to return attention weights (computed by the eager implementation).
            output_clip_feature_maps (`bool`, *optional*):
                Whether to return CLIP's feature maps.

        Raises:
            ValueError: `pixel_values` has another shape or is smaller than a patch.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions

        # Shallow CLIP: feature maps (B, W, Hc, Wc) and, for the deep layers, tokens (B, 1 + Hc * Wc, W).
        clip_feature_maps, clip_tokens = encode_shallow(
            self.vision_model, self.resize_for_clip(pixel_values), config.recognition_layer
        )
        # Feature fusion on visual tokens: the side adapter's tokens (B, Q + Hs * Ws, Ca) after each of its blocks.
        hidden_states, grid, attentions = self.side_adapter(pixel_values, clip_feature_maps, output_attentions)

        # Mask prediction: proposals (B, Q, Hs, Ws) and attention biases (B, n, h, Q, Hs, Ws) of each supervised layer.
        supervised = config.deep_supervision_layers if output_auxiliary_logits else config.deep_supervision_layers[-1:]
        decoded = [self.mask_decoder(hidden_states[layer], grid) for layer in supervised]
        masks_queries_logits, attention_biases = zip(*decoded)

        # Mask recognition in deep CLIP: recognition tokens (the paper's [SLS]) steered by the biases; one pass for all
        # supervised layers.
        clip_grid = (clip_feature_maps[0].shape[-2], clip_feature_maps[0].shape[-1])
        pooled = [pool_attention_bias(bias, clip_grid, config.bias_pooling) for bias in attention_biases]
        recognition_tokens = self.start_recognition_tokens(clip_tokens[:, :1])
        recognized, recognition_attentions = recognize(
            self.vision_model,
            clip_tokens,
            recognition_tokens.repeat(1, len(supervised), 1),
            torch.cat(pooled, dim=3),
            config.recognition_layer,
            output_attentions,
        )
        # Mask embeddings (B, Q, D) of each supervised layer, in CLIP's joint space.
        mask_embeds = F.normalize(self.visual_projection(recognized), dim=-1).chunk(len(supervised), dim=1)

        return SANModelOutput(
            masks_queries_logits=masks_queries_logits[-1],
            mask_embeds=mask_embeds[-1],
            attention_bias=attention_biases[-1],
            image_sizes=image_sizes,
            padded_sizes=sizes_of_batch(pixel_values, (pixel_values.shape[-2], pixel_values.shape[-1])),
            patch_sizes=sizes_of_batch(pixel_values, (config.patch_size, config.patch_size)),
            auxiliary_masks_queries_logits=masks_queries_logits[:-1] if output_auxiliary_logits else None,
            auxiliary_mask_embeds=mask_embeds[:-1] if output_auxiliary_logits else None,
            hidden_states=select_hidden_states(hidden_states, output_hidden_states),
            clip_feature_maps=tuple(clip_feature_maps) if output_clip_feature_maps else None,
            attentions=tuple(attentions) if output_attentions else None,
            recognition_attentions=tuple(recognition_attentions) if output_attentions else None,
        )


class SANForSemanticSegmentation(CompletePushMixin, SideAdapterMixin, SANPreTrainedModel):
    """
    SAN with CLIP's text tower as the classifier, and the training loss: an image and class names in, masks with their
    classes out.

    Args:
        config ([`SANConfig`]): sizes, and the CLIP configuration.
    """

    def __init__(self, config: SANConfig):
        super().__init__(config)
        text_config, embed_dim = config.clip_text_config, config.clip_embed_dim
        self.model = SANModel(config)
        self.text_model = CLIPTextModel._from_config(text_config, dtype=torch.get_default_dtype())
        hook_text_tree(self.text_model)
        self.text_projection = nn.Linear(text_config.hidden_size, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.clip_logit_scale))
        self.no_object_embed = nn.Parameter(torch.empty(1, embed_dim))
        # Registered even while there is no vocabulary: a plain None would keep set_vocabulary from making it a buffer.
        carried = torch.zeros(config.vocabulary_size, embed_dim) if config.vocabulary_size else None
        self.register_buffer("class_embeds", carried)
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()  # here, what the base model leaves out counts
        self.freeze_clip()

    @classmethod
    def from_clip(cls, pretrained_model_name_or_path: str, **overrides) -> "SANForSemanticSegmentation":
        """
        A SAN with a new side adapter on a pretrained CLIP: the start of training on another CLIP.

        Args:
            pretrained_model_name_or_path: a CLIP checkpoint in Transformers format, on the Hub or in a folder.
            **overrides: fields of [`SANConfig`]. Those that depend on CLIP's depth (`recognition_layer`,
                `fusion_layers`) follow the paper's rule by default: recognition in the last quarter of the layers,
                fusion at the start and after each quarter before. Anything else goes to `CLIPModel.from_pretrained`
                (`revision`, `token`, `dtype`, ...).

        Returns:
            The model in CLIP's dtype, on the CPU, CLIP frozen unless `freeze_clip=False`.
        """
        names = set(SANConfig.__dataclass_fields__)
        adapter = {name: overrides.pop(name) for name in list(overrides) if name in names and name != "dtype"}
        clip = CLIPModel.from_pretrained(pretrained_model_name_or_path, **overrides)
        vision_config = cast(CLIPVisionConfig, clip.config.vision_config)
        recognition_layer = adapter.setdefault("recognition_layer", vision_config.num_hidden_layers * 3 // 4)
        adapter.setdefault("fusion_layers", [[round(recognition_layer * i / 3), i] for i in range(4)])
        # With patches of 14 pixels, 0.7 of 640 pixels is a whole number of them.
        adapter.setdefault("clip_image_scale", 0.7 if vision_config.patch_size == 14 else 0.5)
        clip_config = clip.config.to_dict()
        if os.path.isdir(pretrained_model_name_or_path):
            clip_config.pop("_name_or_path", None)  # it would be saved, and means nothing on another machine
        hub_options = {name: overrides[name] for name in HUB_ARGUMENTS if name in overrides}
        is_folder = os.path.isdir(pretrained_model_name_or_path)
        base = os.path.abspath(pretrained_model_name_or_path) if is_folder else pretrained_model_name_or_path
        commit = find_commit(pretrained_model_name_or_path, **hub_options)
        model = cls._from_config(
            SANConfig(clip_config=clip_config, base_model_name_or_path=base, base_model_revision=commit, **adapter),
            dtype=clip.dtype,
            attn_implementation=clip.config._attn_implementation,
        )
        for name in ("text_model", "text_projection"):
            getattr(model, name).load_state_dict(getattr(clip, name).state_dict())
        for name in ("vision_model", "visual_projection"):
            getattr(model.model, name).load_state_dict(getattr(clip, name).state_dict())
        model.logit_scale.data.copy_(clip.logit_scale)
        return model

    def get_class_embeds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Encodes class names with CLIP's text tower.

        Args:
            input_ids (`torch.Tensor` of shape (C, T, L)):
                Token ids of C classes in T prompt templates, each with an end-of-text token, padded on the right.
            attention_mask (`torch.Tensor` of shape (C, T, L), *optional*):
                Taken because tokenizers give it. It changes nothing: the tower is causal and reads off the
                end-of-text token, before any padding.

        Returns:
            `torch.Tensor` of shape (C, D): the mean over the templates of the normalised embeddings, normalised.

        Raises:
            ValueError: `input_ids` has another shape or dtype, is longer than CLIP's context or holds other ids.
        """
        text_config = self.config.clip_text_config
        context, vocab_size = text_config.max_position_embeddings, text_config.vocab_size
        if input_ids.dim() != 3 or input_ids.is_floating_point() or not 0 < input_ids.shape[2] <= context:
            raise ValueError(
                f"input_ids must be integers of shape (classes, templates, tokens) with at most {context} tokens, got "
                f"{input_ids.dtype} of shape {tuple(input_ids.shape)}. SANProcessor(text=[...]) makes them."
            )
        if not input_ids.numel():
            raise ValueError(f"No classes or no templates: input_ids is of shape {tuple(input_ids.shape)}.")
        # Not while compiling: the answer depends on the data.
        if not torch.compiler.is_compiling() and not 0 <= input_ids.min() <= input_ids.max() < vocab_size:
            raise ValueError(
                f"input_ids hold ids of {input_ids.min()}..{input_ids.max()}, outside CLIP's vocabulary of "
                f"{vocab_size} tokens. Use the tokenizer that belongs to the checkpoint."
            )
        # 2 stands for the highest id, in configurations of old.
        eos_token_id = text_config.eos_token_id
        if not torch.compiler.is_compiling() and eos_token_id != 2:
            if not input_ids.eq(cast(int, eos_token_id)).any(dim=-1).all():
                raise ValueError(
                    f"input_ids hold prompts without CLIP's end-of-text token ({eos_token_id}), off which their "
                    "embedding is read. Use the tokenizer that belongs to the checkpoint."
                )
        num_templates = input_ids.shape[1]
        class_embeds = []
        for classes in input_ids.split(max(1, TEXT_BATCH_SIZE // num_templates)):
            prompts = encode_prompts(self.text_model, classes.flatten(0, 1))
            embeds = F.normalize(self.text_projection(prompts), dim=-1)
            class_embeds.append(F.normalize(embeds.unflatten(0, (-1, num_templates)).mean(dim=1), dim=-1))
        return torch.cat(class_embeds)

    @torch.no_grad()
    def set_vocabulary(
        self,
        class_names: list[str],
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        class_embeds: torch.Tensor | None = None,
    ) -> None:
        """
        Makes the model carry a vocabulary: from then on it needs no text, and `save_pretrained` keeps it.

        Args:
            class_names: the C class names, for `config.id2label` and `config.label2id`.
            input_ids (`torch.Tensor` of shape (C, T, L), *optional*):
                Their token ids, as `SANProcessor(text=class_names)` gives them.
            attention_mask (`torch.Tensor` of shape (C, T, L), *optional*):
                See `get_class_embeds`.
            class_embeds (`torch.Tensor` of shape (C, D), *optional*):
                Their embeddings, instead of `input_ids`.

        Raises:
            ValueError: neither or both are given, or their number isn't that of the names, or names repeat.
        """
        if (input_ids is None) == (class_embeds is None):
            raise ValueError("set_vocabulary needs either input_ids or class_embeds (and not both).")
        if input_ids is not None:
            class_embeds = self.get_class_embeds(input_ids.to(self.device), attention_mask)
        class_embeds = cast(torch.Tensor, class_embeds)
        self._check_class_embeds(class_embeds)
        # Of a set, the names' order changes from run to run.
        if not isinstance(class_names, list | tuple) or not all(isinstance(name, str) for name in class_names):
            raise ValueError(f"class_names must be a list of strings, got {class_names!r}.")
        if len(class_names) != class_embeds.shape[0]:
            raise ValueError(f"Got {len(class_names)} class names for {class_embeds.shape[0]} class embeddings.")
        if len(set(class_names)) != len(class_names):
            repeated = sorted({name for name in class_names if class_names.count(name) > 1})
            raise ValueError(f"Class names must differ from each other; repeated: {repeated}.")
        self.class_embeds = nn.Buffer(class_embeds.to(self.no_object_embed).clone())
        self.config.vocabulary_size = 0  # names of carried embeddings can't be changed
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = {name: i for i, name in enumerate(class_names)}
        self.config.vocabulary_size = len(class_names)

    def _check_class_embeds(self, class_embeds: torch.Tensor) -> None:
        width = self.config.clip_embed_dim
        if class_embeds.dim() != 2 or class_embeds.shape[0] == 0 or class_embeds.shape[1] != width:
            raise ValueError(
                f"class_embeds must be of shape (classes, {width}) with at least one class, got "
                f"{tuple(class_embeds.shape)}."
            )

    def build_classifier(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        class_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The classifier (C + 1, D), L2-normalised rows, no-object last, from what `forward` got of the classes."""
        if input_ids is not None and class_embeds is not None:
            raise ValueError("Got both input_ids and class_embeds. Classes come as one or the other.")
        if input_ids is not None:
            class_embeds = self.get_class_embeds(input_ids, attention_mask)
        elif class_embeds is None:
            class_embeds = self.class_embeds
        if class_embeds is None:
            raise ValueError(
                "No classes: pass input_ids (SANProcessor(images=..., text=[...]) makes them) or class_embeds, or "
                "give the model a vocabulary with set_vocabulary."
            )
        self._check_class_embeds(class_embeds)
        return F.normalize(torch.cat([class_embeds.to(self.no_object_embed), self.no_object_embed]), dim=-1)

    def encode_images(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> SANModelOutput:
        """The part of `forward` that needs no classes: mask logits, and mask embeddings for [`class_logits`]."""
        return self.model(pixel_values, image_sizes=image_sizes, return_dict=True)

    def class_logits(self, mask_embeds: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
        """
        Cosine similarity of masks and classes, at CLIP's temperature.

        Args:
            mask_embeds: (..., Q, D), L2-normalised.
            classifier: (C + 1, D) of [`build_classifier`].

        Returns:
            (..., Q, C + 1), no-object last.
        """
        return self.logit_scale.exp() * mask_embeds @ classifier.T

    def count_targets(
        self, labels: torch.Tensor | None = None, class_labels: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        What the losses of a batch are divided by. Where the gradients of several batches make one step, sum it over
        them and over all processes, and give each `forward` the sum as `target_counts`:

            counts = sum(model.count_targets(batch["labels"]) for batch in batches)
            for batch in batches:
                (model(**batch, target_counts=counts).loss / len(batches)).backward()

        Args:
            labels: the batch's (B, H, W) semantic maps,
            class_labels: or the classes (M_i,) of each image's masks.

        Returns:
            (4,) int64, on the CPU.
        """
        if (labels is None) == (class_labels is None):
            raise ValueError("count_targets needs either labels or class_labels (and not both).")
        if labels is not None:
            class_labels = classes_of_maps(labels, self.config.semantic_loss_ignore_index)
        return count_targets(cast(list[torch.Tensor], class_labels), self.config.num_queries)

    def _check_targets(
        self, labels: torch.Tensor | None, targets: SANTargets
    ) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None, torch.Tensor | None]:
        """`mask_labels`, `class_labels` and `target_counts`."""
        if unknown := set(targets) - {"mask_labels", "class_labels", "target_counts"}:
            raise TypeError(f"forward() got an unexpected keyword argument {sorted(unknown)[0]!r}.")
        mask_labels, class_labels = targets.get("mask_labels"), targets.get("class_labels")
        target_counts = targets.get("target_counts")
        if labels is not None and (mask_labels is not None or class_labels is not None):
            raise ValueError("Got both labels and mask_labels/class_labels. Pass one or the other.")
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("mask_labels and class_labels go together; got only one of them.")
        learns = self.training and torch.is_grad_enabled() and (labels is not None or class_labels is not None)
        if learns and target_counts is None and not torch.compiler.is_compiling():
            check_whole_step()
        return mask_labels, class_labels, target_counts

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        class_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        output_clip_feature_maps: bool | None = None,
        side_adapter: str | None = None,
        **targets: Unpack[SANTargets],
    ) -> SANForSemanticSegmentationOutput:
        """
        The classes come as `input_ids`, as `class_embeds`, or not at all if the model carries a vocabulary. They are
        shared by the batch.

        Args:
            pixel_values (`torch.Tensor` of shape (B, channels, height, width)):
                RGB, normalised with CLIP's mean and standard deviation, padded with zeros.
            input_ids (`torch.Tensor` of shape (C, T, L), *optional*):
                Token ids of C classes in T prompt templates.
            attention_mask (`torch.Tensor` of shape (C, T, L), *optional*):
                See `get_class_embeds`.
            class_embeds (`torch.Tensor` of shape (C, D), *optional*):
                Precomputed class embeddings, without the no-object row, which the model appends.
            labels (`torch.Tensor` of shape (B, H, W), *optional*):
                For the loss, a semantic map of class indices; `config.semantic_loss_ignore_index` where unlabelled.
            image_sizes (`torch.Tensor` of shape (B, 2), *optional*):
                (height, width) of each image before padding. Not used here: handed through for post-processing.
            output_auxiliary_logits (`bool`, *optional*):
                Whether to return the predictions of the earlier supervised layers.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the side adapter's tokens, or the indices of those to return.
            output_attentions (`bool`, *optional*):
                Whether to return attention weights (computed by the eager implementation).
            output_clip_feature_maps (`bool`, *optional*):
                Whether to return CLIP's feature maps.
            side_adapter (`str`, *optional*):
                Name of the side adapter to use for this call, if not `active_side_adapter`.
            **targets ([`SANTargets`]):
                `mask_labels` and `class_labels` instead of `labels`; `target_counts` where gradients are accumulated.

        Raises:
            ValueError: no classes, or a shape or label that doesn't fit; or gradients that are accumulated without
                `target_counts`.
        """
        if side_adapter is not None and side_adapter != self.active_side_adapter:
            return self.get_side_adapter(side_adapter)(
                pixel_values,
                input_ids,
                attention_mask,
                class_embeds,
                labels,
                image_sizes,
                output_auxiliary_logits,
                output_hidden_states,
                output_attentions,
                output_clip_feature_maps,
                **targets,
            )
        mask_labels, class_labels, target_counts = self._check_targets(labels, targets)

        # Masks (B, Q, Hs, Ws) and what CLIP recognises in them (B, Q, D).
        outputs = self.model(
            pixel_values,
            image_sizes=image_sizes,
            output_auxiliary_logits=labels is not None or mask_labels is not None or output_auxiliary_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_clip_feature_maps=output_clip_feature_maps,
            return_dict=True,
        )
        # Cosine similarity with the class names (C + 1, D), at CLIP's temperature: (B, Q, C + 1).
        classifier = self.build_classifier(input_ids, attention_mask, class_embeds)
        class_queries_logits = self.class_logits(outputs.mask_embeds, classifier)

        auxiliary = [
            {"masks_queries_logits": masks, "class_queries_logits": self.class_logits(embeds, classifier)}
            for masks, embeds in zip(outputs.auxiliary_masks_queries_logits or (), outputs.auxiliary_mask_embeds or ())
        ]

        loss, loss_dict = None, None
        if labels is not None:
            config = self.config
            mask_labels, class_labels = split_semantic_map(
                labels, classifier.shape[0] - 1, config.semantic_loss_ignore_index, config.ignore_index_is_class
            )
        if mask_labels is not None and class_labels is not None:
            predictions = [(layer["masks_queries_logits"], layer["class_queries_logits"]) for layer in auxiliary]
            predictions.append((outputs.masks_queries_logits, class_queries_logits))
            loss_dict = mask_classification_loss(predictions, mask_labels, class_labels, self.config, target_counts)
            loss = cast(torch.Tensor, sum(loss_dict.values()))

        return SANForSemanticSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            class_queries_logits=class_queries_logits,
            masks_queries_logits=outputs.masks_queries_logits,
            mask_embeds=outputs.mask_embeds,
            class_embeds=classifier,
            attention_bias=outputs.attention_bias,
            image_sizes=image_sizes,
            padded_sizes=outputs.padded_sizes,
            patch_sizes=outputs.patch_sizes,
            auxiliary_logits=auxiliary if output_auxiliary_logits else None,
            hidden_states=outputs.hidden_states,
            clip_feature_maps=outputs.clip_feature_maps,
            attentions=outputs.attentions,
            recognition_attentions=outputs.recognition_attentions,
        )


SANModel.register_for_auto_class("AutoModel")
SANForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
# Pipelines go by these lists of names; they log an error for a model that isn't there.
MODEL_MAPPING_NAMES[SANConfig.model_type] = SANModel.__name__
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[SANConfig.model_type] = SANForSemanticSegmentation.__name__

__all__ = [
    "SANForSemanticSegmentation",
    "SANForSemanticSegmentationOutput",
    "SANModel",
    "SANModelOutput",
    "SANPreTrainedModel",
]
