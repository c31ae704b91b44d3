"""Images from addresses: what is fetched, and the limits of time, size and type that hold for any server."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modeling_lavit.processing import load_image
from modeling_lavit.processing.image_loading_lavit import MAX_FETCHED_BYTES


PNG = (Path(__file__).parents[1] / "fixtures/preprocess/img0_96x60_RGB.png").read_bytes()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, content: bytes = PNG, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def drip(self, *pieces: bytes):
        for piece in pieces:
            for _ in range(40):
                if stopped.is_set():
                    return
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.05)

    def do_GET(self):
        kind = self.path.strip("/").replace(".png", "")
        try:
            if kind in ("image/png", "application/octet-stream", "text/html", "application/json", "video/mp4"):
                self.answer(Content_Type=kind)
            elif kind == "untyped":
                self.answer()
            elif kind == "moved":
                self.answer(b"", 302, Location="/image/png")
            elif kind == "circle":
                self.answer(b"", 302, Location="/circle")
            elif kind == "elsewhere":
                self.answer(b"", 302, Location="file:///etc/passwd")
            elif kind == "silent":
                stopped.wait(5)
            elif kind == "drips-headers":
                self.drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")
            elif kind == "drips":
                self.send_response(200)
                self.end_headers()
                self.drip(b"\x89")
            elif kind == "large":
                self.answer(bytes(2**20 + 8 * 100 * 100 + 1))
            elif kind == "cut":
                self.answer(PNG[:100], Content_Length=str(len(PNG)))
            else:
                self.answer(b"no", 404)
        except OSError:
            pass  # the reader gave up, as it shall


stopped = threading.Event()


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    stopped.set()
    server.shutdown()


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "untyped", "moved"])
def test_an_image_is_fetched(server, kind):
    assert load_image(f"{server}/{kind}").size == (96, 60)
    assert load_image(f"HTTP{server.removeprefix('http')}/{kind}.png").size == (96, 60)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot be fetched.*404"),
        ("text/html", "content type is text/html, not that of an image"),
        ("application/json", "content type is application/json"),
        ("video/mp4", "content type is video/mp4"),
        ("circle", "cannot be fetched.*redirect"),
        ("elsewhere", "cannot be fetched.*not allowed"),
        ("cut", "cannot be fetched.*bytes too early"),
    ],
)
def test_answers_that_are_no_image_are_refused_with_their_reason(server, kind, message):
    with pytest.raises(ValueError, match=message):
        load_image(f"{server}/{kind}")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.png", "http://[", "http://", "https://nowhere.invalid/a"])
def test_addresses_that_lead_nowhere_are_refused(address):
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_image(address, timeout=2)


@pytest.mark.parametrize("kind", ["silent", "drips-headers", "drips"])
def test_a_server_that_never_answers_or_never_ends_is_an_error_in_time(server, kind):
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot be fetched.*(timed out|in time|more than 0.5 seconds)"):
        load_image(f"{server}/{kind}", timeout=0.3, total_timeout=0.5)
    assert time.monotonic() - start < 1.5


def test_an_answer_has_no_more_bytes_than_its_pixels_are_worth(server):
    with pytest.raises(ValueError, match="more than 1128576 bytes"):
        load_image(f"{server}/large", max_image_pixels=100 * 100)
    with pytest.raises(ValueError, match="not an image"):
        load_image(f"{server}/large", max_image_pixels=200 * 200)
    assert MAX_FETCHED_BYTES == 64 * 2**20
