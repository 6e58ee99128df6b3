"""The page about videos: its commands and code are run on a clip of two scenes."""

import shlex
from pathlib import Path

from PIL import Image

from tests.pages import ROOT, blocks, run_in_a_fork
from tests.videos import read_clip, write_clip


PAGE = ROOT / "san_hf" / "inference" / "VIDEO.md"


def test_the_page_runs(tmp_path):
    """Catches commands and code on the page that no longer work, and files that it names and nothing writes."""
    with Image.open(ROOT / "san_hf" / "checkpoints" / "picture-book" / "sample.png") as sample:
        scene = sample.convert("RGB").resize((256, 192))
    images = [scene, scene, scene.transpose(Image.Transpose.ROTATE_180)]
    write_clip(tmp_path / "clip.mp4", images, codec="libx264", pix_fmt="yuv420p")
    for mark, language, code in blocks(PAGE):
        if (mark, language) == ("run", "python"):
            run_in_a_fork(code, tmp_path)
        elif mark == "run":
            words = shlex.split(code)
            assert words[0] == "san-hf"
            run_in_a_fork(f"from san_hf.cli import app\napp({words[1:]!r})", tmp_path)
    found = {path.name for path in (tmp_path / "outputs").iterdir() if not path.name.startswith(".")}
    assert found == {"clip.overlay.mp4", "clip.labels", "clip.json", "clip.frames.jsonl"}
    assert len(read_clip(tmp_path / "masks.mp4")) == len(list(Path(tmp_path, "outputs/clip.labels").iterdir())) == 3
