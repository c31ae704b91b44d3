"""Rows at the width of a language model of 7B weights (4,096), of few layers; a step of all 32 follows from them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, GenerationMixin, LlamaConfig

from benchmarks.measure import Comparison, Way
from benchmarks.rows import Options, drawing, row, small_visual_config
from modeling_lavit import LavitConfig, LavitForConditionalGeneration
from modeling_lavit.layers_lavit import FewRowsLinear


FULL_DEPTH = 32
# positions that an image of 36 % kept patches takes in a prompt, with its brackets
IMAGE_POSITIONS = 94


def model_of_7b_width(layers: int, dtype: torch.dtype) -> LavitForConditionalGeneration:
    """Random weights; the ids of a small vocabulary, so that what is measured are the layers."""
    text = LlamaConfig(
        vocab_size=2026,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=1024,
    )
    config = LavitConfig(
        text_config=text,
        visual_config=small_visual_config(codebook_size=1024),
        text_vocab_size=1000,
        share_understanding_merger=True,
    )
    model = LavitForConditionalGeneration(config).to(dtype).eval()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def with_plain_linear(run: Callable[[], None]) -> Callable[[], None]:
    """`run` with the usual order of products, as a stock model has it."""

    def plain():
        rows, FewRowsLinear.ROWS = FewRowsLinear.ROWS, range(0)
        try:
            run()
        finally:
            FewRowsLinear.ROWS = rows

    return plain


def two_passes(model: LavitForConditionalGeneration, options: Options, images: int) -> Callable[[], None]:
    """Drawing by transformers' own guidance: a second forward for the unconditional stream, as the official code."""
    boi = model.config.vocabulary.boi_token_id
    input_ids = torch.tensor([[1, *range(3, 9), boi]] * images)

    def run():
        GenerationMixin.generate(
            model,
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([[boi]] * images),
            do_sample=True,
            top_k=50,
            min_new_tokens=options.new_tokens,
            max_new_tokens=options.new_tokens,
        )

    return with_plain_linear(run)


def _drawing(options: Options, layers: int, images: int, dtype: torch.dtype) -> Comparison:
    model, options = model_of_7b_width(layers, dtype), replace(options, new_tokens=8)
    return Comparison(
        Way("ours", drawing(model, options, images, guidance_scale=3.0)),
        Way("two passes", two_passes(model, options, images)),
    )


@row
def few_rows(options: Options) -> Comparison:
    """A matrix of 11,008 x 4,096 times three rows, float32"""
    linear = FewRowsLinear(4096, 11008, bias=False)
    inputs = torch.randn(3, 4096)
    return Comparison(
        Way("FewRowsLinear", lambda: linear(inputs)), Way("nn.Linear", with_plain_linear(lambda: linear(inputs)))
    )


@row
def draw_7b_2_layers(options: Options) -> Comparison:
    """Eight codes of one image with guidance, 7B's width, 2 layers, float32"""
    return _drawing(options, 2, 1, torch.float32)


@row
def draw_7b_4_layers(options: Options) -> Comparison:
    """Eight codes of one image with guidance, 7B's width, 4 layers, float32"""
    return _drawing(options, 4, 1, torch.float32)


@row
def draw_7b_bfloat16(options: Options) -> Comparison:
    """Eight codes of one image with guidance, 7B's width, 2 layers, bfloat16"""
    return _drawing(options, 2, 1, torch.bfloat16)


@row
def draw_four_7b_2_layers(options: Options) -> Comparison:
    """Eight codes of four images with guidance, 7B's width, 2 layers, float32"""
    return _drawing(options, 2, 4, torch.float32)


@row
def draw_four_7b_4_layers(options: Options) -> Comparison:
    """Eight codes of four images with guidance, 7B's width, 4 layers, float32"""
    return _drawing(options, 4, 4, torch.float32)


@row
def captions_7b(options: Options) -> Comparison:
    """Captions of four prompts of an image's length, 2 beams, 8 ids, 7B's width, 2 layers, float32"""
    model = model_of_7b_width(2, torch.float32)
    input_ids = torch.randint(3, 990, (4, IMAGE_POSITIONS), generator=torch.Generator().manual_seed(0))
    settings = {"num_beams": 2, "min_new_tokens": 8, "max_new_tokens": 8}
    read = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **settings}
    return Comparison(
        Way("prompts computed once", lambda: model.generate(**read)),
        Way("once for each beam", with_plain_linear(lambda: GenerationMixin.generate(model, **read))),
    )


@dataclass
class Derived:
    """Seconds at full depth, from those at two depths: a layer takes as long as any other."""

    name: str
    shallow: Comparison
    deep: Comparison

    def seconds(self, way: str) -> float:
        two, four = (statistics.median(getattr(one, way).cpu_seconds) for one in (self.shallow, self.deep))
        return two + (four - two) / 2 * (FULL_DEPTH - 2)


# at full depth, of which rows
DERIVED = {
    "one image": ("draw_7b_2_layers", "draw_7b_4_layers"),
    "four images": ("draw_four_7b_2_layers", "draw_four_7b_4_layers"),
}


def derived(comparisons: dict[str, Comparison]) -> list[Derived]:
    """Those whose rows have been measured."""
    return [
        Derived(name, *(comparisons[one] for one in pair))
        for name, pair in DERIVED.items()
        if all(one in comparisons for one in pair)
    ]
