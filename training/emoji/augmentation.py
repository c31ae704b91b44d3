"""What the stages of the emoji do with images beside the core's augmentation."""

import torch
import torch.nn.functional as F

from modeling_lavit.training.data.augmentation import SampleNoise, augment
from modeling_lavit.training.recipe import Augmentation


def beta_half(uniform: torch.Tensor) -> torch.Tensor:
    """Numbers uniform in [0, 1) to numbers by Beta(1/2, 1/2): how much of the first of two images a mixture has."""
    return (torch.pi / 2 * uniform).sin().square()


def augment_halves(
    images: torch.Tensor, noise: SampleNoise, augmentation: Augmentation, weak_augmentation: Augmentation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augments half of the images, each at random, weakly: how a thing is drawn is told by colours, outlines and
    margins, which strong maps and casts take away, while what it is should be told in spite of them.

    Args:
        images: (B, 3, S, S) in [0, 1].
        noise: of the batch, which decides everything.
        augmentation, weak_augmentation: without the second all images get the first, and count as weak.

    Returns:
        Images (B, 3, S, S) in [0, 1], and which of them are augmented weakly, (B,) bool.
    """
    if weak_augmentation is None:
        weak = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return augment(images, noise, **augmentation.model_dump()), weak
    weak = noise.uniform(1)[:, 0] < 0.5
    strong = augment(images, noise, **augmentation.model_dump())
    return torch.where(
        weak[:, None, None, None], augment(images, noise, **weak_augmentation.model_dump()), strong
    ), weak


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, S, S) to (B, N, 3·p²), patches in row-major order."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)
