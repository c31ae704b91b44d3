"""Pictures that a model draws for itself: of every name in every style of which no picture is there.

A model that is asked for a picture "in this style" has to join what it sees with a style of which it has never seen
this thing. Drawing from text does so better than drawing from a picture; what is drawn from text, and what the model
itself still recognises, serves as targets for both (self-training with a filter, as in arXiv 1911.04252).
"""

from dataclasses import dataclass

import torch

from ..modeling_lavit import LavitForConditionalGeneration
from ..processing import LavitProcessor
from .data import PictureDataset


PROMPT = "{name} in {style} style"


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


@torch.no_grad()
def read_codes(
    model: LavitForConditionalGeneration, processor: LavitProcessor, pictures: list[torch.Tensor]
) -> list[str]:
    """The model's captions of pictures, each the codes (n,) of one."""
    rows = [
        [processor.boi_token_id, *(codes + processor.visual_offset).tolist(), processor.eoi_token_id]
        for codes in pictures
    ]
    inputs = processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    ids = model.generate(**inputs, generation_preset="caption")
    return processor.post_process_answer(ids, input_ids=inputs["input_ids"])


@torch.no_grad()
def imagine(
    model: LavitForConditionalGeneration,
    processor: LavitProcessor,
    pictures: PictureDataset,
    number: int,
    seed: int,
    batch_size: int = 48,
) -> list[ImaginedPicture]:
    """Draws every missing pair `number` times from text and keeps the pictures whose caption is the name.

    Args:
        model: draws and reads, with the presets of its generation config.
        number: of tries a pair.
        seed: decides every picture.
    """
    pairs = missing_pairs(pictures) * number
    kept, mode = [], model.training
    model.eval()
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        prompts = [PROMPT.format(name=pictures.names[name], style=pictures.styles[style]) for name, style in part]
        ids = model.generate(
            **processor(text=prompts, generation_mode="image", return_tensors="pt", padding=True),
            generation_mode="image",
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))],
        )
        drawn = processor.post_process_multimodal_output(ids, generation_mode="image")
        captions = read_codes(model, processor, drawn)
        kept += [
            ImaginedPicture(name, style, codes)
            for (name, style), codes, caption in zip(part, drawn, captions, strict=True)
            if caption == pictures.names[name]
        ]
    model.train(mode)
    print(f"imagined {len(pairs)} pictures of {len(pairs) // max(1, number)} pairs, kept {len(kept)}")
    return kept
