"""Files at addresses: a server on loopback that answers as servers may."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from san_hf import fetch as module
from san_hf.fetch import FetchError, fetch, is_address
from san_hf.images import ImageError, load_image


@pytest.fixture(scope="module")
def server():
    """Address of a server: /photo.png, /text, /gone, redirects, /large and /slow."""
    file = io.BytesIO()
    Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(file, format="png")
    photo = file.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name, _, rest = self.path[1:].partition("?")
            if name == "to":
                self.send_response(302)
                self.send_header("Location", rest)
                self.end_headers()
            elif name == "gone":
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                content = {"photo.png": photo, "text": b"no image", "large": bytes(300_000)}.get(name, b"")
                try:
                    self.wfile.write(content)
                    while name == "slow":
                        self.wfile.write(b"x")
                        time.sleep(0.02)
                except OSError:  # nobody listens any more
                    pass

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_at_an_address(server):
    """Catches an image that is read otherwise than the same file: transparent pixels are laid on white."""
    image = load_image(f"{server}/photo.png")
    assert image.size == (6, 4) and image.getpixel((0, 0)) == (255, 255, 255)
    assert load_image(f"{server}/to?/photo.png") == image
    with pytest.raises(ImageError, match="not an image"):
        load_image(f"{server}/text")
    with pytest.raises(ImageError, match="the server answers 404 Not Found"):
        load_image(f"{server}/gone")


def test_what_is_not_followed(server, tmp_path):
    """Catches files of this machine, and other protocols, that a redirect or an address leads to."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    for target in (f"file://{tmp_path}/secret.png", "ftp://127.0.0.1/a.png", "data:,a", "gopher://127.0.0.1/"):
        with pytest.raises(FetchError, match="can't be fetched"):
            fetch(f"{server}/to?{target}")
        with pytest.raises(FetchError, match="expected an address"):
            fetch(target)
    with pytest.raises(FetchError, match="without a user's name"):
        fetch(server.replace("//", "//me:secret@"))
    with pytest.raises(FetchError, match="can't be fetched"):
        fetch("http://127.0.0.1:9/nobody.png")


def test_bounds(server, monkeypatch):
    """Catches a server that fills the memory, or never ends."""
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 18)
    with pytest.raises(FetchError, match="more than 0 MB"):
        fetch(f"{server}/large")
    monkeypatch.setattr(module, "MOST_SECONDS", 0.2)
    with pytest.raises(FetchError, match=r"more than 0\.2 seconds"):
        fetch(f"{server}/slow")


def test_addresses():
    """Catches a file's name taken for an address, and the reverse."""
    assert is_address("HTTPS://host/a.png") and is_address("http://host")
    assert not any(map(is_address, ("photo.jpg", "ftp://host/a.png", "file:///a.png", "https:/a.png", b"http://a", 1)))
