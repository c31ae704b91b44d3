"""Images that clients send (data URIs, addresses, uploaded files), and images that they get."""

import asyncio
import base64
import binascii
import io
from urllib.parse import unquote_to_bytes

from PIL import Image

from modeling_lavit.processing import load_image
from modeling_lavit.serving.errors import ApiError
from modeling_lavit.serving.fetch import fetch
from modeling_lavit.serving.settings import ServeSettings


class ImageReader:
    """Reads clients' images within the server's limits.

    An image is brought to the size that the model reads (height, width) at once, by the processor's own resize, which
    then leaves it as it is: nothing large waits in a queue, and the model sees the same pixels.
    """

    def __init__(self, settings: ServeSettings, size: tuple[int, int]):
        self.settings, self.size = settings, size

    async def from_address(self, address: str, param: str) -> Image.Image:
        """The image of a data URI, or of an http(s) address where the server fetches those.

        Raises:
            ApiError: 400, it is none of these, or no image.
        """
        if address[:5].lower() == "data:":
            content = decode_data_uri(address, param)
        elif address[:7].lower() == "http://" or address[:8].lower() == "https://":
            if not self.settings.allow_urls:
                message = "this server fetches no addresses: send the image as a data URI (data:image/png;base64,...)"
                raise ApiError(400, message, param, "url_not_allowed")
            content = await fetch(address, self.settings.max_body_bytes, param)
        else:
            raise ApiError(400, "an image is a data URI or an http(s) address", param, "invalid_image")
        return await self.from_bytes(content, param)

    async def from_bytes(self, content: bytes, param: str) -> Image.Image:
        """The image in a file's bytes.

        Raises:
            ApiError: 400, they are no image, or one with too many pixels.
        """
        return await asyncio.to_thread(self._read, content, param)

    def _read(self, content: bytes, param: str) -> Image.Image:
        if not content:
            raise ApiError(400, "the image is empty", param, "invalid_image")
        try:
            image = load_image(content, max_image_pixels=self.settings.max_image_pixels)
        except ValueError as error:
            raise ApiError(400, str(error), param, "invalid_image") from error
        height, width = self.size
        return image.resize((width, height), Image.Resampling.BICUBIC)


def decode_data_uri(address: str, param: str) -> bytes:
    """The bytes of a data URI (RFC 2397), in base64, with line breaks or not, or percent-encoded."""
    header, comma, data = address.partition(",")
    if not comma:
        raise ApiError(400, "the data URI has no comma between its type and its data", param, "invalid_image")
    content = unquote_to_bytes(data)
    if not header.lower().endswith(";base64"):
        return content
    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"the data URI is no base64: {error}", param, "invalid_image") from error


def encode_image(image: Image.Image, output_format: str = "png", compression: int = 100) -> str:
    """An image as a file in base64.

    Args:
        image: RGB.
        output_format: "png", "jpeg" or "webp".
        compression: quality of the latter two, 0 to 100.
    """
    file = io.BytesIO()
    options = {} if output_format == "png" else {"quality": compression}
    image.save(file, format=output_format, **options)
    return base64.b64encode(file.getvalue()).decode()


def data_uri(image: Image.Image, output_format: str = "png", compression: int = 100) -> str:
    """An image as a data URI."""
    return f"data:image/{output_format};base64,{encode_image(image, output_format, compression)}"
