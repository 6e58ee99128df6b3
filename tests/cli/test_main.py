"""The command line as a whole: help, version, errors, and what is imported when."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from san_hf.cli import app, console
from san_hf.cli.help import GROUPS
from san_hf.cli.main import COMMANDS
from san_hf.cli.vocabulary_options import templates_of_options
from san_hf.modeling.prompts_san import PROMPT_TEMPLATES
from san_hf.version import __version__


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "san_hf" / "checkpoints" / "picture-book"
HEAVY = {"torch", "transformers", "datasets", "accelerate", "pyarrow", "scipy", "numpy"}


def run_python(code: str) -> str:
    """What a new process prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_segment_does_without_data_sets(tmp_path):
    """Catches an import of `datasets`, pandas and pyarrow for one image: a second and 50 MB."""
    photo = ROOT / "san_hf/checkpoints/picture-book/sample.png"
    code = f"""
import sys
from typer.testing import CliRunner
from san_hf.cli import app
from san_hf.cli.help import GROUPS
arguments = ["segment", {str(photo)!r}, "--classes", "a,b", "--output", {str(tmp_path)!r}]
result = CliRunner().invoke(app, arguments)
assert result.exit_code == 0, result.output
print(sorted({{"datasets", "pyarrow"}} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


def test_help_and_version_import_nothing_heavy():
    """Catches an import that makes help wait for torch, Transformers or datasets."""
    code = f"""
import json, sys
from typer.testing import CliRunner
from san_hf.cli import app
from san_hf.cli.help import GROUPS
from san_hf.cli.main import COMMANDS
loaded = {{}}
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    loaded[" ".join(arguments)] = sorted({HEAVY!r} & set(sys.modules))
print(json.dumps(loaded))
"""
    loaded = json.loads(run_python(code))
    assert len(loaded) == len(COMMANDS) + 2
    assert not any(loaded.values()), loaded


@pytest.mark.parametrize(
    "first",
    [
        "import san_hf",
        pytest.param("import transformers, san_hf", marks=pytest.mark.slow),
        pytest.param("import san_hf.modeling", marks=pytest.mark.slow),
        pytest.param("import san_hf.data.loading", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_find_the_package(first):
    """Catches a registration that comes too late, or not at all, whatever is imported first."""
    code = f"""
import sys
{first}
assert "san_hf.modeling" not in sys.modules or "transformers" in sys.modules
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor
folder = {str(CHECKPOINT)!r}
model = AutoModelForSemanticSegmentation.from_pretrained(folder)
import san_hf
assert type(model) is san_hf.SANForSemanticSegmentation, type(model)
assert type(AutoConfig.from_pretrained(folder)) is san_hf.SANConfig
assert type(AutoModel.from_config(model.config)) is san_hf.SANModel
assert type(AutoProcessor.from_pretrained(folder)) is san_hf.SANProcessor
"""
    run_python(code)


def test_module_is_a_command():
    """Catches `python -m san_hf` that does nothing, or isn't what `san-hf` is."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for module in ("san_hf", "san_hf.cli"):
        command = [sys.executable, "-m", module, "--version"]
        assert (
            subprocess.run(command, env=environment, capture_output=True, text=True).stdout == f"san-hf {__version__}\n"
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    """Catches a command without an example for a newcomer, or an option without a description."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "For example: san-hf " in result.output or f"san-hf {command} --config" in result.output
    assert "Error" not in result.output
    assert "bool" not in result.output.lower()


def test_help_is_in_groups():
    """Catches one list of thirty options, and a group of options that there aren't."""
    output = CliRunner().invoke(app, ["segment", "--help"], env={"COLUMNS": "80"}).output
    titles = [re.search(r"─ (.+?) ─", line)[1] for line in output.splitlines() if "╭" in line]
    assert titles == ["Arguments", "Options", "Words", "Large images and maps", "Running"]
    known = {parameter.name for command in get_command(app).commands.values() for parameter in command.params}
    assert {name for names in GROUPS.values() for name in names.split()} <= known


def test_version():
    """Catches a version stated twice."""
    import san_hf

    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"san-hf {san_hf.__version__}"
    assert CliRunner().invoke(app, ["segment", "a", "b", "--what"]).exit_code == 2


def test_completion_is_on():
    """Catches a command line that shells can't complete."""
    assert "--install-completion" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output


def test_templates(tmp_path):
    """Catches named templates that the command line doesn't know, and own ones that are lost or out of order."""
    assert [templates_of_options([name]) for name in PROMPT_TEMPLATES] == list(PROMPT_TEMPLATES)
    (tmp_path / "own.txt").write_text("art of a {}.\n\nthe {}\n")
    given = ["a {}.", str(tmp_path / "own.txt"), "vild"]
    assert templates_of_options(given) == ["a {}.", "art of a {}.", "the {}", *PROMPT_TEMPLATES["vild"]]
    assert templates_of_options(None) is None
    for wrong in ("vlid", "{} and {}"):
        with pytest.raises((ValueError, console.typer.Exit)):
            templates_of_options([wrong])


def raise_(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no such thing"), "Error: no such thing"),
        (RuntimeError("CUDA error: an illegal access\nException raised from here\nframe #0"), "CUDA error: an illegal"),
        (RuntimeError(), "Error: RuntimeError"),
        (OSError(), "Error: OSError"),
        (FileNotFoundError(2, "No such file", "a.txt"), "a.txt"),
        (MemoryError(), "out of memory: scale the image down"),
    ],
)
def test_expected_errors_are_one_line(monkeypatch, capsys, error, expected):
    """Catches stack traces, errors of torch over several lines, and errors without a message."""
    command = console.expected_errors(lambda: raise_(error))
    with pytest.raises(console.typer.Exit) as ended:
        command()
    printed = capsys.readouterr().err
    assert ended.value.exit_code == 2
    assert expected in printed and printed.count("\n") == 1


def test_unexpected_errors_are_not_hidden():
    """Catches a bug of ours that is made to look like a user's mistake."""
    with pytest.raises(KeyError):
        console.expected_errors(lambda: raise_(KeyError("x")))()


def test_debug_shows_the_stack_trace(tmp_path):
    """Catches an option that does nothing, and one that stays on."""
    arguments = ["results", str(tmp_path / "nowhere")]
    plain = CliRunner().invoke(app, arguments)
    debug = CliRunner().invoke(app, ["--debug", *arguments])
    again = CliRunner().invoke(app, arguments)
    assert plain.exit_code == debug.exit_code == again.exit_code == 2
    assert "Traceback" in debug.output and "FileNotFoundError" in debug.output
    assert "Traceback" not in plain.output and plain.output == again.output
