"""Pictures of every kind to normalised pixel values (LaVIT, arXiv 2309.04669, with CLIP's mean and deviation)."""

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageCms, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs

from modeling_lavit.saving_lavit import SavedWithCodeMixin


MAX_IMAGE_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns whatever Pillow's decoders raise (OSError, SyntaxError, struct.error, ...) into one kind of error."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in a format that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels to be decoded safely: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded, it is truncated or damaged: {error}") from error


def _check_pixel_count(name: str, width: int, height: int, max_image_pixels: int):
    if width == 0 or height == 0:
        raise ValueError(f"{name} has no pixels: its size is {width}x{height}")
    if width * height > max_image_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, more than max_image_pixels={max_image_pixels}; "
            "make it smaller, or raise the limit if you trust where it comes from"
        )


def _find(source: str | Path | bytes | bytearray, timeout: float | None) -> tuple[str, Path | io.BytesIO]:
    """A name for messages, and what Pillow can open."""
    if isinstance(source, bytes | bytearray):
        return f"the {len(source)} bytes given as an image", io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            response = httpx.get(source, timeout=timeout, follow_redirects=True).raise_for_status()
        except httpx.HTTPError as error:
            raise ValueError(f"the image {source} cannot be fetched: {error}") from error
        return source, io.BytesIO(response.content)
    if isinstance(source, Path) or os.path.exists(source):
        if not os.path.isfile(source):
            raise ValueError(f"there is no image file at {source}")
        return str(source), Path(source)
    shown = source if len(source) <= 80 else f"{source[:80]}..."
    try:
        content = base64.b64decode(source.split("base64,", 1)[-1], validate=True)
    except ValueError as error:
        raise ValueError(f"{shown!r} is not an existing image file, nor a URL, nor a base64 string") from error
    return f"{shown!r} (no such file exists, so it was read as base64)", io.BytesIO(content)


def _grey_to_uint8(values: np.ndarray, white_points: tuple[int, ...]) -> np.ndarray:
    """Grey levels of any range to 0..255.

    White is the smallest of `white_points` that no value exceeds. Values that are negative, or above all of them, are
    stretched from their own minimum and maximum.

    Args:
        values: (height, width), any real dtype.
        white_points: in rising order.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image has values that are NaN or infinite")
    low, high = values.min(), values.max()
    if low < 0 or high > white_points[-1]:
        values, white = values - low, max(high - low, 1e-12)
    else:
        white = next(point for point in white_points if high <= point)
    return np.rint(values * (255 / white)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of a decoded picture to RGB: transparency on white, 16 and 32 bits scaled instead of clipped."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = _grey_to_uint8(values, white_points=(65535,))
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        white_points = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        return Image.fromarray(_grey_to_uint8(np.asarray(image), white_points)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_image(
    source: str | Path | bytes | Image.Image,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    reference_compat: bool = False,
    timeout: float | None = None,
) -> Image.Image:
    """Loads one picture as RGB.

    Every mode of Pillow is converted; EXIF orientation is applied; transparency is composited on white; of an animated
    file the first frame is taken (of an opened `PIL.Image`, the frame it stands at). Grey levels of 16 bits are
    scaled by 1/257. Modes I and F take as white the smallest of 1 (F only), 255 and 65535 that no value exceeds, and
    are stretched from their minimum to their maximum where none fits.

    Args:
        source: path, http(s) URL, base64 string (plain or a data URI), the bytes of a file, or a `PIL.Image`.
        max_image_pixels: width times height above which the picture is refused before it is decoded.
        reference_compat: the reference's conversion: alpha dropped, EXIF orientation ignored, high bit depths clipped.
        timeout: seconds to wait for a URL.

    Raises:
        ValueError: `source` is not an image, is truncated, has no pixels or too many of them, or cannot be found.
    """
    if isinstance(source, Image.Image):
        name, image = "the image", source
    elif isinstance(source, str | Path | bytes | bytearray):
        name, file = _find(source, timeout)
        with _decoding(name):
            image = Image.open(file)
    else:
        kinds = "a PIL.Image, a path, a URL, a base64 string or the bytes of a file"
        raise ValueError(f"an image is {kinds}, got {type(source).__name__}")
    try:
        _check_pixel_count(name, *image.size, max_image_pixels)
        with _decoding(name):
            image.load()
            upright = ImageOps.exif_transpose(image)
        return image.convert("RGB") if reference_compat else _to_rgb(upright)
    finally:
        if image is not source:
            image.close()


class LavitImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_image_pixels (`int`, *optional*): width times height above which a picture is refused before it is decoded.
    reference_compat (`bool`, *optional*): the reference's conversion to RGB, see [`load_image`].
    """

    max_image_pixels: int | None
    reference_compat: bool | None


