"""Fréchet inception distance between drawn and real images, by torchmetrics."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from modeling_lavit.processing import load_image

from .images import to_tensor


SIDE = 256  # both kinds of images are squashed to this square, as in the authors' program


def load_inception(source: str) -> int | nn.Module:
    """What `--inception` names: the weights file of torch-fidelity, or `package.module:Class` of a module.

    A module takes (B, 3, H, W) uint8 and gives (B, F) features.

    Raises:
        ValueError: there is no such file or class.
    """
    if ":" in source and not Path(source).exists():
        module, _, name = source.partition(":")
        try:
            extractor = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--inception {source}: there is no such class ({error})") from error
        if not isinstance(extractor, nn.Module):
            raise ValueError(f"--inception {source} is no torch module")
        return extractor.eval()
    if not Path(source).is_file():
        raise ValueError(f"--inception {source}: there is no such file of weights, nor is it package.module:Class")
    return 2048


class Fid:
    """Collects features of both kinds of images; `compute` gives the distance.

    Args:
        source: see [`load_inception`].
        device: of the extractor.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu"):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ImportError("FID needs torchmetrics: pip install torchmetrics") from error
        feature = load_inception(source)
        options = {"feature_extractor_weights_path": source} if feature == 2048 else {}
        try:
            metric = FrechetInceptionDistance(feature=feature, **options)
        except ModuleNotFoundError as error:
            raise ImportError("FID needs torch-fidelity: pip install torch-fidelity") from error
        self.metric, self.device = metric.to(device), device

    @torch.no_grad()
    def add(self, paths: Sequence[str | Path], real: bool, batch_size: int = 32) -> None:
        """Reads image files."""
        for start in range(0, len(paths), batch_size):
            images = [to_tensor(load_image(path), (SIDE, SIDE)) for path in paths[start : start + batch_size]]
            pixels = (torch.stack(images) * 255).round().to(torch.uint8)
            self.metric.update(pixels.to(self.device), real=real)

    def compute(self) -> float:
        """The distance.

        Raises:
            ValueError: there are fewer than two images of a kind.
        """
        try:
            return float(self.metric.compute())
        except RuntimeError as error:
            raise ValueError(f"there is no FID of these images: {error}") from error
