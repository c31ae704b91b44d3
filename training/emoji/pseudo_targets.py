"""Images that a model draws for itself to learn from: of every name in every style of which there is none.

A model that draws a thing in a style in which it has never seen it may get either wrong. It redraws images of the
thing in that style; those of which it still reads the name (and the style, if asked to) serve as targets
(self-training with a filter, as in arXiv 1911.04252). What is drawn from a name alone has its name right more often,
and its style less often."""

import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data.samples import ANSWER_PROMPT
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.recipe import PseudoTargets
from modeling_lavit.training.emoji.text import NAME_AND_STYLE, QUESTIONS, restyling_prompt


@dataclass(frozen=True)
class PseudoTarget:
    """An image as codes (n,); `name` and `style` are indices of the data set."""

    name: int
    style: int
    codes: torch.Tensor


def missing_pairs(images: NamedImages) -> list[tuple[int, int]]:
    """Pairs of a name and a style, both with images, of which there is none together."""
    there = set(zip(images.name.tolist(), images.style.tolist(), strict=True))
    names, styles = ({pair[i] for pair in there} for i in (0, 1))
    return sorted({(name, style) for name in names for style in styles} - there)


def code_ids(model: LavitForConditionalGeneration, codes: torch.Tensor) -> list[int]:
    """Codes (n,) as a prompt holds them."""
    vocabulary = model.config.vocabulary
    return [vocabulary.boi_token_id, *vocabulary.ids_of(codes).tolist(), vocabulary.eoi_token_id]


@torch.no_grad()
def read_codes(
    model: LavitForConditionalGeneration, processor: LavitProcessor, images: list[torch.Tensor], question: str = ""
) -> list[str]:
    """The model's captions of images, each the codes (n,) of one; or its answers to a question about them."""
    prompt = ANSWER_PROMPT.format(question) if question else ""
    words = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    rows = [code_ids(model, codes) + words for codes in images]
    inputs = processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, generation_preset="answer" if question else "caption")
    return processor.post_process_answer(ids, input_ids=inputs["input_ids"])


@torch.no_grad()
def draw_pseudo_targets(
    model: LavitForConditionalGeneration,
    processor: LavitProcessor,
    images: NamedImages,
    codes: list[list[torch.Tensor]],
    section: PseudoTargets,
    seed: int,
    batch_size: int = 48,
) -> list[PseudoTarget]:
    """Draws every missing pair `number` times and keeps the images whose caption is the name, by their codes.

    Args:
        model: draws and reads, with the presets of its generation config.
        codes: the images' own, the first of each list.
        section: `number` of tries a pair; `source` `"image"` draws from an image of that name and "in this style",
            `"name"` from both as text; `guidance_scale` of the drawing; `check_style`: keep only those, too, of which
            the model answers the style that was asked for.
        seed: decides every image.
    """
    pairs = missing_pairs(images) * section.number
    draw, words, bare = random.Random(seed), processor.tokenizer, {"add_special_tokens": False}
    same_name = defaultdict(list)
    for index, name in enumerate(images.name.tolist()):
        same_name[name].append(index)
    kept, mode = [], model.training
    model.eval()
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        prompts = [
            words(NAME_AND_STYLE.format(name=images.names[name], style=images.styles[style]), **bare)["input_ids"]
            if section.source == "name"
            else code_ids(model, codes[draw.choice(same_name[name])][0])
            + words(restyling_prompt(draw, images.styles[style]), **bare)["input_ids"]
            for name, style in part
        ]
        ids = model.generate(
            **words.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device),
            generation_mode="image",
            guidance_scale=section.guidance_scale,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))],
        )
        drawn = processor.post_process_multimodal_output(ids, generation_mode="image")
        read = [(name,) for name in read_codes(model, processor, drawn)]
        if section.check_style:
            answers = read_codes(model, processor, drawn, QUESTIONS["style"][0])
            read = [(*name, style) for name, style in zip(read, answers, strict=True)]
        kept += [
            PseudoTarget(name, style, own.cpu())
            for (name, style), own, answers in zip(part, drawn, read, strict=True)
            if answers == (images.names[name], images.styles[style])[: len(answers)]
        ]
    model.train(mode)
    print(f"drawn {len(pairs)} images of {len(pairs) // max(1, section.number)} pairs without one, kept {len(kept)}")
    return kept
