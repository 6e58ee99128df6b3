"""What the pages tell people to type is typed here, and their links lead somewhere.

A comment before each block of shell or Python says how it is tested, `<!-- test: run -->`: see `MARKS`. Those of a page
that are run are run one after the other, in one new folder with a picture, photo.jpg, two in photos/, and two small
data sets, my_photos/ and streets/.
"""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.pages import ROOT, anchors, blocks, check_bash, check_command, check_python, links, run_in_a_fork
from tests.training.training_runs import write_images


# What a block needs. All but "theirs" are checked as far as that goes: syntax, imported names, commands and options.
MARKS = {
    "run": "nothing: it is run",
    "hub": "the Hub: run with one of the tests' own",
    "refused": "likewise; an error is what it shows",
    "script": "a file of scripts/ in the folder: run so",
    "options": "an extra that the tests don't install",
    "make": "make: a target of the Makefile",
    "network": "a network",
    "data": "a data set that can't be had here, or a GPU",
    "hours": "an hour or more",
    "install": "a package registry",
    "docker": "a container engine",
    "theirs": "another project's code, written as its own pages have it, and not run here",
}
SAMPLE = ROOT / "san_hf" / "checkpoints" / "picture-book" / "sample.png"
# Written by code: cards, whose code is run with their checkpoint, and the form of cards.
GENERATED = ("model_cards/template.md", "san_hf/checkpoints/picture-book/README.md")
# Their blocks are run by a test of their own: they need a Hub, extras, or more than a minute.
TESTED_ELSEWHERE = {
    "san_hf/app/README.md": "tests/cli/test_app.py",
    "san_hf/export/README.md": "tests/export/test_page.py",
    "san_hf/hub/ADAPTERS.md": "tests/hub/test_adapters_page.py",
    "san_hf/hub/README.md": "tests/hub/test_push.py",
    "san_hf/inference/README.md": "tests/inference/test_bulk.py",
    "san_hf/inference/VIDEO.md": "tests/inference/test_video_page.py",
    "san_hf/training/FINETUNING.md": "tests/training/test_finetuning_page.py",
    "san_hf/training/README.md": "tests/training/test_page.py",
}


def find_pages() -> list[str]:
    folders = [ROOT, *(ROOT / name for name in ("san_hf", "modeling", "scripts", "model_cards"))]
    found = {path for folder in folders[1:] for path in folder.rglob("*.md")} | set(ROOT.glob("*.md"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.resolve() == path)


PAGES = find_pages()
WRITTEN = [page for page in PAGES if page not in GENERATED]
RUN = [
    page
    for page in WRITTEN
    if page not in TESTED_ELSEWHERE and any(mark == "run" for mark, _, _ in blocks(ROOT / page))
]


@pytest.fixture
def workplace(tmp_path, tmp_path_factory):
    """A reader's folder, and an environment in which `san-hf` and `python` are this checkout's."""
    programs = tmp_path_factory.mktemp("bin")
    command = programs / "san-hf"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m san_hf.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "photos").mkdir()
    with Image.open(SAMPLE) as image:
        image.convert("RGB").save(tmp_path / "photo.jpg", quality=95)
        for number in (1, 2):
            image.convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    for data, validation in (("my_photos", "validation"), ("streets", "val")):
        write_images(tmp_path / data, "train", 4)
        write_images(tmp_path / data, validation, 2)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return tmp_path, os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page, workplace):
    """Catches commands and code on a page that no longer work."""
    folder, environment = workplace
    for mark, language, code in blocks(ROOT / page):
        if mark != "run":
            continue
        if language == "python":
            run_in_a_fork(code, folder)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["san-hf"]:
                run_in_a_fork(f"from san_hf.cli import app\napp({words[1:]!r})", folder)
            else:
                program = ["bash", "-euo", "pipefail", "-c", line]
                done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", WRITTEN)
def test_every_block_says_how_it_is_tested(page):
    """Catches commands and code on a page that nothing runs, and that don't say why."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for mark, language, code in blocks(ROOT / page):
        assert language not in ("bash", "sh", "python") or mark in MARKS, code
    commands = r"^    (?:\w+=\S+ )*(?:san-hf|python|pip|accelerate|torchrun|make|git|docker) .*"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(commands, outside, re.MULTILINE), "a command outside a block that says how it is tested"


@pytest.mark.parametrize("page", WRITTEN)
def test_blocks_that_are_not_run(page):
    """Catches renamed imports, commands, options and keys of a training where code can't be run here."""
    for mark, language, code in blocks(ROOT / page):
        if mark in ("run", "theirs", "script"):
            continue
        if language == "python" and "import ray" not in code:
            check_python(code)
        elif language == "bash":
            check_bash(code)
    for command in re.findall(r"`(san-hf \w[^`]*)`", (ROOT / page).read_text(encoding="utf-8").replace("\n", " ")):
        if "..." not in command and "[" not in command:
            check_command(shlex.split(re.sub(r"\b[A-Z]{2,}\b", "x", command)))


@pytest.mark.parametrize("page", sorted(TESTED_ELSEWHERE))
def test_pages_with_tests_of_their_own(page):
    """Catches a page that is left out here and that no other test reads."""
    source = (ROOT / TESTED_ELSEWHERE[page]).read_text(encoding="utf-8")
    assert Path(page).name in source and f'"{Path(page).parent.name}"' in source


@pytest.mark.parametrize("page", [page for page in PAGES if page != GENERATED[0]])
def test_links_lead_somewhere(page):
    """Catches links to files and headings that don't exist."""
    for link in links(ROOT / page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(path), f"{page}: {link}: {sorted(anchors(path))}"


def test_every_page_is_found_from_the_readme():
    """Catches a page that no path of links from README.md leads to."""
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        targets = [link.partition("#")[0] for link in links(page) if not re.match(r"[a-z]+:", link)]
        waiting += [page.parent / target for target in targets if target.endswith(".md")]
    assert {ROOT / page for page in PAGES if page != GENERATED[0]} <= seen
