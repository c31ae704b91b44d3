"""Random changes of images, and the random numbers of samples."""

import random

import torch
import torch.nn.functional as F

from modeling_lavit.configuration_lavit import IMAGE_MEAN, IMAGE_STD


class SampleNoise:
    """Random numbers of a batch that depend on seed, step and sample alone: they are the same on one rank or many, in
    an uncut run and in a resumed one.

    Args:
        positions: (B,) of the samples in the data set's order.
        step: of the optimizer.
        seed: of the run.
    """

    def __init__(self, positions: torch.Tensor, step: int, seed: int = 0):
        self.positions, self.step, self.seed = positions, step, seed
        self.device = positions.device
        self.generators = [
            torch.Generator().manual_seed(random.Random(f"{seed} {step} {position}").getrandbits(62))
            for position in positions.tolist()
        ]

    def of(self, samples: torch.Tensor) -> "SampleNoise":
        """The noise of some samples, a mask (B,) or indices (P,), from its start."""
        return SampleNoise(self.positions[samples], self.step, self.seed)

    def uniform(self, *shape: int) -> torch.Tensor:
        """(B, *shape) in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators]).to(self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        """(B, *shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators]).to(self.device)


def augment(
    images: torch.Tensor,
    noise: SampleNoise,
    share: float = 0.9,
    scale: float = 0.15,
    shift: float = 0.1,
    rotation: float = 0.15,
    tint: float = 0.1,
    flip: float = 0.3,
) -> torch.Tensor:
    """Random affine maps on a white ground, mirror images and colour casts.

    Args:
        images: (B, 3, S, S) in [0, 1].
        noise: of the batch, which decides everything.
        share, scale, shift, rotation, tint, flip: see [`Augmentation`].

    Returns:
        (B, 3, S, S) in [0, 1].
    """
    if not share:
        return images
    batch = len(images)
    uniform = noise.uniform(10)
    centred = uniform * 2 - 1
    active = (uniform[:, 0] < share).float()
    zoom = 1 + scale * centred[:, 1:3] * active[:, None]
    mirror = 1 - 2 * ((uniform[:, 3] < flip).float() * active)
    angle = rotation * centred[:, 4] * active
    theta = torch.zeros(batch, 2, 3, device=images.device)
    theta[:, 0, 0] = angle.cos() * zoom[:, 0] * mirror
    theta[:, 0, 1] = -angle.sin() * zoom[:, 1]
    theta[:, 1, 0] = angle.sin() * zoom[:, 0] * mirror
    theta[:, 1, 1] = angle.cos() * zoom[:, 1]
    theta[:, :, 2] = 2 * shift * centred[:, 5:7] * active[:, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, grid, align_corners=False)
    ink = 1 - moved
    gain = 1 + tint * centred[:, 7:, None, None] * active[:, None, None, None]
    return (1 - ink * gain).clamp(0, 1)


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) in [0, 1] to the encoder's `pixel_values`, as the image processor does it."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std
