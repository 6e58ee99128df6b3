"""Side adapters without their CLIP: saved as folders of what was trained, and several on one CLIP.

Several side adapters on one CLIP are several models whose CLIP modules are the same objects: nothing is copied, and
each can be used by itself.
"""

import copy
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .adapter_folder_san import (
    LORA_FOLDER,
    SIDE_ADAPTER_FILE,
    WEIGHT_FILES,
    activate_lora,
    active_lora,
    check_lora_of_clip,
    check_peft,
    check_sizes,
    find_lora,
    find_processor,
    find_side_adapter,
    keep_trainable,
    load_lora,
    lora_layers,
    read_tensors,
    save_lora,
    select_side_adapter,
)
from .base_clip_san import check_base, describe_differences, load_base, record_base, select_clip
from .card_san import CARD_FILE, is_hub_id, known_card, new_card, write_card
from .configuration_san import SANConfig
from .processing_san import SANProcessor


# What a model and the models beside it on one CLIP have each for themselves, by the attribute that holds it.
OWN_PARTS = (
    "config",
    "no_object_embed",
    "class_embeds",
    "model.config",
    "model.side_adapter",
    "model.mask_decoder",
    "model.recognition_tokens",
    "model.vision_model.embeddings.position_embedding",
)


class SideAdapterMixin(PreTrainedModel):
    """
    The methods of `SANForSemanticSegmentation` for side adapters: saving one, and having several on one CLIP.

    The active one's parts are the model's own, under the names that they have in a model with one. Each other one is
    kept in a model of its own, whose CLIP modules are this model's; these models are no submodules, so that optimisers,
    `state_dict` and engines see the active one only.
    """

    config: SANConfig
    model: Any
    no_object_embed: torch.Tensor
    complete_config: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._active_side_adapter = "default"
        self._other_side_adapters: dict[str, Any] = {}
        self._lora_of: dict[str, tuple[str, ...]] = {}

    # ---- saving one

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args,
        adapter_only: bool = False,
        card: str | None = None,
        **kwargs,
    ) -> None:
        """
        [`PreTrainedModel.save_pretrained`]; LoRA weights go into a folder beside the model's, and a card that is there
        already says so if its results are of other weights.

        Args:
            save_directory: the folder.
            *args: as Transformers has them.
            adapter_only: whether to leave out CLIP, see [`save_side_adapter`], which takes the other arguments.
            card: text of the folder's README.md, if not the one that is known. Without CLIP there is always a card.
            **kwargs: as Transformers has them, or of `save_side_adapter`.
        """
        if adapter_only:
            return self.save_side_adapter(save_directory, *args, card=card, **kwargs)
        config, state, lora = self.config, kwargs.get("state_dict"), active_lora(self)
        if card is None and os.path.isfile(os.path.join(save_directory, CARD_FILE)):
            card = known_card(self, os.fspath(save_directory), self.state_dict() if state is None else state)
        if lora_layers(self):
            check_peft(self)
            state = dict(self.state_dict() if state is None else state)
            whole = {key.replace(".base_layer.", "."): state[key] for key in state if ".lora_" not in key}
            kwargs["state_dict"] = whole
        config.lora_folder = LORA_FOLDER if lora else None
        # Transformers would save LoRA alone where it knows of it, without the side adapter.
        has_lora, self._hf_peft_config_loaded = getattr(self, "_hf_peft_config_loaded", False), False
        base = config.base_model_name_or_path
        if not is_hub_id(base):
            config.base_model_name_or_path = None  # where a folder is means nothing on another machine
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._hf_peft_config_loaded, config.base_model_name_or_path = has_lora, base
        if not kwargs.get("is_main_process", True):
            return None
        if lora:
            save_lora(self, os.path.join(save_directory, LORA_FOLDER), state or {})
        if os.path.isfile(stale := os.path.join(save_directory, SIDE_ADAPTER_FILE)):
            os.remove(stale)
        if card:
            write_card(card, os.fspath(save_directory), config, adapter_only=False)
        return None

    def set_base_model(
        self,
        name_or_path: str | None = None,
        revision: str | None = None,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **hub_options: Any,
    ) -> None:
        """
        Makes sure that the configuration names the CLIP under this model, with its digest, and that it is that CLIP.

        Args:
            name_or_path: a folder or repository; by default the one that the model was made from.
            revision: its branch, tag or commit.
            state_dict: the model's tensors, if not `state_dict()`.
            **hub_options: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: the base isn't known, or the model's CLIP isn't that base any more.
            OSError: the base can't be loaded.
        """
        config, clip = self.config, select_clip(self.state_dict() if state_dict is None else state_dict)
        base_name = name_or_path or config.base_model_name_or_path
        if base_name is None:
            raise ValueError(
                "This model doesn't know which CLIP it was made from, and a side adapter means nothing without: say "
                "so with base_model='openai/clip-vit-base-patch16', or whichever it is."
            )
        trained = "A side adapter alone can't bring that back: save the whole model, or train CLIP by LoRA."
        if name_or_path is not None or config.base_model_sha256 is None:
            revision = config.base_model_revision if name_or_path is None else revision
            base = load_base(base_name, revision=revision, **hub_options)
            if differences := describe_differences(clip, select_clip(base.state_dict())):
                raise ValueError(
                    f"The CLIP of this model isn't '{base_name}', or was trained: {differences}. {trained}"
                )
            record_base(config, base_name, base, revision=revision, **hub_options)
        else:
            try:
                check_base(config, clip, "The CLIP of this model was trained, or")
            except ValueError as error:
                raise ValueError(f"{error} {trained}") from None

    def save_side_adapter(
        self,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        base_model: str | None = None,
        base_model_revision: str | None = None,
        processor: SANProcessor | None = None,
        card: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        What `save_pretrained(save_directory, adapter_only=True)` does: writes what was trained and nothing else, as
        `config.json`, `side_adapter.safetensors`, LoRA weights in a folder, code, processor and a card.

        Args:
            save_directory: a folder; it is made if need be. Weights of a whole model in it are removed.
            is_main_process: whether this process writes.
            state_dict: the model's tensors, if not `state_dict()`.
            base_model: the CLIP under it, a folder or repository; by default the one that the model was made from.
            base_model_revision: its branch, tag or commit.
            processor: what is saved as processor; by default the one of where the model was loaded from, else a new
                one with the base's tokenizer.
            card: text of README.md; by default the one that is known.
            **kwargs: `cache_dir`, `token`, `local_files_only` for base and processor; of the other arguments of
                `save_pretrained`, which are about large models, none is needed.

        Raises:
            ValueError: the base isn't known, or the model's CLIP isn't that base any more.
            OSError: the base or its tokenizer can't be loaded, or the folder can't be written.
        """
        config, state = self.config, dict(self.state_dict() if state_dict is None else state_dict)
        hub_options = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
        check_peft(self)
        self.set_base_model(base_model, base_model_revision, state_dict=state, **hub_options)
        if not is_main_process:
            return
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in select_side_adapter(state).items()}
        processor = processor or find_processor(config, self.name_or_path, **hub_options)
        folder = os.fspath(save_directory)
        card = known_card(self, folder, state, processor) if card is None else card
        os.makedirs(folder, exist_ok=True)
        config.lora_folder = LORA_FOLDER if active_lora(self) else None
        self.complete_config()
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.architectures = [type(self).__name__]
        custom_object_save(self, folder, config=cast(Any, config))
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if config.lora_folder is not None:
            save_lora(self, os.path.join(folder, config.lora_folder), state)
        save_file(tensors, os.path.join(folder, SIDE_ADAPTER_FILE), metadata={"format": "pt"})
        for file in os.listdir(folder):
            if file in WEIGHT_FILES or (file.startswith("model-") and file.endswith(".safetensors")):
                os.remove(os.path.join(folder, file))
        name = os.path.basename(os.path.abspath(folder))
        write_card(card or new_card(config, name, adapter_only=True), folder, config, adapter_only=True)

    # ---- LoRA

    def add_adapter(self, *args, **kwargs) -> None:
        """[`PreTrainedModel.add_adapter`], PEFT's; the side adapter stays trainable beside it."""
        with keep_trainable(self):
            super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args, **kwargs):
        """[`PreTrainedModel.load_adapter`], PEFT's; the side adapter stays trainable beside it."""
        with keep_trainable(self):
            return super().load_adapter(*args, **kwargs)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """[`PreTrainedModel.set_adapter`], PEFT's; also where LoRA was off, for a side adapter that has none."""
        super().set_adapter(adapter_name)
        activate_lora(self, (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name))

    # ---- several on one CLIP

    @property
    def active_side_adapter(self) -> str:
        """Name of the side adapter that `forward` uses; the one that the model was loaded with is "default"."""
        return self._active_side_adapter

    @property
    def side_adapters(self) -> list[str]:
        """Names of all side adapters, the active one first."""
        return [self._active_side_adapter, *self._other_side_adapters]

    def load_side_adapter(
        self, name_or_path: str | os.PathLike, name: str, *, revision: str | None = None, **hub_options: Any
    ) -> None:
        """
        Loads another side adapter onto the CLIP of this model. [`set_side_adapter`] then makes it the active one.

        Args:
            name_or_path: its folder or repository, as `save_pretrained(adapter_only=True)` makes it. It may be of any
                size, and carry any vocabulary.
            name: what to call it.
            revision: branch, tag or commit of the repository.
            **hub_options: `cache_dir`, `token`, `local_files_only`, `subfolder`.

        Raises:
            ValueError: the name is taken or none, there is no side adapter, or it was trained on another CLIP.
            OSError: the folder or repository can't be read.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"Got {name!r:.80} as the side adapter's name, expected a text.")
        if name in self.side_adapters:
            raise ValueError(f"There is a side adapter {name!r} already; delete_side_adapter removes it.")
        where = {"revision": revision, **hub_options}
        config = SANConfig.from_pretrained(name_or_path, **where)
        file = find_side_adapter(name_or_path, config.to_dict(), **where)
        if file is None:
            raise ValueError(
                f"'{name_or_path}' holds no side adapter ({SIDE_ADAPTER_FILE}). "
                "model.save_pretrained(folder, adapter_only=True) makes one of a model."
            )
        self._check_clip_of(config, name_or_path)
        other = self._beside(config)
        tensors = read_tensors(file)
        expected = select_side_adapter(other.state_dict())
        wrong = sorted(
            key
            for key in {*expected, *tensors}
            if key not in expected or key not in tensors or expected[key].shape != tensors[key].shape
        )
        if wrong:
            raise ValueError(
                f"'{file}' doesn't fit the config.json beside it: {len(wrong)} tensors are missing, unknown or of "
                f"another shape ({', '.join(wrong[:3])}). Get the folder again."
            )
        like = self.no_object_embed
        other.load_state_dict({key: tensor.to(like) for key, tensor in tensors.items()}, strict=False, assign=True)
        if (lora := find_lora(name_or_path, config, **where)) is not None:
            check_lora_of_clip(lora)
            before = active_lora(self)
            load_lora(self, lora, name)
            self._lora_of[name] = (name,)
            activate_lora(self, before)
        self._other_side_adapters[name] = other.train(self.training)

    def set_side_adapter(self, name: str) -> None:
        """
        Makes a side adapter, with its LoRA and vocabulary, the one that `forward` uses and training trains. Nothing is
        loaded or copied: the modules change places.

        Raises:
            ValueError: there is none of that name.
        """
        if name == self._active_side_adapter:
            return
        other = self._other(name)
        for path in OWN_PARTS:
            holder, _, attribute = path.rpartition(".")
            mine, its = self._holder(holder), other._holder(holder)
            part = getattr(mine, attribute)
            setattr(mine, attribute, getattr(its, attribute))
            setattr(its, attribute, part)
        self._lora_of[self._active_side_adapter] = active_lora(self)
        activate_lora(self, self._lora_of.get(name, ()))
        del self._other_side_adapters[name]
        self._other_side_adapters[self._active_side_adapter] = other
        self._active_side_adapter = name

    def get_side_adapter(self, name: str):
        """
        The model of one side adapter, to use beside the active one: it shares CLIP's modules with this model, and has
        the rest for itself.

        Raises:
            ValueError: there is none of that name, or it goes with other LoRA weights than those in force, which are
                in CLIP itself: [`set_side_adapter`] changes both.
        """
        if name == self._active_side_adapter:
            return self
        other = self._other(name)
        wanted, present = self._lora_of.get(name, ()), active_lora(self)
        if wanted != present:
            raise ValueError(
                f"The side adapter {name!r} goes with {wanted[0] if wanted else 'no'} LoRA weights on CLIP, and "
                f"{present[0] if present else 'none'} are in force, for the whole model: call "
                f"set_side_adapter({name!r}) instead."
            )
        return other

    def delete_side_adapter(self, name: str) -> None:
        """
        Removes a side adapter and its LoRA weights.

        Raises:
            ValueError: there is none of that name, or it is the active one.
        """
        if name == self._active_side_adapter:
            raise ValueError(f"{name!r} is the active side adapter: set_side_adapter to another one first.")
        self._other(name)
        del self._other_side_adapters[name]
        if lora := self._lora_of.pop(name, ()):
            self.delete_adapter(list(lora))

    def _other(self, name: str) -> Any:
        """The model that holds an inactive side adapter, on this model's CLIP as it is now."""
        if name not in self._other_side_adapters:
            known = ", ".join(map(repr, self.side_adapters))
            raise ValueError(f"There is no side adapter {name!r}; there are {known}. load_side_adapter loads one.")
        other = self._other_side_adapters[name]
        if other.model.visual_projection is not self.model.visual_projection or (
            other.text_projection is not self.text_projection
        ):
            other._share_clip(self)  # quantisers and PEFT put other modules in their place
        return other

    def _holder(self, path: str) -> Any:
        return self.get_submodule(path) if path else self

    def _beside(self, config: SANConfig) -> Any:
        """A model for another side adapter, on this one's CLIP, its own weights still on the meta device."""
        config.clip_config = self.config.clip_config
        config._attn_implementation_internal = self.config._attn_implementation_internal
        with torch.device("meta"):
            other = type(self)(config)
        other._share_clip(self)
        return other

    def _share_clip(self, owner: Any) -> None:
        """Puts the owner's CLIP in place of this model's, except for the position embeddings."""
        # Shallow copies: their tensors and layers are the very same objects.
        vision, embeddings = (copy.copy(owner._holder(f"model.vision_model{path}")) for path in ("", ".embeddings"))
        own = self.model.vision_model.embeddings.position_embedding
        embeddings._modules = {**embeddings._modules, "position_embedding": own}
        vision._modules = {**vision._modules, "embeddings": embeddings}
        self.model.vision_model, self.model.visual_projection = vision, owner.model.visual_projection
        self.text_model, self.text_projection = owner.text_model, owner.text_projection
        self.logit_scale = owner.logit_scale

    def _check_clip_of(self, config: SANConfig, location: str | os.PathLike) -> None:
        """Refuses a side adapter that was trained on another CLIP than this model's."""
        clip = select_clip(self.state_dict())
        if all(tensor.is_floating_point() for tensor in clip.values()):
            check_base(config, clip, f"For '{location}', the CLIP of this model")
        elif config.base_model_sha256 is None or config.base_model_sha256 != self.config.base_model_sha256:
            raise ValueError(
                f"The CLIP of this model is quantised, and was '{self.config.base_model_name_or_path}' (SHA-256 "
                f"{self.config.base_model_sha256}); '{location}' was trained on '{config.base_model_name_or_path}' "
                f"({config.base_model_sha256})."
            )
        check_sizes(config.clip_config, self.config.clip_config, f"'{location}'")

    # ---- what is done to a model is done to all of its side adapters

    def _models(self) -> list[Any]:
        return [self, *self._other_side_adapters.values()]

    def _apply(self, fn, recurse=True):
        for other in self._other_side_adapters.values():
            other._apply(fn, recurse)  # CLIP, too: once more changes nothing
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        """[`torch.nn.Module.train`]"""
        for other in self._other_side_adapters.values():
            other.train(mode)
        return super().train(mode)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        for other in self._other_side_adapters.values():
            other._set_gradient_checkpointing(*args, **kwargs)

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        for other in self._other_side_adapters.values():
            other.config._attn_implementation_internal = self.config._attn_implementation_internal
