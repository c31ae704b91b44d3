"""load_image: every kind of source and mode in, one RGB image or a clear error out."""

import base64
import io
import struct
import threading
import tracemalloc
import zlib
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from modeling_lavit import LavitImageProcessor
from modeling_lavit.processing import load_image


FIXTURES = Path(__file__).parents[1] / "fixtures" / "preprocess"
REFERENCE_IMAGES = ["img0_96x60_RGB.png", "img1_50x80_RGB.png", "img2_64x64_RGBA.png", "img3_40x30_L.png"]
RED = (255, 0, 0)


@pytest.fixture
def processor() -> LavitImageProcessor:
    return LavitImageProcessor(size={"height": 48, "width": 48})


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(FIXTURES / "img0_96x60_RGB.png")


def pixels(image: Image.Image, position: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel(position)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def close(got: tuple[int, ...], want: tuple[int, ...], tolerance: int) -> bool:
    return max(abs(a - b) for a, b in zip(got, want, strict=True)) <= tolerance


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "HSV"]
)
def test_every_8_bit_mode_keeps_a_white_and_a_black_half(mode):
    halves = Image.new("RGB", (8, 8), "white")
    halves.paste((0, 0, 0), (0, 0, 4, 8))
    route = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    image = halves.convert(route).convert(mode) if route else halves.convert(mode)
    assert image.mode == mode
    rgb = load_image(image)
    assert pixels(rgb, (1, 1)) == (0, 0, 0) and pixels(rgb, (6, 6)) == (255, 255, 255)