class LavitImageProcessor(SavedWithCodeMixin, PilBackend):
    """Resizes pictures to the model's square (Pillow's bicubic filter, aspect ratio not kept) and normalises them.

    Takes what [`load_image`] takes, and arrays or tensors, (height, width), (height, width, channels) or (channels,
    height, width) with 1, 3 or 4 channels:

    - 8 bits, or other integers from 0 to 255; `uint16` from 0 to 65535;
    - floats from 0 to 255, or from 0 to 1 with `do_rescale=False`. Floats that reach no further than 1 are refused
      with `do_rescale=True`, because they would be divided by 255 a second time.

    Raises:
        ValueError: not an image, truncated, without pixels, with too many pixels, NaN, or out of range.
    """

    valid_kwargs = LavitImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size: ClassVar = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    max_image_pixels = MAX_IMAGE_PIXELS
    reference_compat = False

    def fetch_images(
        self, images: Any, max_image_pixels: int | None = None, reference_compat: bool | None = None
    ) -> Any:
        """Loads paths, URLs, base64 and bytes in nested lists; `PIL.Image`s, arrays and tensors stay as they are."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image, max_image_pixels, reference_compat) for image in images]
        if isinstance(images, Image.Image | np.ndarray | torch.Tensor):
            return images
        compat = self.reference_compat if reference_compat is None else reference_compat
        return load_image(images, max_image_pixels or self.max_image_pixels, compat)

    def _prepare_image_like_inputs(self, images: Any, *args, **kwargs) -> list[np.ndarray]:
        images = self.fetch_images(images, kwargs["max_image_pixels"], kwargs["reference_compat"])
        return [self.process_image(image, **kwargs) for image in flatten_images(images)]

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_rescale: bool,
        do_normalize: bool,
        max_image_pixels: int,
        reference_compat: bool,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        """One picture to (3, height, width): `uint8`, or `float32` if it was given in floats."""
        if isinstance(image, Image.Image):
            image = np.asarray(load_image(image, max_image_pixels, reference_compat))
            input_data_format = ChannelDimension.LAST
        if isinstance(image, torch.Tensor):
            image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()

        image = _channels_last(image, input_data_format)
        _check_pixel_count("the image", image.shape[1], image.shape[0], max_image_pixels)
        if np.issubdtype(image.dtype, np.floating):
            image, white = _checked_floats(image, do_rescale), 255 if do_rescale else 1
        else:
            image, white = _integers_to_uint8(image), 255
            if do_normalize and not do_rescale:
                raise ValueError("do_rescale=False is for images in floats from 0 to 1, this one has integer values")

        if image.shape[-1] == 4:
            rgb, alpha = image[..., :3], image[..., 3:] / white
            on_white = rgb if reference_compat else rgb * alpha + white * (1 - alpha)
            image = on_white.astype(np.float32) if image.dtype == np.float32 else np.rint(on_white).astype(np.uint8)
        return np.broadcast_to(np.moveaxis(image, -1, 0), (3, *image.shape[:2]))

    def resize(self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs):
        """Pillow's resize; floats keep their precision, where the base class would go through 8 bits."""
        if not (size.height and size.width):
            raise ValueError(f"size must have a height and a width, got {size}")
        if image.dtype == np.uint8:
            return super().resize(image, size, resample, **kwargs)
        channels = [Image.fromarray(channel).resize((size.width, size.height), resample) for channel in image]
        return np.clip(np.stack([np.asarray(channel) for channel in channels]), 0, 1 if image.max() <= 1 else 255)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """Divides in float32, as torchvision does, so that pixel values equal the reference's bit by bit."""
        return image.astype(np.float32) / np.float32(1 / scale)


def flatten_images(images: Any) -> list[Any]:
    """One flat list from one picture, a batch of them in a 4-D array, or lists of these, nested or not."""
    if isinstance(images, list | tuple):
        return [flat for image in images for flat in flatten_images(image)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _channels_last(image: np.ndarray, data_format: str | ChannelDimension | None) -> np.ndarray:
    """(height, width, 1, 3 or 4 channels) from any of the shapes that [`LavitImageProcessor`] takes."""
    if image.ndim == 2:
        return image[..., None]
    if image.ndim != 3:
        raise ValueError(f"an image array has 2 or 3 dimensions, got the shape {tuple(image.shape)}")
    if data_format is None:
        data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    image = image if data_format == ChannelDimension.LAST else np.moveaxis(image, 0, -1)
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image has 1, 3 or 4 channels, got {image.shape[-1]}")
    return image


def _checked_floats(image: np.ndarray, do_rescale: bool) -> np.ndarray:
    low, high = image.min(), image.max()
    if not np.isfinite(image).all():
        raise ValueError("the image has values that are NaN or infinite")
    if low < 0 or high > (255 if do_rescale else 1):
        raise ValueError(
            f"image values go from {low:g} to {high:g}; floats must lie between 0 and "
            + ("255 (do_rescale=True)" if do_rescale else "1 (do_rescale=False)")
        )
    if do_rescale and 0 < high <= 1:
        raise ValueError(
            "the image's floats lie between 0 and 1 and do_rescale=True would divide them by 255 again: "
            "pass do_rescale=False, or give 8-bit integers"
        )
    return image.astype(np.float32)


def _integers_to_uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint16:
        return np.rint(image / 257).astype(np.uint8)
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * 255
    if not np.issubdtype(image.dtype, np.integer):
        raise ValueError(f"an image array holds numbers, got dtype {image.dtype}")
    if image.min() < 0 or image.max() > 255:
        raise ValueError(f"image values go from {image.min()} to {image.max()}; integers must lie between 0 and 255")
    return image.astype(np.uint8)
