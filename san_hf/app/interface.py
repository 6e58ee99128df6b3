"""The page in the browser, by Gradio, and the server that shows it to this machine."""

import html
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from san_hf.app.limits import Limits, uploaded_file
from san_hf.app.models import Models
from san_hf.app.requests import GuardedRequests
from san_hf.app.state import Question, Sessions
from san_hf.app.views import (
    VIEWS,
    describe_all_pixels,
    describe_pixel,
    describe_times,
    draw_view,
    legend_html,
    write_downloads,
)
from san_hf.cards import load_facts
from san_hf.devices import OUT_OF_MEMORY
from san_hf.extras import import_extra
from san_hf.hub.names import EMBEDDED_MODEL, EMBEDDED_NOTE
from san_hf.messages import one_line, printable
from san_hf.vocabularies import VOCABULARIES


SAMPLE = resources.files("san_hf") / "checkpoints" / "picture-book" / "sample.png"
# The script of a part of the page that isn't shown; that part's value never becomes HTML.
HOVER = (resources.files("san_hf") / "app" / "hover.js").read_text(encoding="utf-8")
TITLE = "Name it, and see where it is"
TEXT = f"# {TITLE}\nThe picture is encoded once; other words get their answer without another look at it."
EXPANSION_CHOICES = [("nothing", ""), ("COCO-Stuff's 171 classes", "coco"), ("its 91 stuff classes", "coco-stuff")]
# Addresses of this machine alone.
LOOPBACK = ["127.0.0.1", "localhost"]
# System fonts: the page needs no network.
FONTS = ["system-ui", "sans-serif"]


