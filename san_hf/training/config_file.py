"""The configuration of a training as a file: YAML, `key=value` overrides, and errors that name the key."""

import datetime
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from san_hf.files import write_file
from san_hf.messages import one_line
from san_hf.paths import expand_path

from .config import ConfigError, TrainingConfig, fields, is_resumable, suggest, value_at


# Stands where a value has to be given, in a configuration that is only shown.
REQUIRED = "REQUIRED"
# Of a configuration, aliases written out.
MOST_VALUES, MOST_BYTES = 10_000, 1_000_000
RECIPES = Path(__file__).parent / "recipes"


def find_recipe(name: str | Path) -> Path:
    """
    The file of a recipe: a file, or the name of one that comes with the package, such as "finetune".

    Raises:
        ConfigError: there is neither.
    """
    path = Path(expand_path(name))
    if path.exists():
        return path
    packaged = RECIPES / f"{name}.yaml"
    if path.name == str(name) and packaged.is_file():
        return packaged
    recipes = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise ConfigError(
        f"The configuration '{name}' can't be read: there is no such file, and none of the package's recipes has that "
        f"name: {recipes}."
    )


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, to_show: bool = False
) -> TrainingConfig:
    """
    Reads a configuration.

    Args:
        path: a YAML file, or the name of a recipe, see [`find_recipe`]; its key `base` may name another file, relative
            to it, that it changes.
        overrides: "section.key=value" with the value in YAML, such as "optimizer.learning_rate=5e-5" or
            "model.san_config={num_queries: 50}". They win over the file.
        to_show: what has to be given and isn't is `REQUIRED`, no error.

    Raises:
        ConfigError: a file that can't be read, a key that isn't known or is missing, or a value of the wrong kind.
    """
    values = _read_file(find_recipe(path)) if path is not None else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip("- "):
            raise ConfigError(f"Got {override!r}, expected key=value such as optimizer.learning_rate=5e-5.")
        try:
            change = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"The value of {override!r} is no YAML: {_one_line(error)}.") from error
        for part in reversed(key.strip().split(".")):
            change = {part: change}
        values = _merge(values, change)
    if to_show:
        values = _merge({"output": REQUIRED, "data": {"source": REQUIRED}, "model": {}}, values)
        if isinstance(values["model"], dict) and not {"checkpoint", "clip"} & values["model"].keys():
            values = _merge(values, {"model": {"checkpoint": REQUIRED}})
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        where = f"'{path}'" if path is not None else "The configuration"
        problems = "\n  ".join(_describe(problem) for problem in error.errors())
        raise ConfigError(f"{where} can't be used:\n  {problems}") from error


def save_config(config: TrainingConfig, path: Path) -> None:
    """Writes every key with its value."""
    write_file(path, yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def table() -> str:
    """All keys as a Markdown table; a dagger marks those that may change on resuming."""
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for key, field in fields():
        mark = " †" if is_resumable(field) else ""
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined or default is ... else f"`{_to_yaml(default)}`"
        kind = _type_name(field.annotation).replace("|", r"\|")
        lines.append(f"| `{key}`{mark} | {kind} | {shown} | {field.description} |")
    return "\n".join(lines)


def describe(config: TrainingConfig) -> str:
    """Every key with its value and what it is."""
    values = config.model_dump()
    return "\n".join(f"{key}={_to_yaml(value_at(values, key))}\n    {field.description}" for key, field in fields())


class _Loader(yaml.SafeLoader):
    """
    YAML 1.2's numbers and booleans (5e-5 is a number, `no` a word), and no key twice. Aliases are allowed, but not
    those that stand for more values than any configuration has.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent) and self.anchors.get(self.peek_event().anchor, parent) not in self.sizes:
            raise yaml.YAMLError(f"the alias {self.peek_event().anchor!r} is unknown, or a part of what it stands for")
        node: Any = super().compose_node(parent, index)
        if node not in self.sizes:
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            self.sizes[node] = 1 + sum(self.sizes[part] for part in parts)
            if self.sizes[node] > MOST_VALUES:
                raise yaml.YAMLError(f"it stands for more than {MOST_VALUES:,} values")
        return node

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
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"The configuration '{path}' has {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}: is it "
                "another file?"
            )
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration '{path}' can't be read: {one_line(error)}.") from error
    except ConfigError:
        raise
    # Beside its own errors, those of numbers and dates that can't be, and of what is nested too deeply.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"The configuration '{path}' is no YAML: {_one_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration '{path}' holds {type(values).__name__}, expected keys with values.")
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"'{path}': base: got {base!r}, expected the name of a YAML file beside it.")
    if path.resolve() in seen:
        raise ConfigError(f"'{path}' is its own base, by way of {', '.join(map(str, seen))}.")
    return _merge(_read_file(path.parent / expand_path(base), (*seen, path.resolve())), values)


def _merge(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; everything else is replaced."""
    merged = dict(values)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _describe(problem: Mapping[str, Any]) -> str:
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
    if problem["type"] == "missing" and key == "model":
        return "model: missing: give model.checkpoint (a SAN to go on with) or model.clip (a CLIP to build one on)"
    if problem["type"] == "missing":
        return f"{key}: missing, and there is no default"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    message = problem["msg"].removeprefix("Input ")
    value = problem["input"]
    if problem["type"] == "string_type" and isinstance(value, bool | int | float | datetime.date | None):
        message += ": in YAML, text that looks like a number, a date, true, false or null goes in quotes"
        value = value.isoformat() if isinstance(value, datetime.date) else value
        return f"{key}: {message}; got {value!r:.80}"
    return f"{key}: {message}, got {value!r:.80}"


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
