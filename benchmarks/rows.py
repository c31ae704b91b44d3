"""The rows of the benchmark. Each builds two ways of one thing; widths are those of the official checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import nn
from transformers import CompileConfig, GenerationConfig, GenerationMixin, LlamaConfig

from benchmarks import reference_like
from benchmarks.measure import Comparison, Curve, Way
from modeling_lavit import (
    LavitConfig,
    LavitForConditionalGeneration,
    LavitPipeline,
    LavitVisualTokenizer,
    LavitVisualTokenizerConfig,
)
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitTokenMerger


# what LaVIT keeps of a photograph, on average
KEPT_SHARE = 0.36
PROMPT = "red apple in noto style"


@dataclass
class Options:
    """Sizes of the models measured.

    Args:
        encoder_layers, merger_layers, language_layers: depths; the widths stay.
        new_tokens: ids that a decoding row writes.
        checkpoint: for the rows that need a trained model.
    """

    encoder_layers: int = 40
    merger_layers: int = 12
    language_layers: int = 8
    new_tokens: int = 48
    checkpoint: str = str(LAVIT_EMOJI)


ROWS: dict[str, Callable[[Options], Comparison]] = {}
CURVES: dict[str, Callable[[Options], Curve]] = {}


def row(build: Callable[[Options], Comparison]) -> Callable[[Options], Comparison]:
    ROWS[build.__name__] = build
    return build


def curve(build: Callable[[Options], Curve]) -> Callable[[Options], Curve]:
    CURVES[build.__name__] = build
    return build


def visual_config(options: Options, **values) -> LavitVisualTokenizerConfig:
    depths = {
        "num_hidden_layers": options.encoder_layers,
        "merger_num_hidden_layers": options.merger_layers,
    }
    return LavitVisualTokenizerConfig(**(depths | values))


def random_mask(batch: int, patches: int, share: float = KEPT_SHARE) -> torch.Tensor:
    """(batch, patches) bool, the same number kept in every row."""
    scores = torch.rand(batch, patches, generator=torch.Generator().manual_seed(0))
    return torch.zeros(batch, patches, dtype=torch.bool).scatter(1, scores.topk(round(share * patches)).indices, True)


def random_images(count: int, size: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def encoder_operations(config: LavitVisualTokenizerConfig) -> float:
    """Floating-point operations of one image in the encoder, a multiplication and an addition being two."""
    tokens, width = config.num_patches + 1, config.hidden_size
    matrices = width * (4 * width + 2 * config.intermediate_size)
    attention = 2 * tokens * width
    patches = config.num_patches * width * 3 * config.patch_size**2
    return 2 * (config.num_hidden_layers * tokens * (matrices + attention) + patches)


def small_visual_config(codebook_size: int) -> LavitVisualTokenizerConfig:
    return LavitVisualTokenizerConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        merger_num_hidden_layers=1,
        num_attention_heads=1,
        merger_num_attention_heads=1,
        codebook_size=codebook_size,
    )


def language_model(options: Options, official_vocabulary: bool = False) -> LavitForConditionalGeneration:
    """Weights of several hundred megabytes, more than a cache holds; by choice with the official vocabulary.

    The visual tokenizer is a small one: these rows do not use it.
    """
    visual = small_visual_config(codebook_size=16384 if official_vocabulary else 1024)
    text_vocab_size = 32000 if official_vocabulary else 1000
    text = LlamaConfig(
        vocab_size=text_vocab_size + 2 + visual.codebook_size,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=options.language_layers,
        num_attention_heads=16,
        max_position_embeddings=1024,
    )
    model = LavitForConditionalGeneration(
        LavitConfig(
            text_config=text,
            visual_config=visual,
            text_vocab_size=text_vocab_size,
            share_understanding_merger=True,
        )
    ).eval()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def drawing(model: LavitForConditionalGeneration, options: Options, rows: int = 1, **settings) -> Callable[[], None]:
    """Writes `new_tokens` codes for each of `rows` prompts."""
    boi = model.config.vocabulary.boi_token_id
    input_ids = torch.tensor([[1, *range(3, 9), boi]] * rows)
    limits = {"min_image_tokens": options.new_tokens, "max_image_tokens": options.new_tokens}

    def run():
        model.generate(
            input_ids=input_ids,
            generation_mode="image",
            generator=torch.Generator().manual_seed(0),
            **(limits | settings),
        )

    return run


@row
def merger(options: Options) -> Comparison:
    """Merger, one image, 36 % kept, float32"""
    config = visual_config(options, attention_epsilon=0)
    merger, features, mask = _merger_and_input(config)
    return Comparison(
        Way("kept tokens only", lambda: merger(features, mask)),
        Way("dense", lambda: reference_like.merge(merger, features, mask)),
        target=2.3,
    )


@row
def merger_batch(options: Options) -> Comparison:
    """Merger, four images, 36 % kept, float32"""
    merger, features, mask = _merger_and_input(visual_config(options, attention_epsilon=0), images=4)
    return Comparison(
        Way("kept tokens only", lambda: merger(features, mask)),
        Way("dense", lambda: reference_like.merge(merger, features, mask)),
        target=2.3,
    )


@row
def merger_with_leak(options: Options) -> Comparison:
    """Merger with the official leak, one image, 36 % kept, float32"""
    merger, features, mask = _merger_and_input(visual_config(options))
    return Comparison(
        Way("exact", lambda: merger(features, mask)),
        Way("dense", lambda: reference_like.merge(merger, features, mask)),
    )


@row
def merger_kept_only(options: Options) -> Comparison:
    """Merger with the official leak over kept rows, one image, 36 % kept, float32"""
    merger, features, mask = _merger_and_input(visual_config(options, kept_only=True))
    return Comparison(
        Way("kept_only=True", lambda: merger(features, mask)),
        Way("dense", lambda: reference_like.merge(merger, features, mask)),
    )


def _merger_and_input(
    config: LavitVisualTokenizerConfig, images: int = 1
) -> tuple[LavitTokenMerger, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    features = torch.randn(images, config.num_patches, config.hidden_size)
    return LavitTokenMerger(config).eval(), features, random_mask(images, config.num_patches)


@row
def encoder(options: Options) -> Comparison:
    """Encoder's arithmetic beside a plain matrix product's, float32"""
    return _encoder_and_matmul(options, torch.float32)


@row
def encoder_bfloat16(options: Options) -> Comparison:
    """Encoder's arithmetic beside a plain matrix product's, bfloat16"""
    return _encoder_and_matmul(options, torch.bfloat16)


def _encoder_and_matmul(options: Options, dtype: torch.dtype) -> Comparison:
    # a layer's arithmetic per second does not depend on how many there are, if they exceed the cache
    layers = min(8, options.encoder_layers)
    config = visual_config(options, merger_num_hidden_layers=1, num_hidden_layers=layers)
    tokenizer = _tokenizer(config, dtype)
    pixel_values = random_images(1)
    tokens = config.num_patches + 1
    left = torch.randn(tokens, config.hidden_size).to(dtype)
    # as many different matrices as do not fit a cache
    matrices = [torch.randn(config.intermediate_size, config.hidden_size).to(dtype) for _ in range(24)]

    def products():
        for matrix in matrices:
            torch.nn.functional.linear(left, matrix)

    return Comparison(
        Way("encoder", lambda: tokenizer.encode_patches(pixel_values), encoder_operations(config)),
        Way("matrix products", products, 2.0 * len(matrices) * left.numel() * config.intermediate_size),
        target=0.8,
    )


@row
def tokenizer(options: Options) -> Comparison:
    """Visual tokenizer, one image, 36 % kept, float32"""
    return _tokenizer_and_reference(options, torch.float32)


@row
def tokenizer_bfloat16_beside_float32(options: Options) -> Comparison:
    """Visual tokenizer, one image, 36 % kept, bfloat16 beside float32"""
    return _tokenizer_and_reference(options, torch.bfloat16)


def _tokenizer_and_reference(options: Options, dtype: torch.dtype) -> Comparison:
    plain = _tokenizer(visual_config(options), torch.float32, attn_implementation="eager")
    ours = _tokenizer(visual_config(options, attention_epsilon=0), dtype)
    pixel_values = random_images(1)
    return Comparison(
        Way("kept tokens only", lambda: ours.tokenize(pixel_values, keep_ratio=KEPT_SHARE)),
        Way("dense, eager", lambda: reference_like.tokenize(plain, pixel_values, keep_ratio=KEPT_SHARE)),
    )


@row
def guidance(options: Options) -> Comparison:
    """Drawing with guidance, weights exceed the cache, bfloat16"""
    return _one_batch_and_two_passes(options, torch.bfloat16, target=1.7)


@row
def guidance_float32(options: Options) -> Comparison:
    """Drawing with guidance, weights exceed the cache, float32"""
    return _one_batch_and_two_passes(options, torch.float32)


def _one_batch_and_two_passes(options: Options, dtype: torch.dtype, target: float | None = None) -> Comparison:
    model = language_model(options).to(dtype)
    boi = model.config.vocabulary.boi_token_id
    input_ids = torch.tensor([[1, *range(3, 9), boi]])

    def two_passes():
        # transformers' own guidance: a second forward for the unconditional stream
        GenerationMixin.generate(
            model,
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([[boi]]),
            do_sample=True,
            top_k=50,
            min_new_tokens=options.new_tokens,
            max_new_tokens=options.new_tokens,
        )

    return Comparison(
        Way("one batch", drawing(model, options, guidance_scale=3.0)), Way("two passes", two_passes), target=target
    )


@row
def head(options: Options) -> Comparison:
    """One step of a one-layer model with 48,386 ids, float32"""
    model = language_model(replace(options, language_layers=1), official_vocabulary=True)
    vocabulary = model.config.vocabulary
    input_ids = torch.tensor([[5], [vocabulary.boi_token_id]])

    def step(**head):
        with torch.no_grad():
            model(input_ids, use_cache=False, logits_to_keep=1, **head)

    codes = (vocabulary.eoi_token_id, vocabulary.size)
    return Comparison(Way("head for codes", lambda: step(logit_range=codes)), Way("whole head", step))


@row
def static_cache(options: Options) -> Comparison:
    """Drawing with guidance, the embedded checkpoint, float32"""
    model = LavitForConditionalGeneration.from_pretrained(options.checkpoint).eval()
    compiled = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(fullgraph=True, mode="default"),
        "disable_compile": False,
    }
    compiled["compile_config"]._compile_all_devices = True
    return Comparison(
        Way("static cache, compiled", drawing(model, options, guidance_scale=3.0, **compiled)),
        Way("dynamic cache, eager", drawing(model, options, guidance_scale=3.0)),
    )


@row
def looking_ahead(options: Options) -> Comparison:
    """Visual tokens with guidance, the embedded checkpoint, float32"""
    pipe = _pipeline(options)
    forwards, compute_logits = [], pipe.model._compute_logits

    def counted(*arguments):  # a hook would turn plain steps off
        forwards.append(None)
        return compute_logits(*arguments)

    pipe.model._compute_logits = counted

    def tokens(draft_length: int | None) -> str:
        forwards.clear()
        pipe.generate_visual_tokens(PROMPT, generator=torch.Generator().manual_seed(0), draft_length=draft_length)
        return f"{len(forwards)} forwards"

    return Comparison(Way("codes looked up ahead", lambda: tokens(None)), Way("one by one", lambda: tokens(0)))


@row
def solver(options: Options) -> Comparison:
    """Pixels from visual tokens, the embedded checkpoint, float32"""
    tokens = [torch.arange(40)]

    def way(name: str, scheduler: type, steps: int) -> Way:
        pipe = _pipeline(options)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return Way(f"{name}, {steps} steps", lambda: pipe(visual_tokens=tokens, num_inference_steps=steps))

    return Comparison(way("UniPC", UniPCMultistepScheduler, 5), way("DDIM", DDIMScheduler, 10))


@row
def guidance_interval(options: Options) -> Comparison:
    """Pixels from visual tokens with guidance, ten steps, the embedded checkpoint, float32"""
    pipe = _pipeline(options)
    settings = {"visual_tokens": [torch.arange(40)], "num_inference_steps": 10, "decoder_guidance_scale": 2.0}
    return Comparison(
        Way("guidance in half of the steps", lambda: pipe(**settings, decoder_guidance_interval=(0.0, 0.5))),
        Way("in all", lambda: pipe(**settings)),
    )


@row
def captions(options: Options) -> Comparison:
    """Answers to four images with five beams, the embedded checkpoint, float32"""
    model = LavitForConditionalGeneration.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    boi, size = model.config.vocabulary.boi_token_id, model.config.visual_config.image_size
    read = {
        "input_ids": torch.tensor([[boi, boi + 1]] * 4),
        "pixel_values": random_images(4, size),
        "generation_preset": "answer",
    }
    return Comparison(
        Way("prompts computed once", lambda: model.generate(**read)),
        Way("once for each beam", lambda: model.generate(**read, return_dict_in_generate=True)),
    )


def _pipeline(options: Options) -> LavitPipeline:
    pipe = LavitPipeline.from_pretrained(options.checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@curve
def images(options: Options) -> Curve:
    """Visual tokenizer, bfloat16, kept tokens only"""
    tokenizer = _tokenizer(visual_config(options, attention_epsilon=0), torch.bfloat16)
    batches = {count: random_images(count) for count in (1, 2, 4)}
    return Curve(
        "images",
        {count: partial(tokenizer.tokenize, batch, keep_ratio=KEPT_SHARE) for count, batch in batches.items()},
    )


@curve
def tokens(options: Options) -> Curve:
    """Drawing with guidance, weights exceed the cache"""
    model = language_model(options)
    counts = [options.new_tokens // 4, options.new_tokens // 2, options.new_tokens]
    return Curve(
        "tokens",
        {count: drawing(model, replace(options, new_tokens=count), guidance_scale=3.0) for count in counts},
    )


@curve
def batch(options: Options) -> Curve:
    """Drawing with guidance, weights exceed the cache"""
    model = language_model(options)
    return Curve("drawn at once", {rows: drawing(model, options, rows, guidance_scale=3.0) for rows in (1, 2, 4)})


def _tokenizer(config: LavitVisualTokenizerConfig, dtype: torch.dtype, **values) -> LavitVisualTokenizer:
    """Random weights in the dtypes of `from_pretrained(dtype=...)`."""
    torch.manual_seed(0)
    tokenizer = LavitVisualTokenizer._from_config(config, **values).eval()
    for module in tokenizer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return tokenizer