def build_interface(models: Models, limits: Limits, examples: Sequence[str] | None = None) -> Any:
    """
    The page: a picture and words in, a label map out.

    Args:
        models: what can be chosen.
        limits: of what the browser may send.
        examples: files of pictures to offer; by default the one that comes with the package.

    Returns:
        `gradio.Blocks`; [`serve`] launches it.

    Raises:
        MissingPackageError: without the extra `app`.
    """
    import_extra("gradio", "app", "The app")
    import gradio as gr

    sessions = Sessions(limits)
    page = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(limits.file_age // 4, limits.file_age))
    with page:
        gr.Markdown(TEXT + (f"\n\n{EMBEDDED_NOTE}" if EMBEDDED_MODEL in models.names else ""))
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture",
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    image_mode=None,
                    height=320,
                    elem_id="picture",
                )
                gr.Examples(list(examples or [str(SAMPLE)]), picture, label=_about(examples), api_visibility="private")
                tags = gr.Dropdown(
                    [],
                    multiselect=True,
                    allow_custom_value=True,
                    label="Class names",
                    info="Words for what to look for; Enter after each, or several separated by commas.",
                    elem_id="tags",
                )
                with gr.Row():
                    preset = gr.Dropdown([("none", ""), *VOCABULARIES], value="", label="Preset", elem_id="preset")
                    expansion = gr.Dropdown(
                        EXPANSION_CHOICES,
                        value="",
                        allow_custom_value=True,
                        label='Others, as one "other"',
                        info="Or words of your own.",
                    )
                threshold = gr.Slider(0, 1, 0, step=0.05, label='Threshold: less sure pixels become "other"')
                model = gr.Dropdown(models.names, value=models.names[0], label="Model", visible=len(models.names) > 1)
                with gr.Row():
                    start = gr.Button("Segment", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column():
                result = gr.Image(
                    label="Result", format="png", interactive=False, buttons=["fullscreen"], elem_id="result"
                )
                hover = gr.HTML(html_template="", js_on_load=HOVER, visible="hidden", apply_default_css=False)
                pixel = gr.Textbox(label="Pixel", placeholder="Point at the result, or click into it.", elem_id="pixel")
                legend = gr.HTML(elem_id="legend")
                with gr.Row():
                    view = gr.Radio(list(VIEWS), value=VIEWS[0], label="View", elem_id="view")
                    opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity of the overlay")
                status = gr.Textbox(label="Time", elem_id="status")
                prepare = gr.Button("Files to take away", elem_id="prepare")
                files = gr.File(label="Overlay, labels, JSON, COCO, GeoJSON", interactive=False, elem_id="files")

        def segment(request: gr.Request, file, tags, preset, expansion, threshold, model, view, opacity):
            with _sentences(gr):
                session = sessions.of(request.session_hash)
                session.show(uploaded_file(file, gr.utils.get_upload_folder()))
                question = Question(tuple(tags or ()), preset, expansion, threshold, model)
                before = session.segmentation
                for step in session.answer(models, question):
                    yield gr.skip(), gr.skip(), step, gr.skip(), gr.skip()
                if (found := session.segmentation) is not None:
                    shown, told = draw_view(found, view, opacity), describe_all_pixels(found)
                    # The page may ask the same again; then the pixel that somebody clicked at stays.
                    clicked = gr.skip() if found is before else ""
                    yield shown, legend_html(found), describe_times(session), clicked, told

        def segment_if_complete(request: gr.Request, file, tags, preset, *rest):
            # While something is still missing, there is nothing to say.
            if file is not None and (tags or preset):
                yield from segment(request, file, tags, preset, *rest)
                return
            with _sentences(gr):
                sessions.of(request.session_hash).show(uploaded_file(file, gr.utils.get_upload_folder()))
                yield None, "", "", "", None

        def redraw(request: gr.Request, view, opacity):
            with _sentences(gr):
                segmentation = sessions.of(request.session_hash).segmentation
                return gr.skip() if segmentation is None else draw_view(segmentation, view, opacity)

        def describe(event: gr.SelectData, request: gr.Request):
            with _sentences(gr):
                segmentation = sessions.of(request.session_hash).segmentation
                return "" if segmentation is None else describe_pixel(segmentation, *map(float, event.index))

        def download(request: gr.Request):
            with _sentences(gr), TemporaryDirectory(prefix="san-hf-") as folder:
                segmentation = sessions.of(request.session_hash).segmentation
                if segmentation is None:
                    raise ValueError("Nothing is segmented yet.")
                # Gradio copies them before it asks for what comes after.
                yield write_downloads(segmentation, Path(folder))

        def forget(request: gr.Request):
            sessions.forget(request.session_hash)

        # One question at a time, of all visitors; the others queue. While someone types, the last words count.
        private = {"api_visibility": "private"}
        queued = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
        quick = {"concurrency_limit": 4, "concurrency_id": "views", "show_progress": "hidden", **private}
        inputs = [picture, tags, preset, expansion, threshold, model, view, opacity]
        outputs = [result, legend, status, pixel, hover]
        changes = [picture.change, tags.change, preset.change, expansion.change, threshold.change, model.change]
        # Values as they come: Gradio would open the picture, without our limits and sentences.
        shared = {"preprocess": False, "show_progress": "minimal", "show_progress_on": status, **queued, **private}
        typed = gr.on(changes, segment_if_complete, inputs, outputs, **shared)
        asked = start.click(segment, inputs, outputs, **shared)
        stop.click(lambda: "Stopped.", None, status, cancels=[typed, asked], queue=False, **private)
        gr.on([view.change, opacity.change], redraw, [view, opacity], result, trigger_mode="always_last", **quick)
        result.select(describe, None, pixel, **quick)
        prepare.click(download, None, files, concurrency_limit=2, **private)
        page.unload(forget)
    return page.queue(max_size=limits.waiting, api_open=False)


@contextmanager
def launched(
    models: Models, limits: Limits, examples: Sequence[str] | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> Iterator[Any]:
    """
    The page's server, in threads of this process, for a block. Uploads and downloads are in a temporary folder, which
    goes with it.

    Args:
        models, limits, examples: see [`build_interface`].
        host: the address to listen at.
        port: 0 for any that is free.

    Returns:
        The page, `gradio.Blocks`; its address is `local_url`.

    Raises:
        OSError: the port can't be listened at.
        MissingPackageError: without the extra `app`.
    """
    port = _free_port(host, port)
    with TemporaryDirectory(prefix="san-hf-app-", ignore_cleanup_errors=True) as folder:
        # Gradio reads them when it is imported. No calls home.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        import_extra("gradio", "app", "The app")
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        middleware = [Middleware(GuardedRequests)]
        if host in LOOPBACK:
            # Another page in the same browser may have a name of its own that leads here.
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK))
        page = build_interface(models, limits, examples)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                allowed_paths=[],
                max_file_size=limits.upload,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                state_session_capacity=4 * limits.sessions,
                theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]),
                app_kwargs={"middleware": middleware},
            )
            yield page
        finally:
            page.close(verbose=False)


def serve(
    models: Models,
    limits: Limits,
    examples: Sequence[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    ready: Callable[[str], None] = print,
) -> None:
    """
    Shows the page until Ctrl-C or SIGTERM; the arguments are those of [`launched`].

    Args:
        ready: is called with the page's address.
    """
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with launched(models, limits, examples, host=host, port=port) as page:
            ready(page.local_url)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, handler)


def _about(examples: Sequence[str] | None) -> str:
    """What is said over the examples: of our own, the words that it is for."""
    words = ", ".join(load_facts(EMBEDDED_MODEL)["sample_classes"])
    return "Examples" if examples else f"Example, for the words: {words}"


@contextmanager
def _sentences(gr: Any) -> Iterator[None]:
    """Errors as one sentence in the browser; a mistake of ours keeps its stack trace for the console."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OUT_OF_MEMORY):
            text = "The memory here isn't enough for this picture: scale it down"
        elif isinstance(error, OSError | ValueError | RuntimeError):
            text = one_line(error)
        else:
            traceback.print_exc()
            text = "Something went wrong here, and what it was is on the console of the app"
        raise gr.Error(html.escape(printable(f"{text.rstrip('.')}."), quote=False), print_exception=False) from None


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"Can't listen at {host}, port {port}: {one_line(error)}. Choose another --port, or 0 for any free one."
            ) from error
        return probe.getsockname()[1]
