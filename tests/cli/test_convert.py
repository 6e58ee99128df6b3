"""`san-hf convert`, both ways."""

import torch
from typer.testing import CliRunner

from san_hf.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_errors(tmp_path, model_folder):
    """Catches stack traces of either way."""
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for arguments in (
        ["convert", tmp_path / "missing.pth", tmp_path / "out"],
        ["convert", tmp_path / "text.pth", tmp_path / "out"],
        ["convert", tmp_path / "missing", tmp_path / "out.pth", "--to-original"],
        ["convert", model_folder, model_folder, "--to-original"],
        ["convert", model_folder, tmp_path / "out.pth", "--to-original", "--config", model_folder / "config.json"],
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and result.output.startswith("Error: "), result.output
        assert result.output.count("\n") == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.pth").exists()


def test_there_and_back(tmp_path, model_folder):
    """Catches options that don't reach the library."""
    file = tmp_path / "san.pth"
    assert invoke("convert", model_folder, file, "--to-original").exit_code == 0
    result = invoke("convert", file, tmp_path / "san")
    assert result.exit_code == 2 and "Unknown sizes" in result.output
    result = invoke("convert", model_folder, file, "--to-original")
    assert result.exit_code == 2 and "exists already" in result.output
    assert invoke("convert", model_folder, file, "--to-original", "--overwrite", "--dtype", "float16").exit_code == 0
    tensors = torch.load(file, weights_only=True)["model"]
    assert {tensor.dtype for name, tensor in tensors.items() if name != "ov_classifier.logit_scale"} == {torch.float16}
