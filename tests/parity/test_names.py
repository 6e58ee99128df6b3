"""The page that maps the original's names to ours names what exists."""

import re
from pathlib import Path

from san_hf import modeling
from san_hf.modeling import (
    SANConfig,
    SANForSemanticSegmentation,
    SANImageProcessor,
    SANModelOutput,
    SANProcessor,
    clip_recognition_san,
    loss_san,
    side_adapter_san,
)
from tests.tiny import tiny_config, tiny_tokenizer


PAGE = Path(__file__).parents[2] / "san_hf" / "conversion" / "README.md"


def test_our_names_exist():
    """Catches a name on the page that has been changed in the code, or never was there."""
    model = SANForSemanticSegmentation(tiny_config())
    owners = {
        "SideAdapter": model.model.side_adapter,
        "MaskDecoder": model.model.mask_decoder,
        "SANModel": model.model,
        "SANForSemanticSegmentation": model,
        "SANModelOutput": SANModelOutput(),
        "SANImageProcessor": SANImageProcessor(),
        "SANProcessor": SANProcessor(SANImageProcessor(), tiny_tokenizer()),
    }
    modules = [modeling, side_adapter_san, clip_recognition_san, loss_san]
    files = {path.name for path in (PAGE.parents[2] / "modeling").glob("*.py")}
    names = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| paper", "| original")):
            names += re.findall(r"`([A-Za-z_.]+)`", line.strip("| ").rpartition(" | ")[2])
    assert len(names) > 60
    for name in names:
        owner, _, attribute = name.partition(".")
        if name.endswith(".py"):
            assert name in files, name
        elif attribute:
            assert hasattr(owners[owner], attribute), name
        elif name not in ("None", "add"):
            assert name in SANConfig.__dataclass_fields__ or any(hasattr(module, name) for module in modules), name
