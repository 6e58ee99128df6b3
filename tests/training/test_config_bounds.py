"""Configurations that ask for more memory or time than their bytes are worth."""

import json

import pytest

from san_hf.training.config import ConfigError
from san_hf.training.config_file import load_config


def laughs(start: str, depth: int = 40) -> str:
    """Each line stands for twice the line before."""
    return f"a0: &a0 {start}\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, depth))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs("[x]"), "more than 10,000 values"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)), "10,000"),
        ("a: &a [*a]", "'a' is unknown, or a part of what it stands for"),
        ("a: *nothing", "'nothing' is unknown"),
        ("a: " + "[" * 5000, "is no YAML"),
        ("a: " + "9" * 5000, "is no YAML"),
        ("a: 2001-99-99", "is no YAML"),
        ("[" + "x, " * 20_000 + "]", "more than 10,000 values"),
        ("#" * 1_000_001, "has 1,000,001 bytes, expected at most 1,000,000"),
    ],
)
def test_configurations_that_fill_the_memory(tmp_path, text, message):
    """Catches aliases of aliases, which validation would write out, and errors of other kinds."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_aliases_that_are_meant(tmp_path):
    """Catches an anchor and its alias that are refused, too, or read as something else."""
    (tmp_path / "c.yaml").write_text(
        "output: &name runs/x\nmodel: {checkpoint: *name}\ndata: &data {source: *name}\nvalidation: {}\n"
    )
    with pytest.raises(ConfigError, match="validation: unknown key"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("output: &name runs/x\nmodel: {checkpoint: *name}\ndata: {source: *name}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.output == config.model.checkpoint == config.data.source == "runs/x"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/tmp/x", "a\\b", "x" * 300, "a\nb", "checkpoints", "Log.jsonl"]
)
def test_projects_stay_in_the_runs_folder(name):
    """Catches a tracker's project that makes folders elsewhere, or among the run's own files."""
    required = ["output=runs/x", "model.checkpoint=x", "data.source=x"]
    with pytest.raises(ConfigError, match=r"logging: project is .*, expected a name"):
        load_config(None, [*required, f"logging.project={json.dumps(name)}"])
    assert load_config(None, [*required, "logging.project=my streets"]).logging.project == "my streets"