def test_lab_images_are_converted_through_their_colour_profile():
    lab = Image.new("LAB", (4, 4), (255, 128, 128))  # L = 100, a = b = 0
    assert close(pixels(load_image(lab)), (255, 255, 255), 2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_becomes_white(mode):
    clear_black = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear_black.paste((0, 0, 0, 255), (2, 0, 4, 4))
    image = clear_black.convert(mode)
    if mode == "P":
        image = Image.open(io.BytesIO(encoded(clear_black, "GIF")))
        assert image.mode == "P" and "transparency" in image.info
    rgb = load_image(image)
    assert pixels(rgb, (0, 0)) == (255, 255, 255) and pixels(rgb, (3, 0)) == (0, 0, 0)


def test_half_transparent_red_is_pink_and_reference_compat_drops_the_alpha():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert pixels(load_image(image)) == (255, 127, 127)
    assert pixels(load_image(image, reference_compat=True)) == RED


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_of_a_png_becomes_white(mode):
    image = Image.new("RGB", (4, 4), (7, 7, 7)).convert(mode)
    data = encoded(image, "PNG", transparency=(7, 7, 7) if mode == "RGB" else 7)
    assert pixels(load_image(data)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled_and_not_clipped_to_white(mode):
    levels = np.array([[0, 257 * 100, 65535]], dtype=">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (3, 1), levels.tobytes())
    assert [pixels(load_image(image), (i, 0))[0] for i in range(3)] == [0, 100, 255]


def test_a_16_bit_png_file_is_scaled():
    data = encoded(Image.fromarray(np.full((4, 4), 257 * 40, dtype=np.uint16)), "PNG")
    assert pixels(load_image(data)) == (40, 40, 40)


@pytest.mark.parametrize(
    ("levels", "dtype", "expected"),
    [
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([0, 257 * 100, 65535], np.int32, [0, 100, 255]),
        ([-1000, 0, 1000], np.int32, [0, 128, 255]),
        ([0.0, 0.4, 1.0], np.float32, [0, 102, 255]),
        ([0.0, 100.2, 255.0], np.float32, [0, 100, 255]),
        ([0.0, 2e6, 4e6], np.float32, [0, 128, 255]),
    ],
)
def test_modes_i_and_f_take_the_nearest_usual_white_or_are_stretched(levels, dtype, expected):
    image = Image.fromarray(np.array([levels], dtype=dtype))
    assert image.mode == ("I" if dtype is np.int32 else "F")
    assert [pixels(load_image(image), (i, 0))[0] for i in range(3)] == expected


def test_nan_in_a_float_image_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        load_image(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste(RED, (0, 0, 8, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that a camera held that way amounts to
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    loaded = load_image(data)
    assert loaded.size == (32, 16) and pixels(loaded, (2, 2)) == RED and pixels(loaded, (30, 14)) == (255, 255, 255)
    assert load_image(data, reference_compat=True).size == stored.size


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert close(pixels(load_image(data)), RED, 1)


def test_path_string_bytes_base64_and_pil_give_the_same_image(photo):
    path = FIXTURES / "img0_96x60_RGB.png"
    plain = base64.b64encode(path.read_bytes()).decode()
    sources = [path, str(path), path.read_bytes(), plain, f"data:image/png;base64,{plain}", photo]
    assert {load_image(source).tobytes() for source in sources} == {photo.convert("RGB").tobytes()}


def test_a_url_is_fetched_and_a_missing_one_is_named():
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Handler, directory=FIXTURES))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert load_image(f"{url}/img0_96x60_RGB.png").size == (96, 60)
    with pytest.raises(ValueError, match="cannot be fetched.*404"):
        load_image(f"{url}/nothing.png")
    server.shutdown()


def test_loading_leaves_the_callers_image_alone_and_open(photo):
    rgb = load_image(photo)
    rgb.paste(RED, (0, 0, 96, 60))
    assert photo.getpixel((0, 0)) != RED


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"this is a text", "not an image in a format that Pillow can read"),
        (b"", "not an image"),
        ("no_such_file.png", "'no_such_file.png' is not an existing image file"),
        ("cats", "'cats' .no such file exists"),
        (Path("no_such_file.png"), "no image file at no_such_file.png"),
        (FIXTURES, "no image file at"),
        ("x" * 5000, "not an"),
        (None, "got NoneType"),
        (3, "got int"),
    ],
)
def test_what_is_not_an_image_is_refused_by_name(source, message, processor):
    with pytest.raises(ValueError, match=message):
        load_image(source)
    with pytest.raises(ValueError, match=message):
        processor(source)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_refused(file_format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, file_format)
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.*(truncated|not an image)"):
        load_image(tmp_path / "cut")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(processor):
    header_only = encoded(Image.new("1", (12000, 9000)), "PNG")[:64]  # decoding would fail with another message
    with pytest.raises(ValueError, match="12000x9000 = 108000000 pixels, more than max_image_pixels"):
        load_image(header_only)
    huge = encoded(Image.new("1", (20000, 10000)), "PNG")
    with pytest.raises(ValueError, match="too many pixels"):
        processor(huge)


@pytest.fixture(scope="module")
def png() -> bytes:
    return (FIXTURES / "img0_96x60_RGB.png").read_bytes()


def open_at_its_end(content: bytes) -> io.BytesIO:
    file = io.BytesIO(content)
    file.seek(0, io.SEEK_END)
    return file


def mime(content: bytes) -> str:
    return base64.encodebytes(content).decode()


SOURCES = {
    "path": lambda content, path: path,
    "string": lambda content, path: str(path),
    "file URL": lambda content, path: path.as_uri(),
    "file URL of this machine": lambda content, path: f"file://localhost{path.as_uri().removeprefix('file://')}",
    "open file": lambda content, path: path.open("rb"),
    "BytesIO": lambda content, path: io.BytesIO(content),
    "BytesIO at its end": lambda content, path: open_at_its_end(content),
    "bytearray": lambda content, path: bytearray(content),
    "memoryview": lambda content, path: memoryview(content),
    "bytes of datasets": lambda content, path: {"bytes": content, "path": None},
    "path of datasets": lambda content, path: {"bytes": None, "path": str(path)},
    "bytes win over a name": lambda content, path: {"bytes": content, "path": "gone.png"},
    "base64": lambda content, path: base64.b64encode(content).decode(),
    "base64 in lines": lambda content, path: mime(content),
    "base64 without padding": lambda content, path: base64.b64encode(content).decode().rstrip("="),
    "data URI": lambda content, path: f"data:image/png;base64,{base64.b64encode(content).decode()}",
    "data URI in lines": lambda content, path: f"data:image/png;base64,{mime(content)}",
    "data URI with a parameter": lambda content, path: f"data:image/png;charset=utf-8;base64,{mime(content)}",
    "data URI without a type": lambda content, path: f"data:;base64,{mime(content)}",
    "data URI in capitals": lambda content, path: f"DATA:image/png;BASE64, {mime(content)}",
    "percent-encoded base64": lambda content, path: f"data:image/png;base64,{quote(mime(content), safe='')}",
    "percent-encoded bytes": lambda content, path: f"data:image/png,{quote(content)}",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_image_comes_from_every_usual_source(kind, png, photo, tmp_path):
    path = tmp_path / "a name with 100% ü.png"
    path.write_bytes(png)
    source = SOURCES[kind](png, path)
    assert load_image(source).tobytes() == photo.convert("RGB").tobytes()
    if hasattr(source, "close"):
        assert not source.closed
        source.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"image": 1}, 'mapping has "bytes" or "path", got the keys .\'image\'.'),
        ({"bytes": None, "path": None}, "mapping has"),
        ({"bytes": None, "path": "gone.png"}, "no image file at gone.png"),
        ("file:///nowhere/gone.png", "no image file at /nowhere/gone.png"),
        ("file://elsewhere/a.png", "another machine"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "not an image in a format"),
        ("data:text/plain,hello", "not an image in a format"),
        ("/dev/zero", "no image file at /dev/zero"),
        (io.StringIO("text"), "open it in binary mode"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "read") else str(value),
)
def test_sources_without_an_image_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_a_closed_file_and_a_closed_image_are_said_to_be_closed(png):
    file = io.BytesIO(png)
    file.close()
    image = Image.open(io.BytesIO(png))
    image.close()
    for source in (file, image):
        with pytest.raises(ValueError, match="closed"):
            load_image(source)


