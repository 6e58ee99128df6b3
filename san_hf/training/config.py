"""Configuration of a training: its sections with their keys, defaults and limits."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from san_hf.modeling import SANConfig
from san_hf.paths import folder_name


# What a run calls its files and folders, without their endings.
RUN_FILES = {"best", "checkpoints", "config", "final", "log", "pictures"}


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the key and says what was expected."""


class Section(BaseModel):
    """Unknown keys and wrong types are errors: a misspelt key must not train with a default for a day."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def resumable_field(default: Any, description: str, **limits: Any) -> Any:
    """A field that doesn't change what is learned, so that a run may be resumed with another value."""
    return Field(default, description=description, json_schema_extra={"resumable": True}, **limits)


def is_resumable(field: FieldInfo) -> bool:
    """Whether a run may be resumed with another value of this field."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("resumable"))


class ModelSection(Section):
    checkpoint: str | None = Field(
        None,
        description="SAN to start from: a folder, san-vit-b-16 or san-vit-large-14, picture-book, or a repository on "
        "the Hub. Either this or `clip`.",
    )
    clip: str | None = Field(
        None, description="CLIP to put a new side adapter on: a folder or a repository on the Hub, Transformers format."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the repository.")
    base: str | None = Field(
        None,
        description="For `checkpoints.adapter_only`, the CLIP that `checkpoint` was made from, where it doesn't say so "
        "itself: a folder or a repository on the Hub.",
    )
    freeze_clip: bool = Field(
        True, description="Keep CLIP as it is, all but its vision position embeddings. `false` trains its vision tower."
    )
    freeze_text: bool = Field(
        True,
        description="Keep CLIP's text tower and temperature frozen, even with `freeze_clip: false`. Classes are then "
        "encoded once.",
    )
    image_size: int | None = Field(
        None,
        description="Shortest edge, in pixels, that the trained model's processor resizes images to; also for "
        "evaluation. Default: the checkpoint's.",
        ge=1,
    )
    prompt_templates: str | list[str] | None = Field(
        None, description="`vild`, `imagenet` or a list of templates with one `{}`. Default: the checkpoint's."
    )
    san_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Other fields of SANConfig, such as `{num_queries: 50, clip_image_scale: 0.7}`.",
    )

    @model_validator(mode="after")
    def check(self):
        if (self.checkpoint is None) == (self.clip is None):
            raise ValueError("give either checkpoint (a SAN to go on with) or clip (a CLIP to build one on)")
        known = set(SANConfig.__dataclass_fields__)
        for name in self.san_config:
            if name in ("freeze_clip", "semantic_loss_ignore_index", "vocabulary_size", "clip_config"):
                raise ValueError(f"san_config has {name!r}, which is set by other keys or by the data")
            if name not in known:
                raise ValueError(f"san_config has {name!r}, which is no field of SANConfig{suggest(name, known)}")
        return self


class DataSection(Section):
    source: str = Field(
        description="A folder that `san-hf prepare` wrote, a data set on the Hub, or a folder with images/ and labels/."
    )
    split: str = Field("train", description="What to train on; also a part, such as `train[:80%]`.")
    validation_source: str | None = Field(
        None,
        description="Data to evaluate on. What the other keys say of `source` holds for it, too, but for `config_name` "
        "and `revision`. Default: `source`.",
    )
    validation_split: str | float | None = Field(
        "validation",
        description="Its split; or a number between 0 and 1, to set that share of `split` aside, by image and `seed`; "
        "`null` for no evaluation.",
    )
    shared_images: Literal["error", "warn"] = resumable_field(
        "error", "What training and validation sharing an image is."
    )
    config_name: str | None = Field(None, description="Of a data set on the Hub that has several configurations.")
    revision: str | None = Field(None, description="Branch, tag or commit of a data set on the Hub.")
    image_column: str | None = Field(
        None, description="Column, or of a pair of folders the one, of the images. Default: the usual names."
    )
    label_column: str | None = Field(
        None, description="Column, or of a pair of folders the one, of the label maps. Default: the usual names."
    )
    class_names: str | list[str] | None = Field(
        None,
        description="Class names by label: a list, a file, or a benchmark's name such as `voc`. Default: what the data "
        "set says.",
    )
    ignore_index: int | None = Field(None, description="Value of unlabelled pixels. Default: what the data set says.")
    label_shift: int = Field(0, description="Added to labels; -1 where 0 means unlabelled and classes count from 1.")
    label_palette: str | None = Field(
        None,
        description="What the colours of label maps stand for: `binary` (black and white), `voc`, `cityscapes`, or a "
        "file of colours and classes.",
    )
    streaming: bool = Field(False, description="Read while training instead of downloading first.")
    shuffle_buffer: int = Field(1000, description="With `streaming`: examples to draw from at random.", ge=1)
    workers: int = resumable_field(4, "Processes that decode and augment, for each training process; 0 for none.", ge=0)

    @model_validator(mode="after")
    def check(self):
        if isinstance(self.validation_split, float):
            if not 0 < self.validation_split < 1:
                raise ValueError(
                    f"validation_split is {self.validation_split:g}, expected a split's name, or a number between 0 "
                    "and 1 such as 0.1"
                )
            if self.validation_source is not None:
                raise ValueError(
                    "validation_split is a share of the training images, and validation_source names others: leave one "
                    "of them out"
                )
        return self


class AugmentationSection(Section):
    crop_size: int = Field(640, description="Side of the square that training sees, in pixels.", ge=1)
    scales: list[Annotated[float, Field(gt=0)]] = Field(
        [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        description="Shortest edges to draw from, as multiples of `crop_size`.",
        min_length=1,
    )
    longest_edge: int = Field(2560, description="Limit of the longest edge, in pixels.", ge=1)
    color_jitter: bool = Field(True, description="Whether to change colours, as SSD does.")
    flip: bool = Field(True, description="Whether to mirror every second image.")


class OptimizerSection(Section):
    learning_rate: float = Field(1e-4, description="AdamW's, at the start.", gt=0)
    clip_learning_rate: float | None = Field(
        None, description="That of CLIP's own parameters. Default: `learning_rate`.", gt=0
    )
    weight_decay: float = Field(1e-4, description="Of all but norms and position and query embeddings.", ge=0)
    power: float = Field(0.9, description="Of the polynomial decay to zero.", gt=0)
    warmup_steps: int = Field(0, description="Steps of linear growth before it.", ge=0)
    max_grad_norm: float | None = Field(
        0.01, description="Norm that the whole model's gradient is clipped at; `null` for no clipping.", gt=0
    )


class TrainingSection(Section):
    steps: int = Field(60_000, description="Number of optimiser steps.", ge=1)
    batch_size: int = Field(
        32, description="Images for each optimiser step, over all processes and accumulated batches.", ge=1
    )
    gradient_accumulation: int = Field(
        1, description="Batches whose gradients make one step: `batch_size` is split in so many parts.", ge=1
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None, description="Default: what `accelerate config` or `accelerate launch` says, else no."
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice to save memory.")

    @model_validator(mode="after")
    def check(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of gradient_accumulation "
                f"({self.gradient_accumulation})"
            )
        return self


class EvaluationSection(Section):
    every: int = resumable_field(5000, "Steps between evaluations; one more follows the last step.", ge=1)
    limit: int | None = resumable_field(None, "Number of images to evaluate on. Default: all.", ge=1)
    pictures: int = resumable_field(
        4, "Validation images drawn with their predictions for the trackers and in `pictures/`.", ge=0
    )
    colors: dict[str, Any] | str | None = resumable_field(
        None,
        "Colours of classes in these drawings, by name, such as `{sky: '#87ceeb', road: grey}`; or a file of "
        "them, as `san-hf segment --colors` takes it. Other classes have those of their names.",
    )


class CheckpointSection(Section):
    every: int = resumable_field(
        1000, "Steps between checkpoints. Others precede each evaluation and follow the last step.", ge=1
    )
    keep: int = resumable_field(2, "How many of the latest checkpoints to keep.", ge=1)
    adapter_only: bool = Field(
        False,
        description="Leave CLIP, which isn't trained, out of `final/`, `best/` and the checkpoints: for B/16, 33 "
        "instead of 631 MB. Needs `model.freeze_clip`.",
    )


class LoggingSection(Section):
    every: int = resumable_field(20, "Steps between lines on the console. `log.jsonl` has every step.", ge=1)
    trackers: list[Literal["tensorboard", "wandb"]] = resumable_field([], "Where to send metrics and drawings, too.")
    project: str = resumable_field("san-hf", "The trackers' project; for TensorBoard, a folder in the run's.")

    @model_validator(mode="after")
    def check(self):
        # Whatever tracker will be used: the run's folder may hold nothing of that name, and is not to be left.
        if self.project != folder_name(self.project) or self.project.partition(".")[0].casefold() in RUN_FILES:
            raise ValueError(
                f"project is {self.project!r:.100}, expected a name that can be a folder's beside the run's files, "
                "such as san-hf"
            )
        return self


class HubSection(Section):
    repo: str | None = resumable_field(
        None, "Repository to push the best model to, or else the final one, as `san-hf push` does: `owner/name`."
    )
    private: bool | None = resumable_field(None, "Whether a new repository is private. Default: the account's.")
    picture: bool = resumable_field(
        False,
        "Whether the card shows `pictures/best.png`, validation images and what the model makes of them. They may be "
        "private, and only you know.",
    )
    license: str | None = resumable_field(
        None, "Licence of the trained weights, for the card, as the Hub names it: `cc-by-4.0`. Default: none is named."
    )

    @model_validator(mode="after")
    def check(self):
        if self.repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise ValueError(f"repo is {self.repo!r}, expected owner/name")
        return self


class TrainingConfig(Section):
    """Everything a training depends on. The defaults are SAN's recipe for COCO-Stuff (Xu et al., 2023)."""

    output: str = resumable_field(..., "Folder for everything the run writes.")
    seed: int = Field(0, description="Of initialisation, order of the data, augmentation and loss.", ge=0, lt=2**32)
    model: ModelSection
    data: DataSection
    augmentation: AugmentationSection = AugmentationSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoints: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    hub: HubSection = HubSection()

    @model_validator(mode="after")
    def check(self):
        if self.checkpoints.adapter_only and not self.model.freeze_clip:
            raise ValueError(
                "checkpoints.adapter_only leaves CLIP out, which model.freeze_clip: false trains: choose one of them"
            )
        return self


def fields(section: type[Section] = TrainingConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its pydantic field, sections resolved: ("optimizer.learning_rate", FieldInfo), ..."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that matter for what is learned, and differ between two dumped configurations: {key: (old, new)}."""
    found = {}
    for key, field in fields():
        if not is_resumable(field):
            before, after = value_at(old, key), value_at(new, key)
            if before != after:
                found[key] = before, after
    return found


def suggest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where a known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a key such as "optimizer.learning_rate" in a dumped configuration; None if there is none."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
