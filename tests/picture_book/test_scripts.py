"""The script that makes the embedded checkpoint, and the benchmark of open-vocabulary transfer on what it leaves.

By default both run in this process, with few steps; with RUN_SLOW=1 also as commands.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from san_hf.hub import from_pretrained
from san_hf.picture_book.measure import VALIDATION_SEED, measure
from san_hf.picture_book.objects import BASE, CLASS_NAMES, STUFF


ROOT = Path(__file__).parents[2]
HERE, COMMAND = "in this process", "as a command"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "scripts" / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run_script(way: str, name: str, arguments: Sequence) -> None:
    arguments = [str(argument) for argument in arguments]
    if way == COMMAND:
        command = [sys.executable, ROOT / "scripts" / name, *arguments]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
        return
    threads = torch.get_num_threads()
    try:
        load_script(name).main(arguments)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[HERE, pytest.param(COMMAND, marks=pytest.mark.slow)])
def way(request):
    return request.param


@pytest.fixture(scope="module")
def made(way, tmp_path_factory):
    """The output of the script that makes the embedded checkpoint, after a few steps: made/ and work/clip."""
    folder = tmp_path_factory.mktemp("picture-book")
    paths = ["--output", folder / "made", "--work-dir", folder / "work"]
    run_script(way, "make_embedded_checkpoint.py", ["--fast", *paths])
    return folder


def test_the_script_makes_a_complete_folder(made):
    """Catches a script that no longer runs from end to end, or forgets a part of the folder."""
    model, processor = from_pretrained(made / "made")
    assert model.dtype == torch.float32
    assert model.config.id2label == dict(enumerate(CLASS_NAMES))
    assert list(model.config.id2label.values()) == list(CLASS_NAMES)
    inputs = processor(images=Image.open(made / "made" / "sample.png"), text=["sky", "sea"], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).class_queries_logits.isfinite().all()
    results = json.loads((made / "made" / "results.json").read_text())
    assert 0 <= results["novel_miou"] <= 100
    card = (made / "made" / "README.md").read_text()
    assert "novel compositions" in card and 'san_hf.from_pretrained("picture-book")' in card
    assert not list((made / "made").glob("*.py"))
    assert not [path for path in (made / "made").glob("*.json") if "auto_map" in path.read_text()]


def test_benchmark_of_parts(way, made, capfd):
    """Catches a variant that can't be built, results of another variant, and finished trainings done again."""
    output = made / "results.json"
    variants = ["full method", "no fusion"]
    settings = {"steps": 1, "pages": 4, "measured_pages": 1}
    known = {"variant": "no fusion", "seed": 0, **settings, "base_miou": 40, "novel_miou": 20, "stuff_miou": 80}
    output.write_text(json.dumps([known, known | {"seed": 1, "novel_miou": 30}]))
    options = ["--steps", 1, "--pages", 4, "--measured-pages", 1, "--jobs", 1 if way == HERE else 2]
    options += ["--clip", made / "work" / "clip", "--output", output, "--variants", *variants]
    run_script(way, "benchmarks/open_vocabulary.py", options)
    rows = json.loads(output.read_text())
    assert [row["variant"] for row in rows] == ["no fusion", "no fusion", "full method"]
    header, _, full, no_fusion = capfd.readouterr().out.splitlines()[-4:]
    assert header == "| variant | base | novel | novel / base | stuff |"
    assert full.startswith("| full method |")
    assert no_fusion == "| no fusion | 40.0 ± 0.0 | 25.0 ± 7.1 | 62% | 80.0 ± 0.0 |"


def test_benchmark_finds_regressions():
    """Catches a regression that passes, and noise that doesn't."""
    benchmark = load_script("benchmarks/open_vocabulary.py")
    before = [{"variant": name, "base_miou": 60, "novel_miou": 50, "stuff_miou": 90} for name in benchmark.ABLATIONS]
    assert benchmark.regressions([before[0] | {"novel_miou": 45.1}], before) == []
    (problem,) = benchmark.regressions([before[0] | {"novel_miou": 44.9}], before)
    assert problem == "full method: novel mIoU 44.9, was 50.0"


