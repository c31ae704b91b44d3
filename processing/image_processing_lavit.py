"""Images of every kind to normalised pixel values (LaVIT, arXiv 2309.04669, with CLIP's mean and deviation)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from modeling_lavit.saving_lavit import SavedWithCodeMixin

from .image_loading_lavit import MAX_IMAGE_PIXELS, check_pixel_count, load_image


CHANNELS = (1, 3, 4)
# how far values may exceed their range, as a resize's overshoot does: they are clipped
FLOAT_RANGES = {False: (-0.5, 2.0), True: (-255 / 8, 255 * 9 / 8)}


class LavitImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_image_pixels (`int`, *optional*): width times height above which an image is refused before it is decoded.
    reference_compat (`bool`, *optional*): the reference's conversion to RGB, see [`load_image`].
    """

    max_image_pixels: int | None
    reference_compat: bool | None


class LavitImageProcessor(SavedWithCodeMixin, PilBackend):
    """Resizes images to the model's square (Pillow's bicubic filter, aspect ratio not kept) and normalises them.

    Takes what [`load_image`] takes, and arrays or tensors, (height, width), (height, width, channels) or (channels,
    height, width) with 1, 3 or 4 channels. Where the first and the last dimension could both be channels, as in
    (3, 40, 4), `input_data_format` has to say which one is. What their values mean:

    - `uint8` 0 to 255; `uint16` 0 to 65535; booleans black and white.
    - Other integers, signed or wide: 8-bit values where none exceeds 255, else 0 to the largest value of the dtype.
      Values above 255 that stay below 1/256 of the dtype's range are refused.
    - Floats 0 to 255, or 0 to 1 with `do_rescale=False`. What exceeds that a little, as the overshoot of a resize
      does, is clipped. With `do_rescale=True` a maximum of at most 2 is refused: such an image ranges from 0 to 1, and
      would be divided by 255 once more.

    Several images are a list, a tuple, a column of datasets, an array of objects, an iterator, or a 4-D array.

    Raises:
        ValueError: what is given is no image, or is truncated; it has no pixels or too many; values are NaN or out of
            range; or its dimensions are ambiguous.
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

    def to_dict(self) -> dict[str, Any]:
        """What is saved; where its code lies (`auto_map`) is written by whoever saves it."""
        return {name: value for name, value in super().to_dict().items() if name != "auto_map"}

    def fetch_images(
        self, images: Any, max_image_pixels: int | None = None, reference_compat: bool | None = None
    ) -> Any:
        """Loads what is no `PIL.Image`, array or tensor yet, in nested lists of the given structure."""
        if is_several(images):
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
        """One image to (3, height, width): `uint8`, or `float32` if it was given in floats."""
        if isinstance(image, Image.Image):
            image = np.asarray(load_image(image, max_image_pixels, reference_compat))
            input_data_format = ChannelDimension.LAST
        if isinstance(image, torch.Tensor):
            image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        if image.size == 0:
            image = _channels_last(image, input_data_format)
            check_pixel_count("the image", image.shape[1], image.shape[0], max_image_pixels)
        if np.issubdtype(image.dtype, np.floating):
            image, white = _checked_floats(image, do_rescale), 255 if do_rescale else 1
        else:
            image, white = _integers_to_uint8(image), 255
            if do_normalize and not do_rescale:
                raise ValueError("do_rescale=False is for images in floats from 0 to 1, this one has integer values")

        image = _channels_last(image, input_data_format)
        check_pixel_count("the image", image.shape[1], image.shape[0], max_image_pixels)
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


def is_several(images: Any) -> bool:
    """Whether this is a list of images rather than one image: any iterable that is no image, path, file or mapping."""
    if isinstance(images, np.ndarray):
        return images.dtype == object and images.ndim > 0
    no_lists = (str, bytes, bytearray, memoryview, Mapping, Image.Image, torch.Tensor)
    return hasattr(images, "__iter__") and not isinstance(images, no_lists) and not hasattr(images, "read")


def flatten_images(images: Any) -> list[Any]:
    """One flat list from one image, a batch of them in a 4-D array, or lists of these, nested or not."""
    if is_several(images):
        return [flat for image in images for flat in flatten_images(image)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _channels_last(image: np.ndarray, data_format: str | ChannelDimension | None) -> np.ndarray:
    """(height, width, 1, 3 or 4 channels) from any of the shapes that [`LavitImageProcessor`] takes."""
    if image.ndim == 2:
        return image[..., None]
    shape = tuple(image.shape)
    if image.ndim != 3:
        raise ValueError(f"an image array has 2 or 3 dimensions, got the shape {shape}")
    if data_format is None:
        first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
        if first and last:
            raise ValueError(
                f"an image of the shape {shape} may have its channels first or last: say which by "
                'input_data_format="channels_first" or "channels_last"'
            )
        data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    if data_format not in (ChannelDimension.FIRST, ChannelDimension.LAST):
        raise ValueError(f'input_data_format is "channels_first" or "channels_last", got {data_format!r}')
    if data_format == ChannelDimension.FIRST:
        image = np.moveaxis(image, 0, -1)
    if image.shape[-1] not in CHANNELS:
        raise ValueError(f"an image has 1, 3 or 4 channels, got {image.shape[-1]} in the shape {shape}")
    return image


def _checked_floats(image: np.ndarray, do_rescale: bool) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    if not np.isfinite(image).all():
        raise ValueError("the image has values that are NaN or infinite")
    lowest, highest = FLOAT_RANGES[bool(do_rescale)]
    white = 255 if do_rescale else 1
    if low < lowest or high > highest:
        raise ValueError(
            f"image values go from {low:g} to {high:g}; "
            f"floats must lie between 0 and {white} (do_rescale={do_rescale})"
        )
    if do_rescale and 0 < high <= 2:
        raise ValueError(
            f"the image's floats go from {low:g} to {high:g} and do_rescale=True would divide them by 255: if they "
            "are meant from 0 to 1 pass do_rescale=False (what exceeds 1 is clipped); if from 0 to 255 the image is "
            "black: give 8-bit integers"
        )
    return np.clip(image, 0, white).astype(np.float32)


def _integers_to_uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint16:
        return np.rint(image / 257).astype(np.uint8)
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * 255
    if not np.issubdtype(image.dtype, np.integer):
        raise ValueError(f"an image array holds numbers, got dtype {image.dtype}")
    low, high, white = int(image.min()), int(image.max()), int(np.iinfo(image.dtype).max)
    if low < 0 or 255 < high < white // 256:
        raise ValueError(
            f"image values go from {low} to {high}; integers must lie between 0 and 255 (8 bits in a wider dtype), or "
            f"use the range of their dtype, here 0 to {white} of {image.dtype}: for 16 bits give uint16"
        )
    if high <= 255:
        return image.astype(np.uint8)
    return np.rint(image.astype(np.float64) * (255 / white)).astype(np.uint8)
