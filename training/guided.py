"""Blends of two pictures, captioned by guides: what a language model reads besides its pictures' own names.

Of few pictures a language model learns the names by heart, and an encoder that was trained on the same pictures makes
that easy. No blend is ever seen twice, and what guides see in it says how they generalize: distillation on unlabelled
inputs (arXiv 1503.02531) that are mixed in pairs (arXiv 1710.09412). Guides were trained on such blends (`mix`).
"""

from dataclasses import dataclass

import torch

from ..evaluation.judge import Judge
from .data import PictureDataset, SampleNoise, beta_half, result_of


@dataclass(frozen=True)
class GuidedPictures:
    """Pictures (n, 3, S, S) uint8, each with an index into the data set's names (n,)."""

    pictures: torch.Tensor
    name: torch.Tensor


@torch.no_grad()
def blend_and_name(
    pictures: PictureDataset, guides: list[str], number: int, seed: int, device: torch.device | str = "cpu"
) -> GuidedPictures:
    """Blends of pictures drawn at random, named by the mean of the guides' probabilities.

    Args:
        pictures: of one split.
        guides: folders of [`Judge`]s that know all names of `pictures`; they may know more.
        number: of blends.
        seed: decides every blend.
        device: where the guides are run.

    Raises:
        OSError: there is no such guide.
        ValueError: there are no guides, or one does not know a name of the data set.
    """
    if not guides:
        raise ValueError("guided.number needs guides (results of the stage judge) that name the blends")
    judges, columns = [], []
    for folder in guides:
        judge = Judge.load(result_of("judge", folder, "judge.json").parent)
        number_of = {name: i for i, name in enumerate(judge.names)}
        if missing := [name for name in pictures.names if name not in number_of]:
            raise ValueError(f"the guide {folder} does not know {len(missing)} of the names, as {missing[0]!r}")
        judges.append(judge.to(device))
        columns.append(torch.tensor([number_of[name] for name in pictures.names], device=device))
    blends, names = [], []
    for positions in torch.arange(number).split(256):
        uniform = SampleNoise(positions, 0, seed).uniform(3)
        one, other = (pictures.pictures[(uniform[:, i] * len(pictures.pictures)).long()].float() for i in (0, 1))
        ratio = beta_half(uniform[:, 2])[:, None, None, None]
        blends.append((ratio * one + (1 - ratio) * other).round().to(torch.uint8))
        shown = blends[-1].to(device).float() / 255
        votes = sum(judge(shown)[0][:, own].softmax(-1) for judge, own in zip(judges, columns, strict=True))
        names.append(votes.argmax(-1).cpu())
    return GuidedPictures(torch.cat(blends), torch.cat(names))
