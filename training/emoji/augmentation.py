"""What the stages of the emoji do with images beside the core's augmentation: among them changes of how a thing is
drawn, so that what it is is told in styles that were never seen."""

import torch
import torch.nn.functional as F

from modeling_lavit.training.data.augmentation import SampleNoise, augment
from modeling_lavit.training.recipe import Augmentation


GREY = (0.299, 0.587, 0.114)


def recolour(images: torch.Tensor, amount: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Changes the strength of the colours of images (B, 3, S, S) by `amount` (B,), and turns them by `angle` (B,) in
    radians about the grey axis; greys stay."""
    grey = (images * images.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    colour = images - images.mean(1, keepdim=True)
    across = (colour.roll(1, 1) - colour.roll(2, 1)) / 3**0.5
    angle, amount = angle[:, None, None, None], amount[:, None, None, None]
    turned = images.mean(1, keepdim=True) - grey + angle.cos() * colour + angle.sin() * across
    return (grey + amount * turned).clamp(0, 1)


def flatten(images: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, S, S) in few `levels` (B,) of each channel: no gradients, flat areas."""
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    levels = levels[:, None, None, None]
    return (smooth * levels).round() / levels


def outline(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Draws dark lines of `strength` (B,) where colours of images (B, 3, S, S) change."""
    most = F.max_pool2d(images, 3, stride=1, padding=1)
    least = -F.max_pool2d(-images, 3, stride=1, padding=1)
    edge = ((most - least).amax(1, keepdim=True) * 2.5 - 0.4).clamp(0, 1)
    return images * (1 - strength[:, None, None, None] * edge)


def redraw(images: torch.Tensor, noise: SampleNoise, share: float) -> torch.Tensor:
    """Changes how a `share` of images (B, 3, S, S) in [0, 1] are drawn: their colours, how flat they are, outlines."""
    if not share:
        return images
    uniform = noise.uniform(9)
    chosen = uniform[:, 0] < share
    grey = uniform[:, 1] < 0.2
    amount = torch.where(grey, 0.0, 0.4 + uniform[:, 2])
    redrawn = recolour(images, amount, 1.2 * uniform[:, 3] - 0.6)
    flat = flatten(redrawn, 2 + (4 * uniform[:, 5]).floor())
    redrawn = torch.where((uniform[:, 4] < 0.4)[:, None, None, None], flat, redrawn)
    lined = outline(redrawn, 0.5 + 0.5 * uniform[:, 7])
    redrawn = torch.where((uniform[:, 6] < 0.5)[:, None, None, None], lined, redrawn)
    redrawn = redrawn ** (0.6 + 0.9 * uniform[:, 8])[:, None, None, None]
    return torch.where(chosen[:, None, None, None], redrawn, images)


def augment_strongly(images: torch.Tensor, noise: SampleNoise, augmentation: Augmentation) -> torch.Tensor:
    """The core's augmentation, after [`redraw`] where there is a share for it; images (B, 3, S, S) in [0, 1]."""
    settings = augmentation.model_dump()
    redrawn = redraw(images, noise, settings.pop("redraw", 0.0))
    return augment(redrawn, noise, **settings)


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
        return augment_strongly(images, noise, augmentation), weak
    weak = noise.uniform(1)[:, 0] < 0.5
    strong = augment_strongly(images, noise, augmentation)
    return torch.where(
        weak[:, None, None, None], augment(images, noise, **weak_augmentation.model_dump()), strong
    ), weak


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, S, S) to (B, N, 3·p²), patches in row-major order."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)
