"""Files, addresses, bytes and `PIL.Image`s to one RGB image, or one error that says what is wrong with them."""

import base64
import binascii
import io
import os
import re
import string
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageCms


MAX_IMAGE_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb
MAX_FETCHED_BYTES = 64 * 2**20
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_TILE_SIZE = (322, 323)


def load_image(
    source: Any,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    reference_compat: bool = False,
    timeout: float = 10.0,
    total_timeout: float = 60.0,
) -> Image.Image:
    """Loads one image as RGB.

    Every mode of Pillow is converted; EXIF orientation is applied (1 where the EXIF data cannot be read); transparency
    is composited on white; of an animated file the first frame is taken (of an opened `PIL.Image`, the frame it stands
    at). Grey levels of 16 bits are scaled by 1/257. Modes I and F take as white the smallest of 1 (F only), 255 and
    65535 that no value exceeds, and are stretched from their minimum to their maximum where none fits.

    Args:
        source: a path (`str` or `os.PathLike`), a `file:`, `http:` or `https:` URL, a data URI (base64 or
            percent-encoded), a base64 string, the bytes of a file (`bytes`, `bytearray`, `memoryview`), a file that is
            open in binary mode (read from its start where it can seek), a mapping with `"bytes"` or `"path"` as
            datasets gives it with `decode=False`, or a `PIL.Image`.
        max_image_pixels: width times height above which the image is refused, by its declared size, before it is
            decoded; so are files within a file (ICO, ICNS) and tiles (TIFF).
        reference_compat: the reference's conversion: alpha dropped, EXIF orientation ignored, high bit depths clipped.
        timeout, total_timeout: of a URL, in seconds: to connect and between two pieces of the answer; for all of it.
            The answer may have 64 MiB, or 8 bytes for each of `max_image_pixels` and 1 MiB where that is less, and
            its content type is `image/...` or unspecific.

    Raises:
        ValueError: `source` is not an image, is truncated, has no pixels or too many of them, cannot be found or
            fetched, or its values leave open what is white (mode F with a maximum between 1 and 2).
    """
    if isinstance(source, Image.Image):
        name, image = "the image", source
    else:
        name, file = _find(source, max_image_pixels, timeout, total_timeout)
        image = _open(name, file, max_image_pixels)
    try:
        check_pixel_count(name, *image.size, max_image_pixels)
        with _decoding(name):
            image.load()
        check_pixel_count(name, *image.size, max_image_pixels)
        if reference_compat:
            return image.convert("RGB")
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    finally:
        if image is not source:
            image.close()


def check_pixel_count(name: str, width: int, height: int, max_image_pixels: int) -> None:
    """Raises ValueError for an image without pixels or with more than `max_image_pixels`."""
    if width <= 0 or height <= 0:
        raise ValueError(f"{name} has no pixels: its size is {width}x{height}")
    if width * height > max_image_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, more than max_image_pixels={max_image_pixels}; "
            "make it smaller, or raise the limit if you trust where it comes from"
        )


