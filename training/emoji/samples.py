"""What the embedded checkpoint's language model is trained on: images with names and styles as sequences of ids."""

import random
from collections import defaultdict

import torch

from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.training.data.augmentation import SampleNoise, augment, normalize_images
from modeling_lavit.training.data.samples import Sequences, collate_samples, tasks_of
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.mixup import LabelledMixtures
from modeling_lavit.training.emoji.pseudo_targets import PseudoTarget
from modeling_lavit.training.emoji.recipe import CodeViews, NamedMixture
from modeling_lavit.training.emoji.text import drawing_prompt, question_prompt, restyling_prompt


def collate_named(items: list[dict]) -> dict[str, torch.Tensor | None]:
    """[`collate_samples`], and which images are to be augmented weakly, (P,)."""
    weak = [item["weak"] for item in items for _ in item["images"]]
    return collate_samples(items) | {"weak": torch.tensor(weak, dtype=torch.bool)}


class NamedSamples(torch.utils.data.Dataset):
    """Draws a task for each image with a name and a style again in every epoch, the same one for the same seed, epoch
    and position.

    Args:
        images: of one split.
        codes: each image's visual codes: those of itself, and of views of it that are as good.
        sequences: builds the parts.
        mixture: how often `caption`, `style_question`, `name_question`, which read an image as features; `more`, a
            caption of an image that has a style of its own;
            `code_caption`, `code_style_question`, which read it as codes; `draw`; `restyle`, which reads codes and
            draws.
        seed: of the run.
        pseudo_targets: images that a model drew, see [`draw_pseudo_targets`].
        pseudo_share: of the samples that draw, how many have one of them as their target.
        mixtures: that teachers labelled, see [`label_mixtures`].
        mixture_share: of the captions, how many are of one of them.
        more: images and names, in further styles, for the task `more`.
    """

    collate = staticmethod(collate_named)

    def __init__(
        self,
        images: NamedImages,
        codes: list[list[torch.Tensor]],
        sequences: Sequences,
        mixture: NamedMixture,
        seed: int = 0,
        pseudo_targets: list[PseudoTarget] | None = None,
        pseudo_share: float = 0.0,
        mixtures: LabelledMixtures | None = None,
        mixture_share: float = 0.0,
        more: list[tuple[torch.Tensor, str]] | None = None,
    ):
        self.images, self.codes, self.sequences, self.mixture = images, codes, sequences, tasks_of(mixture)
        if not more:
            self.mixture.pop("more", None)
        self.more = more
        self.pseudo_targets, self.pseudo_share = pseudo_targets or [], pseudo_share
        self.mixtures, self.mixture_share = mixtures, mixture_share
        self.seed, self.epoch = seed, 0
        self.same_name = defaultdict(list)
        for index, name in enumerate(images.name.tolist()):
            self.same_name[name].append(index)

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def code_ids(self, index: int, draw: random.Random) -> list[int]:
        """The ids of the codes of one view of an image."""
        return self.sequences.codes(draw.choice(self.codes[index]))

    def __getitem__(self, position: int) -> dict:
        index = self.images.order[position]
        draw = random.Random(f"{self.seed} {self.epoch} {position}")
        task = draw.choices(list(self.mixture), self.mixture.values())[0]
        if task == "more":
            image, name = draw.choice(self.more)
            return self.sequences.sample(position, self.sequences.reading([("", name)]), [image], [False]) | {
                "weak": False
            }
        if task in ("caption", "style_question", "name_question"):
            return self._reading(position, index, task, draw)
        if task in ("code_caption", "code_style_question"):
            return self._reading_of_codes(position, index, task, draw) | {"weak": False}
        return self._drawing(position, index, task, draw) | {"weak": False}

    def _reading(self, position: int, index: int, task: str, draw: random.Random) -> dict:
        sequences = self.sequences
        if task == "caption" and self.mixtures is not None and draw.random() < self.mixture_share:
            mixture = draw.randrange(len(self.mixtures.name))
            turn, image = ("", self.images.names[self.mixtures.name[mixture]]), self.mixtures.images[mixture]
            return sequences.sample(position, sequences.reading([turn]), [image], [False]) | {"weak": False}
        name = self.images.names[self.images.name[index]]
        style = self.images.styles[self.images.style[index]]
        turn = {
            "caption": ("", name),
            "style_question": (question_prompt(draw, "style"), style),
            "name_question": (question_prompt(draw, "name"), name),
        }[task]
        sample = sequences.sample(position, sequences.reading([turn]), [self.images.images[index]], [False])
        return sample | {"weak": task == "style_question"}

    def _reading_of_codes(self, position: int, index: int, task: str, draw: random.Random) -> dict:
        sequences = self.sequences
        prompt = [sequences.boi, *self.code_ids(index, draw), sequences.eoi]
        answer = self.images.names[self.images.name[index]]
        if task == "code_style_question":
            prompt = prompt + sequences.text(question_prompt(draw, "style"))
            answer = self.images.styles[self.images.style[index]]
        return sequences.sample(position, [(prompt, False), ([*sequences.text(answer), sequences.eos], True)])

    def _drawing(self, position: int, index: int, task: str, draw: random.Random) -> dict:
        sequences, names, styles = self.sequences, self.images.names, self.images.styles
        number, style = int(self.images.name[index]), styles[self.images.style[index]]
        if self.pseudo_targets and draw.random() < self.pseudo_share:
            target = draw.choice(self.pseudo_targets)
            number, style, index, codes = target.name, styles[target.style], None, sequences.codes(target.codes)
        else:
            codes = self.code_ids(index, draw)
        prompt = sequences.text(drawing_prompt(draw, names[number], style))
        sources = [i for i in self.same_name[number] if i != index]
        if task == "restyle" and sources:
            source = [sequences.boi, *self.code_ids(draw.choice(sources), draw), sequences.eoi]
            prompt = source + sequences.text(restyling_prompt(draw, style))
        return sequences.sample(position, sequences.drawing(prompt, codes, draw))


@torch.no_grad()
def tokenize_all(
    tokenizer: LavitVisualTokenizer, images: NamedImages, views: CodeViews | None = None, seed: int = 0
) -> list[list[torch.Tensor]]:
    """The codes of every image and of some augmented views of it: of few images alone a language model learns the
    sequences by heart."""
    codes = [[] for _ in images.images]
    for view in range((views.number if views else 0) + 1):
        for rows in torch.arange(len(codes)).split(64):
            pixels = images.images[rows].float() / 255
            if view:
                pixels = augment(pixels, SampleNoise(rows, view, seed), **views.augmentation.model_dump())
            tokens = tokenizer.tokenize(normalize_images(pixels).to(tokenizer.device))
            for row, own in zip(rows.tolist(), tokens.split(), strict=True):
                codes[row].append(own.cpu())
    return codes