def test_fine_tuning(way, tmp_path, capfd):
    """Catches a start that is trained or measured once for each seed, a table with other numbers than the file, and
    finished trainings done again."""
    output = tmp_path / "results.json"
    settings = {"steps": 1, "pages": 8, "measured_pages": 6}
    known = {"variant": "CLIP frozen", "seed": 2, **settings, "base_miou": 40, "novel_miou": 20, "stuff_miou": 80}
    output.write_text(json.dumps([known]))
    options = ["--part", "fine-tuning", "--steps", 1, "--measured-pages", 6, "--seeds", 1, 2, "--output", output]
    options += ["--variants", "before", "CLIP frozen", "--jobs", 1 if way == HERE else 2]
    run_script(way, "benchmarks/open_vocabulary.py", options)
    rows = json.loads(output.read_text())
    assert rows[0] == known
    assert sorted((row["variant"], row["seed"]) for row in rows) == [
        ("CLIP frozen", 1),
        ("CLIP frozen", 2),
        ("before", 1),
    ]
    (before,) = (row for row in rows if row["variant"] == "before")
    *_, first, second = capfd.readouterr().out.splitlines()
    base, novel, stuff = (before[f"{kind}_miou"] for kind in ("base", "novel", "stuff"))
    assert first == f"| before | {base:.1f} | {novel:.1f} | {novel / base:.0%} | {stuff:.1f} |"
    model, processor = from_pretrained("picture-book")
    metrics = measure(model, processor, 6, VALIDATION_SEED)
    assert metrics.items() <= before.items()
    mean = (next(row for row in rows if row not in (known, before))["base_miou"] + 40) / 2
    assert second.startswith(f"| CLIP frozen | {mean:.1f} ± ")


VISION, TEXT = {"model.vision_model", "model.visual_projection"}, {"text_model", "text_projection", "logit_scale"}
FEW = "CLIP's vision tower trained, houses and cars only"


@pytest.mark.parametrize(
    "variant, trained",
    [
        ("CLIP frozen", set()),
        ("LoRA on CLIP's vision tower", set()),
        ("CLIP's vision tower trained", VISION),
        (FEW, VISION),
    ],
)
def test_what_fine_tuning_trains(variant, trained):
    """Catches a CLIP that is trained where it is said to be frozen, or only said to be trained; LoRA that learns
    nothing; a side adapter that LoRA freezes; and other classes than those that are said."""
    benchmark = load_script("benchmarks/open_vocabulary.py")
    before = from_pretrained("picture-book")[0].state_dict()
    model, _ = benchmark.fine_tune_san("picture-book", 8, 1, 1, **benchmark.FINE_TUNINGS[variant])
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    changed = {name for name in before.keys() - {"class_embeds"} if not torch.equal(after[name], before[name])}

    def changed_in(part: str) -> bool:
        return any(name.startswith(part) for name in changed)

    assert {part for part in VISION | TEXT if changed_in(part)} == trained
    assert changed_in("model.side_adapter") and changed_in("model.mask_decoder") and changed_in("no_object_embed")
    lora = {name: tensor for name, tensor in after.items() if ".lora_" in name}
    assert bool(lora) == ("LoRA" in variant) and all(name.startswith("model.vision_model") for name in lora)
    assert all(tensor.any() for name, tensor in lora.items() if ".lora_B." in name)
    names = set(model.config.id2label.values())
    assert names == {
        name for name in (*BASE, *STUFF) if variant != FEW or name in STUFF or name.endswith(("house", "car"))
    }


def test_page_has_the_benchmark_as_committed():
    """Catches a table that is not what was measured, and a variant without results."""
    benchmark = load_script("benchmarks/open_vocabulary.py")
    committed = json.loads(benchmark.COMMITTED.read_text())
    page = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    for part in benchmark.PARTS.values():
        assert set(part.variants) <= {row["variant"] for row in committed}
        assert benchmark.table(committed, part.variants) in page


@pytest.mark.parametrize("change", [0, -6])
def test_benchmark_check(tmp_path, capsys, change):
    """Catches a `--check` that compares nothing: with results of all variants there is nothing to train."""
    benchmark = load_script("benchmarks/open_vocabulary.py")
    rows = [row for row in json.loads(benchmark.COMMITTED.read_text()) if row["variant"] in benchmark.ABLATIONS]
    changed = [row | {"novel_miou": row["novel_miou"] + change * (row["variant"] == "no fusion")} for row in rows]
    output = tmp_path / "results.json"
    output.write_text(json.dumps(changed))
    arguments = ["--check", "--clip", str(tmp_path), "--output", str(output)]
    if change == 0:
        benchmark.main(arguments)
        assert benchmark.table(rows, benchmark.ABLATIONS) in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="has become worse:\nno fusion: novel mIoU 18.9, was 24.9"):
            benchmark.main(arguments)
    with pytest.raises(SystemExit, match="other --steps, --pages or --measured-pages"):
        benchmark.main([*arguments, "--steps", "399"])
