"""Images for the eye: which patches a visual tokenizer kept, and small images enlarged."""

import math

import numpy as np
import torch
from PIL import Image


def show_kept_patches(image: Image.Image, keep_mask: torch.Tensor, size: int = 480, dim: float = 0.85) -> Image.Image:
    """The image as the model sees it, a square, with dropped patches faded to grey.

    Args:
        image: RGB, any size.
        keep_mask: (N,) bool, the patches of a square grid in row-major order.
        size: least side of the result in pixels; every patch gets the same whole number of them.
        dim: how much grey covers a dropped patch, from 0 to 1.

    Returns:
        A square RGB image.
    """
    side = math.isqrt(len(keep_mask))
    if side * side != len(keep_mask):
        raise ValueError(f"keep_mask has {len(keep_mask)} patches, which is no square grid")
    cell = math.ceil(size / side)
    pixels = np.asarray(image.resize((side * cell, side * cell), Image.Resampling.BICUBIC), dtype=np.float32)
    kept = keep_mask.cpu().numpy().reshape(side, side).repeat(cell, 0).repeat(cell, 1)[..., None]
    faded = pixels * (1 - dim) + 190 * dim
    return Image.fromarray(np.where(kept, pixels, faded).round().astype(np.uint8))


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """An image `factor` times as wide and high, smoothly (Lanczos)."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
