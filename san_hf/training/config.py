"""What a training is told: a YAML file and `key=value` overrides, checked before anything is loaded."""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from san_hf.modeling import SANConfig


class ConfigError(ValueError):
    """A configuration that can't be used; the message names the key and says what was expected."""


class Section(BaseModel):
    """Unknown keys and wrong types are errors: a misspelt key must not train with a default for a day."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def free(default: Any, description: str, **limits: Any) -> Any:
    """A field that doesn't change what is learned, so that a run may be resumed with another value."""
    return Field(default, description=description, json_schema_extra={"free": True}, **limits)


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
    split: str = Field("train", description="What to train on.")
    validation_source: str | None = Field(
        None,
        description="Data to evaluate on. What the other keys say of `source` holds for it, too, but for `config_name` "
        "and `revision`. Default: `source`.",
    )
    validation_split: str | None = Field("validation", description="Its split; `null` for no evaluation.")
    config_name: str | None = Field(None, description="Of a data set on the Hub that has several configurations.")
    revision: str | None = Field(None, description="Branch, tag or commit of a data set on the Hub.")
    image_column: str | None = Field(None, description="Column of the images. Default: the usual names.")
    label_column: str | None = Field(None, description="Column of the label maps. Default: the usual names.")
    class_names: str | list[str] | None = Field(
        None,
        description="Class names by label: a list, a file, or a benchmark's name such as `voc`. Default: what the data "
        "set says.",
    )
    ignore_index: int | None = Field(None, description="Value of unlabelled pixels. Default: what the data set says.")
    label_shift: int = Field(0, description="Added to labels; -1 where 0 means unlabelled and classes count from 1.")
    streaming: bool = Field(False, description="Read while training instead of downloading first.")
    shuffle_buffer: int = Field(1000, description="With `streaming`: examples to draw from at random.", ge=1)
    workers: int = free(4, "Processes that decode and augment, for each training process; 0 for none.", ge=0)


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
    every: int = free(5000, "Steps between evaluations; one more follows the last step.", ge=1)
    limit: int | None = free(None, "Number of images to evaluate on. Default: all.", ge=1)
    pictures: int = free(4, "Validation images drawn with their predictions for the trackers and in `pictures/`.", ge=0)


class CheckpointSection(Section):
    every: int = free(1000, "Steps between checkpoints. Others precede each evaluation and follow the last step.", ge=1)
    keep: int = free(2, "How many of the latest checkpoints to keep.", ge=1)


class LoggingSection(Section):
    every: int = free(20, "Steps between lines on the console. `log.jsonl` has every step.", ge=1)
    trackers: list[Literal["tensorboard", "wandb"]] = free([], "Where to send figures and pictures, too.")
    project: str = free("san-hf", "The trackers' project.")


class HubSection(Section):
    repo: str | None = free(None, "Repository to push the final model to: `owner/name`.")
    private: bool | None = free(None, "Whether a new repository is private. Default: the account's.")

    @model_validator(mode="after")
    def check(self):
        if self.repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise ValueError(f"repo is {self.repo!r}, expected owner/name")
        return self


class TrainingConfig(Section):
    """Everything a training depends on. The defaults are SAN's recipe for COCO-Stuff (Xu et al., 2023)."""

    output: str = free(..., "Folder for everything the run writes.")
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


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainingConfig:
    """
    Reads a configuration.

    Args:
        path: a YAML file; its key `base` may name another one, relative to it, that it changes.
        overrides: "section.key=value" with the value in YAML, such as "optimizer.learning_rate=5e-5" or
            "model.san_config={num_queries: 50}". They win over the file.

    Raises:
        ConfigError: a file that can't be read, a key that isn't known or is missing, or a value of the wrong kind.
    """
    values = _read_file(Path(path)) if path is not None else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip("- "):
            raise ConfigError(f"Got {override!r}, expected key=value such as optimizer.learning_rate=5e-5.")
        try:
            change = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"The value of {override!r} is no YAML: {_one_line(error)}.") from error
        for part in reversed(key.strip().split(".")):
            change = {part: change}
        values = _merge(values, change)
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        where = f"'{path}'" if path is not None else "The configuration"
        problems = "\n  ".join(_describe(problem) for problem in error.errors())
        raise ConfigError(f"{where} can't be used:\n  {problems}") from error


def save_config(config: TrainingConfig, path: Path) -> None:
    """Writes every key with its value."""
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def fields(section: type[Section] = TrainingConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
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
        if not (field.json_schema_extra or {}).get("free"):
            before, after = _get(old, key), _get(new, key)
            if before != after:
                found[key] = before, after
    return found


def table() -> str:
    """All keys as a Markdown table; a dagger marks those that may change on resuming."""
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for key, field in fields():
        mark = " †" if (field.json_schema_extra or {}).get("free") else ""
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined or default is ... else f"`{_to_yaml(default)}`"
        kind = _type_name(field.annotation).replace("|", r"\|")
        lines.append(f"| `{key}`{mark} | {kind} | {shown} | {field.description} |")
    return "\n".join(lines)


def describe(config: TrainingConfig) -> str:
    """Every key with its value and what it is."""
    values = config.model_dump()
    return "\n".join(f"{key}={_to_yaml(_get(values, key))}\n    {field.description}" for key, field in fields())


def suggest(name: str, known) -> str:
    """ "; did you mean ...?" where a known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans (5e-5 is a number, `no` a word), and no key twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} occurs twice in line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:[tT]rue|[fF]alse)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"The configuration '{path}' can't be read: {reason}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration '{path}' is no YAML: {_one_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration '{path}' holds {type(values).__name__}, expected keys with values.")
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"'{path}': base: got {base!r}, expected the name of a YAML file beside it.")
    if path.resolve() in seen:
        raise ConfigError(f"'{path}' is its own base, by way of {', '.join(map(str, seen))}.")
    return _merge(_read_file(path.parent / base, (*seen, path.resolve())), values)


def _merge(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; everything else is replaced."""
    merged = dict(values)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _describe(problem: dict[str, Any]) -> str:
    """A pydantic error in one line: the key, what came, what was expected."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "the whole"
    if problem["type"] == "extra_forbidden":
        known = {name for name, _ in fields()} | set(TrainingConfig.model_fields)
        section = ".".join(location[:-1])
        inside = [name.removeprefix(f"{section}.") for name in known if name.startswith(f"{section}.") or not section]
        hint = suggest(location[-1], inside)
        if not hint and (elsewhere := sorted(name for name in known if name.split(".")[-1] == location[-1])):
            hint = f"; did you mean {elsewhere[0]}?"
        return f"{key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{key}: missing, and there is no default"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    message = problem["msg"].removeprefix("Input ")
    return f"{key}: {message}, got {problem['input']!r:.80}"


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...").strip()


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is types.UnionType or str(get_origin(annotation)) == "typing.Union":
        return " | ".join("null" if part is type(None) else _type_name(part) for part in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
    return {"dict": "mapping"}.get(getattr(annotation, "__name__", "") or "", getattr(annotation, "__name__", "any"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
