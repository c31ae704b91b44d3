"""Images as tensors, and image files that appear whole or not at all."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .output import replacing


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> torch.Tensor:
    """An image, resized to (width, height) by bicubic interpolation, as (3, height, width) from 0 to 1."""
    image = image.convert("RGB")
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG")


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows, without gaps."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * columns, height * -(-len(images) // columns)))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