@pytest.mark.parametrize("size", [4, 40, 400])
def test_an_exif_block_of_random_bytes_means_upright(size):
    random = np.random.default_rng(0)
    image = Image.new("RGB", (32, 16), "white")
    image.paste(RED, (0, 0, 16, 16))
    for file_format in ("JPEG", "PNG", "WEBP"):
        for _ in range(20):
            exif = b"Exif\x00\x00" + random.integers(0, 256, size, dtype=np.uint8).tobytes()
            loaded = load_image(encoded(image, file_format, exif=exif))
            assert loaded.size == (32, 16) and loaded.getpixel((2, 2))[0] > 250 > loaded.getpixel((2, 2))[1]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_mean_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_image(encoded(Image.new("RGB", (32, 16)), "JPEG", exif=exif)).size == (32, 16)


@pytest.mark.parametrize("high", [1.02, 1.5, 2.0])
def test_a_tiff_of_floats_that_exceed_1_a_little_has_two_readings(high):
    data = encoded(Image.fromarray(np.array([[0.0, high]], dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match="from 0 to 1 and exceed it.*from 0 to 255 and the image is black"):
        load_image(data)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", bytes(16)) + chunk(b"IEND", b"")


def patched(file_format: str, width: int, height: int) -> bytes:
    """A file of a small image that declares another size."""
    image = Image.new("RGB", (16, 16))
    content = bytearray(encoded(image, file_format))
    if file_format == "JPEG":
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", height, width)
    elif file_format == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    elif file_format == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    elif file_format == "TIFF":
        entries = struct.unpack_from("<I", content, 4)[0]
        for i in range(struct.unpack_from("<H", content, entries)[0]):
            place = entries + 2 + 12 * i
            tag, kind, count = struct.unpack_from("<HHI", content, place)
            if tag in (256, 257):
                struct.pack_into("<HHII", content, place, tag, 4, count, width if tag == 256 else height)
    elif file_format == "TGA":
        content[12:16] = struct.pack("<HH", width, height)
    elif file_format == "PPM":
        content = content.replace(b"16 16", b"%d %d" % (width, height), 1)
    elif file_format == "WEBP":
        canvas = b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        content[12:12] = b"VP8X\x0a\0\0\0" + canvas
        content[4:8] = struct.pack("<I", len(content) - 8)
    return bytes(content)


def ico_of(content: bytes, declared: int = 32) -> bytes:
    entry = struct.pack("<BBBBHHII", declared, declared, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + content


def icns_of(content: bytes) -> bytes:
    return b"icns" + struct.pack(">I", 16 + len(content)) + b"ic08" + struct.pack(">I", 8 + len(content)) + content


def tiled_tiff(tile: int) -> bytes:
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 12) + b"\0\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "content",
    [
        png_header(2**31 - 1, 2**31 - 1),
        png_header(12000, 9000),
        *(patched(kind, 12000, 9000) for kind in ("JPEG", "GIF", "BMP", "TIFF", "TGA", "PPM", "WEBP")),
        patched("BMP", 2**31 - 1, 2**31 - 1),
        patched("TIFF", 2**31 - 1, 2**31 - 1),
        patched("PPM", 2**31 - 1, 2**31 - 1),
        ico_of(png_header(12000, 9000)),
        icns_of(png_header(12000, 9000)),
        tiled_tiff(32768),
    ],
    ids=lambda content: str(content[:4]),
)
def test_too_many_declared_pixels_are_refused_in_every_format_before_they_are_decoded(content):
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than max_image_pixels|too many pixels"):
        load_image(content)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_the_limit_of_a_caller_holds_for_what_lies_in_a_container():
    inner = encoded(Image.new("RGB", (400, 300)), "PNG")
    for content in (ico_of(inner), icns_of(inner)):
        with pytest.raises(ValueError, match="400x300 = 120000 pixels, more than max_image_pixels=100000"):
            load_image(content, max_image_pixels=100000)


def test_icons_are_read(photo):
    icon = photo.convert("RGB").resize((64, 64))
    for content in (encoded(icon, "ICO"), encoded(icon, "ICNS"), ico_of(encoded(icon, "PNG"), 64)):
        assert load_image(content).size[0] >= 32
