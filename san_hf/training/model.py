"""The model that a training starts from, and its processor."""

import torch
from transformers import AutoTokenizer

from san_hf.data import SegmentationDataset
from san_hf.hub import load_model
from san_hf.hub.load import check_name
from san_hf.loading import ModelError, check_tokenizer
from san_hf.messages import one_line
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.modeling.card_san import is_hub_id
from san_hf.modeling.fast_linear_san import fast_linear
from san_hf.paths import expand_path

from .config import ConfigError, ModelSection


def check_start(section: ModelSection) -> None:
    """
    Before data are opened, which may take long.

    Raises:
        ConfigError: no model can have the checkpoint's name.
    """
    if section.checkpoint is not None:
        try:
            check_name(section.checkpoint)
        except ModelError as error:
            raise ConfigError(f"model.checkpoint={section.checkpoint} can't be used: {error}") from error


def build_model(section: ModelSection, data: SegmentationDataset) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """
    Loads or builds what is to be trained, in float32 on the CPU, with the data's classes as its vocabulary.

    Args:
        section: which model.
        data: gives class names and the ignore index.

    Raises:
        ConfigError: the model can't be loaded or built as the configuration says.
    """
    start = section.checkpoint or section.clip or ""
    fields = {**section.san_config, "freeze_clip": section.freeze_clip}
    try:
        if section.checkpoint is not None:
            model, processor = load_model(start, torch.float32, revision=section.revision, **fields)
            # Transformers changes the fields of a saved configuration only after that was validated.
            model.config.validate()
        else:
            revision = {"revision": section.revision}
            start = expand_path(start)
            model = SANForSemanticSegmentation.from_clip(start, dtype=torch.float32, **revision, **fields)
            tokenizer = AutoTokenizer.from_pretrained(start, **revision)
            check_tokenizer(tokenizer, model.config, start)
            processor = SANProcessor(SANImageProcessor(size=_size(model.config.image_size)), tokenizer)
        if section.prompt_templates is not None:
            processor = SANProcessor(processor.image_processor, processor.tokenizer, section.prompt_templates)
    # Sizes that don't fit, or files that are broken, make torch and transformers fail in ways of their own.
    except Exception as error:
        key = "model.checkpoint" if section.checkpoint is not None else "model.clip"
        changed = f" with model.san_config={section.san_config}" if section.san_config else ""
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{key}={start}{changed} can't be used: {problem}") from error

    if section.image_size is not None:
        processor.image_processor.size = _size(section.image_size)
    processor.image_processor.ignore_index = data.ignore_index
    model.config.semantic_loss_ignore_index = data.ignore_index
    if section.freeze_text:
        freeze_text_tower(model)
    set_vocabulary(model, processor, data.class_names)
    return model, processor


def check_base(model: SANForSemanticSegmentation, section: ModelSection, repository: str | None) -> None:
    """
    Before a training whose models are to be saved without their CLIP, and perhaps pushed to a repository.

    Raises:
        ConfigError: the CLIP under the model isn't known, can't be loaded or is another one, or is a folder of this
            machine while the models are to be pushed.
    """
    if section.base is None and model.config.base_model_name_or_path is None:
        raise ConfigError(
            "checkpoints.adapter_only: this checkpoint doesn't say which CLIP it was made from. Name it, a folder or a "
            "repository, such as model.base=openai/clip-vit-base-patch16 for san-vit-b-16, or save whole models "
            "(checkpoints.adapter_only=false)."
        )
    try:
        model.set_base_model(None if section.base is None else expand_path(section.base))
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoints.adapter_only is not possible: {one_line(error)} (model.base)") from error
    base = model.config.base_model_name_or_path
    if repository is not None and not is_hub_id(base):
        raise ConfigError(
            f"hub.repo and checkpoints.adapter_only: the CLIP under the model is '{base}', a folder of this machine, "
            "that nobody else can load. Name the same one on the Hub, model.base=owner/name, or push the whole model "
            "(checkpoints.adapter_only=false)."
        )


def set_vocabulary(model: SANForSemanticSegmentation, processor: SANProcessor, class_names: list[str]) -> None:
    """Has the model carry these classes."""
    try:
        with fast_linear(model.device):
            model.set_vocabulary(class_names, **processor(text=class_names, return_tensors="pt"))
    except ValueError as error:
        raise ConfigError(f"The class names can't be used: {error}") from error


def freeze_text_tower(model: SANForSemanticSegmentation) -> None:
    """Freezes CLIP's text tower and temperature, so that classes have to be encoded only once."""
    for part in (model.text_model, model.text_projection):
        part.requires_grad_(False)
    model.logit_scale.requires_grad_(False)


def trains_text(model: SANForSemanticSegmentation) -> bool:
    """Whether the classes have to be encoded again in every step."""
    return any(parameter.requires_grad for parameter in model.text_model.parameters())


def _size(shortest_edge: int) -> dict[str, int]:
    """As the paper: the longest edge up to four times the shortest."""
    return {"shortest_edge": shortest_edge, "longest_edge": 4 * shortest_edge}
