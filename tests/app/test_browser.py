"""
The app as somebody sees it: a headless Chromium, from an upload to the files. It needs the extra `app`, playwright, and
Debian's package chromium, or the program that CHROMIUM names.

SAN_HF_SCREENSHOT=FILE keeps a screenshot of the embedded model's app; model_cards/app.png is one.
"""

import gc
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from san_hf.app.interface import SAMPLE, launched
from san_hf.app.limits import Limits
from san_hf.app.models import Models
from san_hf.app.state import Session
from san_hf.inference import Predictor


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs chromium: apt install chromium, or set CHROMIUM", allow_module_level=True)
pytest.importorskip("gradio", reason="needs gradio: pip install 'san_hf[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")


pytestmark = pytest.mark.slow
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
).split()
NAMES = ["blue bird", "orange house", "sky", "mountain", "grass"]


class Tab:
    """A tab of a browser, with the parts of the page that a visitor uses."""

    def __init__(self, browser, address: str):
        self.page = browser.new_page()
        self.addresses: list[str] = []
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(address)
        self.page.locator("#picture input[type=file]").wait_for(state="attached")

    @property
    def questions(self) -> int:
        """How many the page has asked the server."""
        return sum(address.endswith("/queue/join") or "/run/" in address for address in self.addresses)

    def upload(self, file: Path) -> None:
        self.page.set_input_files("#picture input[type=file]", str(file))

    def add_names(self, *names: str) -> None:
        field = self.page.locator("#tags input")
        for name in names:
            field.fill(name)
            field.press("Enter")
        field.press("Escape")

    def choose(self, label: str, choice: str) -> None:
        """One of a drop-down list's choices."""
        self.page.get_by_label(label, exact=True).click()
        self.page.locator("ul[role=listbox] li", has_text=choice).first.click()

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the result's picture is on the page; (x, y) are shares of its width and height."""
        return tuple(
            self.page.locator("#result img").evaluate(
                """(image, [x, y]) => {
                    const area = image.getBoundingClientRect();
                    const width = image.naturalWidth, height = image.naturalHeight;
                    const scale = Math.min(area.width / width, area.height / height, 1);
                    return [
                        area.left + (area.width - scale * width) / 2 + x * scale * width,
                        area.top + (area.height - scale * height) / 2 + y * scale * height,
                    ];
                }""",
                [x, y],
            )
        )

    def hover(self, x: float, y: float) -> str:
        """What is said beside the pointer there; nothing where it says nothing."""
        self.page.mouse.move(*self.place(x, y))
        return self.page.locator("#hover").evaluate("tip => tip.hidden ? '' : tip.textContent")

    def click(self, x: float, y: float, expected: str) -> None:
        """Clicks there, and waits until the field says what is expected."""
        self.page.mouse.click(*self.place(x, y))
        self.wait_for_text("pixel", expected)

    def text(self, part: str) -> str:
        return self.page.locator(f"#{part} input, #{part} textarea").first.input_value()

    def wait_for_text(self, part: str, text: str) -> None:
        field = f"document.querySelector('#{part} textarea, #{part} input')"
        self.page.wait_for_function(f"() => {field}.value.includes({json.dumps(text)})")

    def wait_for_legend(self, *names: str) -> dict[str, float]:
        """The legend's shares, when it has just these names; in the note, those that were not found."""
        for name in names:
            self.page.locator("#legend", has_text=name).wait_for()
        self.page.wait_for_function(
            "() => /vision passes/.test(document.querySelector('#status textarea, #status input').value)"
        )
        rows = self.page.locator("#legend tr").all_inner_texts()
        shares = {row.split("\t")[-2].strip(): float(row.split("\t")[-1].rstrip("%")) for row in rows}
        assert set(shares) <= set(names)
        return shares


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_api.sync_playwright() as playwright:
        folder = str(tmp_path_factory.mktemp("profile"))
        context = playwright.chromium.launch_persistent_context(
            folder,
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            accept_downloads=True,
            viewport={"width": 1280, "height": 1150},
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def page():
    models = Models.load(["picture-book"])
    with launched(models, Limits(upload=1_000_000)) as page:
        yield page


def test_a_visit(browser, page, passes, tmp_path):
    """Catches a page on which an upload, words, other words, a click or a download don't do what they are for."""
    tab = Tab(browser, page.local_url)
    tab.upload(SAMPLE)
    tab.add_names("blue bird, orange house", "sky", "mountain")
    first = tab.wait_for_legend("blue bird", "orange house", "sky", "mountain")
    assert abs(sum(first.values()) - 100) < 0.3
    color = tab.page.locator("#legend tr", has_text="sky").locator("td").first.get_attribute("style")

    tab.add_names("grass")
    second = tab.wait_for_legend(*NAMES)
    assert second["grass"] > 30 and second["mountain"] < first["mountain"] - 30
    assert tab.page.locator("#legend tr", has_text="sky").locator("td").first.get_attribute("style") == color
    assert passes["images"] == 1 and tab.text("status").endswith("vision passes for this picture: 1")

    tab.click(0.5, 0.1, "sky, score ")  # at the top, in the middle
    assert "); next: mountain 0." in tab.text("pixel")
    if os.environ.get("SAN_HF_SCREENSHOT"):
        tab.hover(0.55, 0.1)
        tab.page.screenshot(path=os.environ["SAN_HF_SCREENSHOT"])

    tab.page.locator("#view label", has_text="mask").click()
    tab.page.locator("#prepare").click()
    links = tab.page.locator("#files a[download]")
    links.first.wait_for()
    files = {}
    for link in links.all():
        with tab.page.expect_download() as waiting:
            link.click()
        files[waiting.value.suggested_filename.partition(".")[2]] = waiting.value.path()
    assert sorted(files) == ["coco.json", "geojson", "json", "labels.png", "overlay.png"]
    legend = json.loads(Path(files["json"]).read_text())["classes"]
    assert {entry["name"]: round(100 * entry["share"], 1) for entry in legend if entry["pixels"]} == second
    with Image.open(files["labels.png"]) as labels:
        counts = np.bincount(np.asarray(labels).ravel(), minlength=5)
    assert [entry["pixels"] for entry in legend] == counts.tolist()
    assert passes["images"] == 1
    assert all(address.startswith((page.local_url, "data:", "blob:")) for address in tab.addresses)
    tab.page.close()


def test_hovering(browser, page, tmp_path):
    """Catches a pixel that is told by another one's class, a question for each move of the mouse, names that are taken
    for HTML, and what stays beside the pointer when the picture is another one."""
    markup = '<img src="x" onerror="window.bad = 1">'
    with Image.open(SAMPLE) as sample:
        sample.rotate(90, expand=True).resize((1200, 1700)).save(tmp_path / "tall.jpg")  # larger than it is shown
    tab = Tab(browser, page.local_url)
    tab.add_names(markup)
    tab.upload(tmp_path / "tall.jpg")
    tab.wait_for_legend(markup)
    assert tab.hover(0.5, 0.5).startswith(f"{markup}, score ")
    tab.add_names("grass", "blue bird")
    tab.wait_for_legend("grass", "blue bird", markup)
    assert tab.page.evaluate("window.bad") is None and tab.page.locator("#hover img, #legend img").count() == 0
    said = {}
    for x, y in ((0.1, 0.1), (0.5, 0.5), (0.9, 0.1), (0.95, 0.95), (0.02, 0.6)):
        asked = tab.questions
        said[x, y] = tab.hover(x, y)
        tab.page.wait_for_timeout(100)
        assert tab.questions == asked
        name, _, score = said[x, y].rpartition(", score ")
        tab.click(x, y, f"{name}, score ")
        # The same pixel, or in a picture made smaller one beside it.
        assert abs(float(tab.text("pixel").removeprefix(f"{name}, score ").partition(" ")[0]) - float(score)) < 0.05
    assert {text.rpartition(", score ")[0] for text in said.values()} == {"grass", "blue bird"}
    assert tab.hover(-0.02, 0.5) == tab.hover(0.5, 1.02) == ""

    # As large as the window, and in another view, it is the same picture.
    tab.page.locator("#result button[aria-label=Fullscreen], #result button[title=Fullscreen]").first.click()
    tab.page.wait_for_timeout(500)
    assert tab.hover(0.5, 0.5) == said[0.5, 0.5]
    tab.page.keyboard.press("Escape")
    tab.page.get_by_label("Remove Image").click()
    tab.page.locator("#result img").wait_for(state="detached")
    tab.page.mouse.move(900, 300)
    assert tab.page.locator("#hover").is_hidden()
    tab.page.close()


def test_options(browser, page, passes):
    """Catches a preset, others, a threshold, an opacity or a view that the answer knows nothing of, whether it is set
    by mouse or keyboard."""
    tab = Tab(browser, page.local_url)
    tab.upload(SAMPLE)
    tab.choose("Preset", "voc")
    legend = tab.page.locator("#legend")
    legend.get_by_text("Not found:").filter(has_text="aeroplane").wait_for()
    tab.add_names("grass")
    legend.locator("tr", has_text="grass").wait_for()
    tab.choose('Others, as one "other"', "its 91 stuff classes")
    legend.locator("tr", has_text="other").wait_for()
    before = legend.inner_text()
    changed = "src => document.querySelector('#result img').getAttribute('src') !== src"
    for name, row in (("Threshold", "100.0%"), ("Opacity", "")):
        field = tab.page.get_by_label(f"number input for {name}")
        shown = tab.page.locator("#result img").get_attribute("src")
        field.fill("0.9")
        field.press("Enter")
        tab.page.wait_for_function(changed, arg=shown)
        legend.locator("tr", has_text=row).first.wait_for()
        slider = tab.page.get_by_label(f"range slider for {name}")
        shown = tab.page.locator("#result img").get_attribute("src")
        slider.focus()
        slider.press("Home")
        tab.page.wait_for_function(changed, arg=shown)
    assert legend.inner_text() == before
    for view in ("mask", "confidence", "overlay"):
        shown = tab.page.locator("#result img").get_attribute("src")
        tab.page.locator("#view label", has_text=view).click()
        tab.page.wait_for_function(changed, arg=shown)
    assert passes["images"] == 1
    tab.page.close()


def test_errors(browser, page, tmp_path):
    """Catches a failure that says nothing, or shows a stack trace or a path."""
    tab = Tab(browser, page.local_url)
    toast = tab.page.locator(".toast-body, [data-testid=toast-body]")
    tab.page.locator("#start").click()
    toast.filter(has_text="There is no picture yet: upload, paste or take one.").wait_for()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tab.add_names("sky")
    tab.upload(tmp_path / "broken.png")
    toast.filter(has_text="The file is no picture, or of a format that can't be read here.").wait_for()
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1_000_000
    tab = Tab(browser, page.local_url)
    tab.upload(tmp_path / "large.png")
    tab.page.get_by_text("exceed", exact=False).or_(tab.page.get_by_text("maximum", exact=False)).first.wait_for()
    assert "Traceback" not in tab.page.inner_text("body")
    tab.page.close()


def test_two_tabs(browser, page, tmp_path, passes):
    """Catches a visitor who sees what another one looks at."""
    tabs = Tab(browser, page.local_url), Tab(browser, page.local_url)
    Image.new("RGB", (120, 80), (90, 160, 230)).save(tmp_path / "blue.png")
    tabs[0].upload(SAMPLE)
    tabs[1].upload(tmp_path / "blue.png")
    for tab in tabs:
        tab.add_names(*NAMES)
    shares = [tab.wait_for_legend(*NAMES) for tab in tabs]
    assert len(shares[0]) == 5 and shares[0] != shares[1]
    assert passes["images"] == 2
    for tab in tabs:
        tab.page.close()


def test_stopping(browser, page, passes, monkeypatch):
    """Catches a button that stops nothing, or after which the page is of no use or the picture is encoded again."""
    started, go_on = threading.Event(), threading.Event()
    encode = Predictor.encode

    def slow(self, images):
        started.set()
        go_on.wait(60)
        return encode(self, images)

    monkeypatch.setattr(Predictor, "encode", slow)
    tab = Tab(browser, page.local_url)
    tab.page.locator(".gallery-item, [data-testid=gallery-item], .gallery button").first.click()  # the example
    tab.add_names("sky", "grass")
    assert started.wait(60)
    tab.wait_for_text("status", "Encoding the picture")
    tab.page.locator("#stop").click()
    tab.wait_for_text("status", "Stopped.")
    go_on.set()
    tab.page.wait_for_timeout(2000)
    assert tab.page.locator("#legend tr").count() == 0 and tab.text("status") == "Stopped."
    tab.page.locator("#start").click()
    tab.wait_for_legend("sky", "grass")
    assert passes["images"] == 1
    tab.page.close()


def test_pasting_and_the_webcam(browser, page, passes):
    """Catches a way of giving a picture that leads nowhere, or that the server takes for no upload."""
    browser.grant_permissions(["clipboard-read", "clipboard-write", "camera"], origin=page.local_url.rstrip("/"))
    tab = Tab(browser, page.local_url)
    tab.page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(120, 80);
            canvas.getContext("2d").fillRect(0, 0, 120, 80);
            const blob = await canvas.convertToBlob({type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    tab.page.get_by_label("Paste from clipboard").click()
    tab.add_names("sky")
    assert tab.wait_for_legend("sky") == {"sky": 100.0}
    tab.page.close()

    tab = Tab(browser, page.local_url)
    tab.add_names("sky")
    tab.page.get_by_label("Capture from camera").click()
    tab.page.get_by_text("Click to Access Webcam").click()
    tab.page.wait_for_function("() => document.querySelector('#picture video')?.readyState >= 2")
    tab.page.get_by_label("capture photo").click()
    assert tab.wait_for_legend("sky") == {"sky": 100.0}
    tab.page.close()
    assert passes["images"] == 2


def test_a_closed_tab_is_forgotten(browser, page):
    """Catches pictures that stay in the memory when nobody looks at them any more."""

    def pictures() -> int:
        gc.collect()
        return sum(found.image is not None for found in gc.get_objects() if type(found) is Session)

    tab = Tab(browser, page.local_url)
    tab.upload(SAMPLE)
    tab.add_names("sky", "grass")
    tab.wait_for_legend("sky", "grass")
    assert pictures() > 0
    tab.page.close()
    until = time.monotonic() + 60
    while pictures() and time.monotonic() < until:
        time.sleep(0.5)
    assert pictures() == 0
