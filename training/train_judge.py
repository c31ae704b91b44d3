"""The independent judge of drawn pictures, trained on all of them, held-out ones included."""

from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

from ..evaluation.judge import Judge
from .data import PictureDataset, SampleNoise, augment, load_pictures


class JudgeTraining(nn.Module):
    """The judge on augmented, sometimes blurred and noisy pictures, so that it judges what is shown and not its
    texture."""

    def __init__(self, judge: Judge, augmentation: dict):
        super().__init__()
        self.judge = judge
        self.augmentation = augmentation

    def forward(self, pictures, name, style, noise: SampleNoise, progress: float):
        pictures = augment(pictures.float() / 255, noise, **self.augmentation)
        side = pictures.shape[-1]
        small = F.interpolate(pictures, scale_factor=0.5, mode="bilinear", antialias=True)
        blurred = F.interpolate(small, size=side, mode="bilinear")
        uniform = noise.uniform(4, 1, 1, 1)
        share = uniform[:, 0] * (uniform[:, 1] < 0.5)
        pictures = pictures + share * (blurred - pictures)
        amount = 0.1 * uniform[:, 2] * (uniform[:, 3] < 0.5)
        name_logits, style_logits = self.judge(pictures + amount * noise.normal(*pictures.shape[1:]))
        loss = F.cross_entropy(name_logits, name, label_smoothing=0.1) + 0.5 * F.cross_entropy(
            style_logits, style, label_smoothing=0.1
        )
        metrics = {
            "name_top1": (name_logits.argmax(-1) == name).float().mean(),
            "style_top1": (style_logits.argmax(-1) == style).float().mean(),
        }
        return {"loss": loss, "metrics": metrics}


def build(recipe: dict):
    dataset = load_pictures(recipe["data"], recipe["model"]["image_size"])
    judge = Judge(dataset.names, dataset.styles, **recipe["model"])
    return JudgeTraining(judge, recipe["augmentation"]), dataset, []


def finish(model: JudgeTraining, dataset: PictureDataset, recipe: dict, output: Path) -> None:
    """Writes the judge and prints what it says of the real pictures of both splits."""
    model.judge.save(output)
    for split in ("train", "held_out"):
        pictures = PictureDataset(recipe["data"]["folder"], model.judge.image_size, (split,))
        names = [dataset.names[i] for i in pictures.name]
        styles = [dataset.styles[i] for i in pictures.style]
        print(split, model.judge.score(pictures.pictures.float() / 255, names, styles))
