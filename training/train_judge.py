"""The independent judge of drawn pictures, trained on all of them, held-out ones included."""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..evaluation.judge import Judge
from .data import PictureDataset, SampleNoise, augment_halves, beta_half, load_pictures


class JudgeTraining(nn.Module):
    """The judge on augmented pictures, some of them blurred and noisy (`corrupted`), so that it judges what is shown
    and not its texture, or mixed in pairs (`mix`, arXiv 1710.09412). Styles are learnt from close pictures, see
    [`augment_halves`]."""

    def __init__(self, judge: Judge, recipe: dict):
        super().__init__()
        self.judge = judge
        self.recipe = recipe["objective"]
        self.augmentations = recipe["augmentation"], recipe["close_augmentation"]

    def corrupt(self, pictures: torch.Tensor, noise: SampleNoise) -> torch.Tensor:
        """Blurs a share of pictures (B, 3, S, S), and adds noise to a share of them."""
        side = pictures.shape[-1]
        small = F.interpolate(pictures, scale_factor=0.5, mode="bilinear", antialias=True)
        blurred = F.interpolate(small, size=side, mode="bilinear")
        uniform = noise.uniform(4, 1, 1, 1)
        share = uniform[:, 0] * (uniform[:, 1] < self.recipe["corrupted"])
        pictures = pictures + share * (blurred - pictures)
        amount = 0.1 * uniform[:, 2] * (uniform[:, 3] < self.recipe["corrupted"])
        return pictures + amount * noise.normal(*pictures.shape[1:])

    def forward(self, pictures, name, style, noise: SampleNoise, progress: float):
        pictures, close = augment_halves(pictures.float() / 255, noise, *self.augmentations)
        if self.recipe["corrupted"]:
            pictures = self.corrupt(pictures, noise)
        ratio = torch.ones(len(pictures), device=pictures.device)
        if self.recipe["mix"]:
            ratio = torch.where(close, ratio, beta_half(noise.uniform(1)[:, 0]))
            each = ratio[:, None, None, None]
            pictures = each * pictures + (1 - each) * pictures.roll(1, 0)
        name_logits, style_logits = self.judge(pictures)
        name_loss, other_loss = (
            F.cross_entropy(name_logits.float(), of, label_smoothing=0.1, reduction="none")
            for of in (name, name.roll(1, 0))
        )
        style_loss = F.cross_entropy(style_logits.float(), style, label_smoothing=0.1, reduction="none")
        loss = self.recipe["name"] * (ratio * name_loss + (1 - ratio) * other_loss).mean()
        loss = loss + self.recipe["style"] * (close * style_loss).sum() / close.sum().clamp_min(1)
        metrics = {
            "name_top1": (name_logits.argmax(-1) == name).float().mean(),
            "style_top1": (style_logits.argmax(-1) == style)[close].float().mean(),
        }
        return {"loss": loss, "metrics": {key: value for key, value in metrics.items() if value.isfinite()}}


def build(recipe: dict):
    dataset = load_pictures(recipe["data"], recipe["model"]["image_size"])
    judge = Judge(dataset.names, dataset.styles, **recipe["model"])
    return JudgeTraining(judge, recipe), dataset, []


def finish(model: JudgeTraining, dataset: PictureDataset, recipe: dict, output: Path) -> None:
    """Writes the judge and prints what it says of real pictures of both splits."""
    model.judge.save(output)
    for split in ("train", "held_out"):
        pictures = PictureDataset(recipe["data"]["folder"], model.judge.image_size, (split,))
        rows = pictures.spread(400)
        names = [dataset.names[i] for i in pictures.name[rows]]
        styles = [dataset.styles[i] for i in pictures.style[rows]]
        print(split, model.judge.score(pictures.pictures[rows].float() / 255, names, styles))
