"""load_image: every kind of source and mode in, one RGB image or a clear error out."""

import base64
import io
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_lavit import LavitImageProcessor
from modeling_lavit.processing import load_image


FIXTURES = Path(__file__).parent / "fixtures" / "preprocess"
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
