"""Images that strangers send: only images come in, and no address leads into the server's own network."""

import asyncio
import base64
import io
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from modeling_lavit.serving.errors import ApiError
from modeling_lavit.serving.fetch import fetch, is_public
from modeling_lavit.serving.images import ImageReader, decode_data_uri
from modeling_lavit.serving.settings import ServeSettings


def png(size=(8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format="png")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "address",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/png;charset=utf-8;BASE64,{BASE64}",
        "data:;base64," + base64.encodebytes(png()).decode(),
        f"data:image/png;base64,{BASE64.replace('=', '%3D').replace('+', '%2B')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in png()),
    ],
)
def test_data_uris_are_read_in_all_their_forms(address):
    assert decode_data_uri(address, "url") == png()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,%%%", "no base64"),
        ("data:image/png;base64,", "empty"),
        ("data:text/plain,hello", "not an image"),
        (f"data:image/png;base64,{BASE64[:40]}", "truncated|not an image|cannot be decoded"),
        ("file:///etc/passwd", "data URI or an http"),
        ("/etc/passwd", "data URI or an http"),
        ("http://example.org/a.png", "fetches no addresses"),
        ("data:image/png;base64," + base64.b64encode(png((300, 300))).decode(), "pixels"),
    ],
)
def test_what_is_no_image_within_the_limits_is_refused(address, reason):
    reader = ImageReader(ServeSettings(max_image_pixels=50_000), (48, 48))
    with pytest.raises(ApiError, match=reason) as caught:
        asyncio.run(reader.from_address(address, "messages.0"))
    assert (caught.value.status, caught.value.param) == (400, "messages.0")


def test_an_image_is_brought_to_the_size_that_the_model_reads_without_changing_what_it_sees():
    from modeling_lavit import LavitProcessor
    from modeling_lavit.checkpoints import LAVIT_EMOJI

    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    image = Image.effect_mandelbrot((301, 173), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    file = io.BytesIO()
    image.save(file, format="png")
    small = asyncio.run(ImageReader(ServeSettings(), (48, 48)).from_bytes(file.getvalue(), "image"))
    assert small.size == (48, 48)
    seen = [processor.image_processor(one, return_tensors="pt").pixel_values for one in (image, small)]
    assert seen[0].equal(seen[1])


@pytest.mark.parametrize(
    "number",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_addresses_of_private_networks_are_not_public(number):
    assert not is_public(number)


@pytest.mark.parametrize("number", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(number):
    assert is_public(number)


class Strange(BaseHTTPRequestHandler):
    """A web server with a good image and several bad ones."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/secret")
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/image":
            self.answer(png())
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/stalls":
            time.sleep(2)
        elif self.path == "/drips":
            self.send_response(200)
            self.end_headers()
            with self.gone():
                for _ in range(20):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with self.gone():
                while True:
                    self.wfile.write(bytes(65_536))

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @contextmanager
    def gone(self):
        try:
            yield
        except OSError:
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Strange)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def get(web, path, host="127.0.0.1", **options):
    address = f"http://{host}:{web.server_port}{path}"
    return asyncio.run(fetch(address, 100_000, "url", **({"seconds": 1} | options)))


def this_server_only(number):
    return number == "127.0.0.1"


def test_an_image_is_fetched(web):
    assert get(web, "/image", is_allowed=this_server_only) == png()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1"])
def test_the_own_network_is_not_asked_whatever_it_is_called(web, host):
    web.asked.clear()
    with pytest.raises(ApiError, match="private network|cannot be reached") as caught:
        get(web, "/image", host=host)
    assert caught.value.status == 400 and not web.asked


def test_a_redirect_into_the_private_network_is_not_followed(web):
    seen = []

    def only_the_first(number):
        seen.append(number)
        return len(seen) == 1

    with pytest.raises(ApiError, match="private network"):
        get(web, "/moved", is_allowed=only_the_first)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "status 404"),
        ("/loop", "redirects more than"),
        ("/endless", "more than 100000 bytes"),
        ("/stalls", "within 0.5 s"),
        ("/drips", "within 0.5 s"),
    ],
)
def test_a_server_that_misbehaves_is_given_up_in_time(web, path, reason):
    start = time.monotonic()
    with pytest.raises(ApiError, match=reason):
        get(web, path, is_allowed=this_server_only, seconds=0.5)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("address", ["http://", "http://[::1", "http://a b/", "http://no.such.name.invalid/x"])
def test_an_address_that_leads_nowhere_is_refused(address):
    with pytest.raises(ApiError, match="cannot be fetched"):
        asyncio.run(fetch(address, 1_000, "url", seconds=5))
