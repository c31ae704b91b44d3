"""Mixtures of two images, labelled by teachers: what a language model reads besides its images' own names.

Of few images a language model learns the names by heart, and an encoder that was trained on the same images makes that
easy. No mixture is ever seen twice, and what teachers see in it says how they generalise: distillation on unlabelled
inputs (arXiv 1503.02531) that are mixed in pairs (arXiv 1710.09412).
"""

from dataclasses import dataclass

import torch

from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.training.data.augmentation import SampleNoise
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.results import result_of


def beta_half(uniform: torch.Tensor) -> torch.Tensor:
    """Numbers uniform in [0, 1) to numbers by Beta(1/2, 1/2): how much of the first of two images a mixture has."""
    return (torch.pi / 2 * uniform).sin().square()


@dataclass(frozen=True)
class LabelledMixtures:
    """Images (n, 3, S, S) uint8, each with an index into the data set's names (n,)."""

    images: torch.Tensor
    name: torch.Tensor


@torch.no_grad()
def label_mixtures(
    images: NamedImages, teachers: list[str], number: int, seed: int, device: torch.device | str = "cpu"
) -> LabelledMixtures:
    """Mixtures of images drawn at random, named by the mean of the teachers' probabilities.

    Args:
        images: of one split.
        teachers: folders of [`Classifier`]s that know all names of `images`; they may know more.
        number: of mixtures.
        seed: decides every mixture.
        device: where the teachers are run.

    Raises:
        OSError: there is no such teacher.
        ValueError: there are no teachers, or one does not know a name of the data set.
    """
    if not teachers:
        raise ValueError("mixup.number needs mixup.teachers (results of the stage classifier) that name the mixtures")
    loaded, columns = [], []
    for folder in teachers:
        teacher = Classifier.load(result_of("classifier", folder, "classifier.json").parent)
        number_of = {name: i for i, name in enumerate(teacher.names)}
        if missing := [name for name in images.names if name not in number_of]:
            raise ValueError(f"the teacher {folder} does not know {len(missing)} of the names, as {missing[0]!r}")
        loaded.append(teacher.to(device))
        columns.append(torch.tensor([number_of[name] for name in images.names], device=device))
    mixtures, names = [], []
    for positions in torch.arange(number).split(256):
        uniform = SampleNoise(positions, 0, seed).uniform(3)
        one, other = (images.images[(uniform[:, i] * len(images.images)).long()].float() for i in (0, 1))
        ratio = beta_half(uniform[:, 2])[:, None, None, None]
        mixtures.append((ratio * one + (1 - ratio) * other).round().to(torch.uint8))
        shown = mixtures[-1].to(device).float() / 255
        votes = sum(teacher(shown)[0][:, own].softmax(-1) for teacher, own in zip(loaded, columns, strict=True))
        names.append(votes.argmax(-1).cpu())
    return LabelledMixtures(torch.cat(mixtures), torch.cat(names))