def grey_to_uint8(values: np.ndarray, white_points: tuple[int, ...]) -> np.ndarray:
    """Grey levels of any range to 0..255.

    White is the smallest of `white_points` that no value exceeds. Values that are negative, or above all of them, are
    stretched from their own minimum and maximum.

    Args:
        values: (height, width), any real dtype.
        white_points: in rising order.

    Raises:
        ValueError: a value is NaN or infinite; or 1 is a white point and the maximum lies between 1 and 2, as the
            overshoot of a resize does.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image has values that are NaN or infinite")
    low, high = values.min(), values.max()
    if white_points[0] == 1 and 1 < high <= 2:
        raise ValueError(
            f"the image's floats go from {low:g} to {high:g}: either they are meant from 0 to 1 and exceed it (clip "
            "them), or from 0 to 255 and the image is black (give 8-bit integers)"
        )
    if low < 0 or high > white_points[-1]:
        values, white = values - low, max(high - low, 1e-12)
    else:
        white = next(point for point in white_points if high <= point)
    return np.rint(values * (255 / white)).astype(np.uint8)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns whatever Pillow's decoders raise (OSError, SyntaxError, struct.error, ...) into one kind of error."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in a format that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = "Pillow's own limit is PIL.Image.MAX_IMAGE_PIXELS"
        raise ValueError(f"{name} has too many pixels to be decoded safely: {error} ({limit})") from error
    except MemoryError as error:
        raise ValueError(f"{name} needs more memory than there is") from error
    except Exception as error:
        if "closed image" in str(error) or "closed file" in str(error):
            raise ValueError(f"{name} is closed: open it again, or load() it before it is closed") from error
        raise ValueError(f"{name} cannot be decoded, it is truncated or damaged: {error}") from error


def _find(source: Any, max_image_pixels: int, timeout: float, total_timeout: float) -> tuple[str, Path | io.BytesIO]:
    """A name for messages, and what Pillow can open."""
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            return _find(source["bytes"], max_image_pixels, timeout, total_timeout)
        if source.get("path") is not None:
            return _find_file(source["path"])
        raise ValueError(f'an image that is a mapping has "bytes" or "path", got the keys {sorted(map(str, source))}')
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
        return f"the {len(content)} bytes given as an image", io.BytesIO(content)
    if isinstance(source, os.PathLike):
        return _find_file(source)
    if hasattr(source, "read"):
        return _read_open_file(source)
    if not isinstance(source, str):
        kinds = "a PIL.Image, a path, a URL, a base64 string, an open file, or the bytes of a file"
        raise ValueError(f"an image is {kinds}, got {type(source).__name__}")
    shown = source if len(source) <= 80 else f"{source[:80]}..."
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        limit = min(MAX_FETCHED_BYTES, 8 * max_image_pixels + 2**20)
        return source, io.BytesIO(_fetch(source, limit, timeout, total_timeout))
    if scheme.startswith("file:"):
        address = urlsplit(source)
        if address.netloc not in ("", "localhost"):
            raise ValueError(f"{source} names a file of another machine ({address.netloc})")
        return _find_file(unquote(address.path))
    if scheme.startswith("data:"):
        return repr(shown), io.BytesIO(_read_data_uri(source, shown))
    if os.path.exists(source):
        return _find_file(source)
    try:
        content = _decode_base64(source)
    except ValueError as error:
        raise ValueError(f"{shown!r} is not an existing image file, nor a URL, nor a base64 string") from error
    return f"{shown!r} (no such file exists, so it was read as base64)", io.BytesIO(content)


def _find_file(path: str | os.PathLike) -> tuple[str, Path]:
    if not os.path.isfile(path):
        raise ValueError(f"there is no image file at {os.fspath(path)}")
    return str(path), Path(path)


def _read_open_file(file: Any) -> tuple[str, io.BytesIO]:
    name = f"the open file {file.name}" if isinstance(getattr(file, "name", None), str) else "the open file"
    try:
        if file.seekable():
            file.seek(0)
        content = file.read()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{name}, given as an image, cannot be read: {error}") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise ValueError(f"{name}, given as an image, holds text: open it in binary mode")
    return name, io.BytesIO(content)


def _decode_base64(text: str) -> bytes:
    """As browsers do: white space is dropped, the padding may be missing."""
    text = re.sub(r"\s", "", text).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _read_data_uri(uri: str, shown: str) -> bytes:
    """The content of `data:[type][;parameter]...[;base64],content`."""
    head, comma, content = uri.partition(",")
    if not comma:
        raise ValueError(f"{shown!r} is no data URI: it has no comma before its content")
    if head.split(";")[-1].strip().lower() != "base64":
        return unquote_to_bytes(content.strip())
    try:
        return _decode_base64(unquote(content))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the content of {shown!r} is not base64: {error}") from error


def _fetch(url: str, max_bytes: int, timeout: float, total_timeout: float) -> bytes:
    """The body of a URL. Its thread is given up where a server keeps even the limits on single reads."""
    result: dict[str, Any] = {}
    deadline = time.monotonic() + total_timeout

    def fetch() -> None:
        try:
            result["content"] = _fetch_until(url, max_bytes, timeout, deadline)
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(total_timeout)
    if "content" in result:
        return result["content"]
    error = result.get("error") or TimeoutError(f"it takes more than {total_timeout:g} seconds")
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(f"the image {url} cannot be fetched: {reason}") from error


def _fetch_until(url: str, max_bytes: int, timeout: float, deadline: float) -> bytes:
    # what a URL may not hold as it is (spaces, letters beyond ASCII) is percent-encoded
    request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": "lavit"})
    content = bytearray()
    with urlopen(request, timeout=timeout) as response:
        content_type = response.headers.get("content-type", "").split(";")[0].strip().lower()
        if content_type and not content_type.startswith("image/") and not content_type.endswith("octet-stream"):
            raise ValueError(f"its content type is {content_type}, not that of an image")
        while piece := response.read1(2**16):
            content += piece
            if len(content) > max_bytes:
                raise ValueError(f"it has more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError("it does not end in time")
        if response.length:
            raise ValueError(f"it ends {response.length} bytes too early")
    return bytes(content)


def _open(name: str, file: Path | io.BytesIO, max_image_pixels: int) -> Image.Image:
    """An image that is not decoded yet, and declares nothing, besides its own size, that is beyond the limit."""
    with _decoding(name):
        sizes = _sizes_inside(file)
    for width, height in sizes:
        check_pixel_count(name, width, height, max_image_pixels)
    with _decoding(name):
        image = Image.open(file)
        tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
        is_tiled = all(tag in tags for tag in TIFF_TILE_SIZE)
        width, height = (int(tags[tag]) for tag in TIFF_TILE_SIZE) if is_tiled else image.size
    check_pixel_count(f"a tile of {name}" if is_tiled else name, width, height, max_image_pixels)
    return image


def _sizes_inside(file: Path | io.BytesIO) -> list[tuple[int, int]]:
    """Declared sizes of what Pillow decodes, or allocates, as soon as it opens a container."""
    opened = file.open("rb") if isinstance(file, Path) else file
    try:
        head = opened.read(30)
        opened.seek(0)
        if head[8:16] == b"WEBPVP8X" and len(head) == 30:
            width, height = (int.from_bytes(head[start : start + 3], "little") + 1 for start in (24, 27))
            return [(width, height)]
        if head.startswith((b"\0\0\1\0", b"icns")):
            return list(_sizes_of_files_in(opened.read()))
        return []
    finally:
        opened.close() if isinstance(file, Path) else file.seek(0)


def _sizes_of_files_in(container: bytes) -> Iterator[tuple[int, int]]:
    """Sizes that the files of which an ICO or ICNS consists declare, where those are files and not raw pixels."""
    spans = []
    if container.startswith(b"icns"):
        start = 8
        while start + 8 <= len(container):
            length = max(struct.unpack_from(">I", container, start + 4)[0], 8)
            spans.append((start + 8, start + length))
            start += length
    else:
        for i in range(min(struct.unpack_from("<H", container, 4)[0], (len(container) - 6) // 16)):
            length, start = struct.unpack_from("<II", container, 6 + 16 * i + 8)
            spans.append((start, start + length))
    for start, end in spans:
        try:
            with Image.open(io.BytesIO(container[start:end])) as image:
                yield image.size
        except (OSError, SyntaxError, ValueError, struct.error):
            continue


def _orientation(image: Image.Image) -> int:
    """That of EXIF, or 1: an image whose pixels can be decoded is not refused for its metadata."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of a decoded image to RGB: transparency on white, 16 and 32 bits scaled instead of clipped."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = grey_to_uint8(values, white_points=(65535,))
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        white_points = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        return Image.fromarray(grey_to_uint8(np.asarray(image), white_points)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        # None with `inPlace` alone
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")  # pyright: ignore[reportReturnType]
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
