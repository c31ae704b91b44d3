"""The independent judge of drawn pictures, trained on all of them, held-out ones included."""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..evaluation.judge import Judge
from .data import PictureDataset, augment, load_pictures


class JudgeTraining(nn.Module):
    """The judge on augmented, sometimes blurred and noisy pictures, so that it judges what is shown and not its
    texture."""

    def __init__(self, judge: Judge, augmentation: dict):
        super().__init__()
        self.judge = judge
        self.augmentation = augmentation

    def forward(self, pictures, name, style, index, progress: float):
        pictures = augment(pictures.float() / 255, **self.augmentation)
        batch, _, side, _ = pictures.shape
        small = F.interpolate(pictures, scale_factor=0.5, mode="bilinear", antialias=True)
        blurred = F.interpolate(small, size=side, mode="bilinear")
        share = torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.5)
        pictures = pictures + share * (blurred - pictures)
        noise = 0.1 * torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.5)
        name_logits, style_logits = self.judge(pictures + noise * torch.randn_like(pictures))
        loss = F.cross_entropy(name_logits, name, label_smoothing=0.1) + 0.5 * F.cross_entropy(
            style_logits, style, label_smoothing=0.1
        )
        metrics = {
            "name_top1": (name_logits.argmax(-1) == name).float().mean(),
            "style_top1": (style_logits.argmax(-1) == style).float().mean(),
        }
        return {"loss": loss, "metrics": metrics}


def build(recipe: dict):
    size = recipe["model"]["image_size"]
    dataset = load_pictures(recipe["data"], size)
    return JudgeTraining(Judge(dataset.names, dataset.styles, size), recipe["augmentation"]), dataset, []


def finish(model: JudgeTraining, dataset: PictureDataset, recipe: dict, output: Path) -> None:
    """Writes the judge and prints what it says of the real pictures."""
    model.judge.save(output)
    names = [dataset.names[i] for i in dataset.name]
    styles = [dataset.styles[i] for i in dataset.style]
    print(model.judge.score(dataset.pictures.float() / 255, names, styles))
