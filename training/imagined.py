"""Pictures that a model draws for itself: of every name in every style of which no picture is there.

A model that draws a thing in a style in which it has never seen it may get either wrong. It redraws pictures of the
thing in that style; those of which it still reads the name (and the style, if asked to) serve as targets
(self-training with a filter, as in arXiv 1911.04252). What is drawn from a name alone has its name right more often,
and its style less often.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from ..modeling_lavit import LavitForConditionalGeneration
from ..processing import LavitProcessor
from .data import PictureDataset
from .text import ANSWER_PROMPT, NAME_AND_STYLE, QUESTIONS, restyling_prompt


SOURCES = ("picture", "name")


@dataclass(frozen=True)
class ImaginedPicture:
    """A picture as codes (n,); `name` and `style` are indices of the data set."""

    name: int
    style: int
    codes: torch.Tensor


def missing_pairs(pictures: PictureDataset) -> list[tuple[int, int]]:
    """Pairs of a name and a style, both with pictures, of which there is none together."""
    there = set(zip(pictures.name.tolist(), pictures.style.tolist(), strict=True))
    names, styles = ({pair[i] for pair in there} for i in (0, 1))
    return sorted({(name, style) for name in names for style in styles} - there)


def picture_ids(processor: LavitProcessor, codes: torch.Tensor) -> list[int]:
    """Codes (n,) as a prompt holds them."""
    return [processor.boi_token_id, *(codes + processor.visual_offset).tolist(), processor.eoi_token_id]


@torch.no_grad()
def read_codes(
    model: LavitForConditionalGeneration, processor: LavitProcessor, pictures: list[torch.Tensor], question: str = ""
) -> list[str]:
    """The model's captions of pictures, each the codes (n,) of one; or its answers to a question about them."""
    prompt = ANSWER_PROMPT.format(question) if question else ""
    words = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    rows = [picture_ids(processor, codes) + words for codes in pictures]
    inputs = processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, generation_preset="answer" if question else "caption")
    return processor.post_process_answer(ids, input_ids=inputs["input_ids"])


@torch.no_grad()
def imagine(
    model: LavitForConditionalGeneration,
    processor: LavitProcessor,
    pictures: PictureDataset,
    codes: list[list[torch.Tensor]],
    number: int,
    source: str,
    guidance_scale: float,
    seed: int,
    check_style: bool = False,
    batch_size: int = 48,
) -> list[ImaginedPicture]:
    """Draws every missing pair `number` times and keeps the pictures whose caption is the name, by their codes.

    Args:
        model: draws and reads, with the presets of its generation config.
        codes: the pictures' own, the first of each list.
        number: of tries a pair.
        source: "picture" draws from a picture of that name and "in this style", "name" from both as text.
        guidance_scale: of the drawing.
        seed: decides every picture.
        check_style: keep only those, too, of which the model answers the style that was asked for.

    Raises:
        ValueError: another source.
    """
    if source not in SOURCES:
        raise ValueError(f"imagined.source must be one of {SOURCES}, got {source!r}")
    pairs = missing_pairs(pictures) * number
    draw, words, bare = random.Random(seed), processor.tokenizer, {"add_special_tokens": False}
    same_name = defaultdict(list)
    for index, name in enumerate(pictures.name.tolist()):
        same_name[name].append(index)
    kept, mode = [], model.training
    model.eval()
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        prompts = [
            words(NAME_AND_STYLE.format(name=pictures.names[name], style=pictures.styles[style]), **bare)["input_ids"]
            if source == "name"
            else picture_ids(processor, codes[draw.choice(same_name[name])][0])
            + words(restyling_prompt(draw, pictures.styles[style]), **bare)["input_ids"]
            for name, style in part
        ]
        ids = model.generate(
            **words.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device),
            generation_mode="image",
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))],
        )
        drawn = processor.post_process_multimodal_output(ids, generation_mode="image")
        read = [(name,) for name in read_codes(model, processor, drawn)]
        if check_style:
            answers = read_codes(model, processor, drawn, QUESTIONS["style"][0])
            read = [(*name, style) for name, style in zip(read, answers, strict=True)]
        kept += [
            ImaginedPicture(name, style, codes.cpu())
            for (name, style), codes, answers in zip(part, drawn, read, strict=True)
            if answers == (pictures.names[name], pictures.styles[style])[: len(answers)]
        ]
    model.train(mode)
    print(f"imagined {len(pairs)} pictures of {len(pairs) // max(1, number)} pairs, kept {len(kept)}")
    return kept
