"""Configurations of our models, read from the shapes of official weights; heads leave no trace there."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_lavit.configuration_lavit import LavitConfig, LavitDetokenizerConfig, LavitVisualTokenizerConfig
from modeling_lavit.loading_lavit import said_of

from .source import read_json


OFFICIAL_WIDTH, OFFICIAL_HEADS = 1408, 16


def choose_heads(width: int, text_config: PreTrainedConfig, heads: int | None) -> int:
    """Attention heads of a vision module `width` wide.

    Official ones have 16 at width 1408. Smaller test checkpoints are taken to have as many as their language model.

    Raises:
        ValueError: that does not divide the width, or what was asked for does not.
    """
    chosen = heads or (OFFICIAL_HEADS if width == OFFICIAL_WIDTH else text_config.num_attention_heads)
    if width % chosen:
        raise ValueError(
            f"{chosen} attention heads do not divide the width {width} of the vision modules: weights do not tell the "
            "number of heads, give it with --encoder-heads and --heads"
        )
    return chosen


def text_config(folder: Path) -> PreTrainedConfig:
    """Of the language model's folder."""
    file = folder / "config.json"
    if "auto_map" in read_json(file):
        raise ValueError(f"{file} asks to run code (auto_map): refused, nothing was run")
    with said_of(f"{file} describes no language model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in ("max_position_embeddings", "num_attention_heads", "vocab_size"):
            getattr(config, name)
        return config


def visual_config(
    weights: dict[str, torch.Tensor],
    text_config: PreTrainedConfig,
    encoder_heads: int | None = None,
    heads: int | None = None,
) -> LavitVisualTokenizerConfig:
    """From the shapes of a visual tokenizer under its official names, `encoder.` in front of the vision tower's.

    Raises:
        ValueError: a weight that tells a size is missing, or the number of patches is no square.
    """
    patch_proj = _shape(weights, "encoder.patch_embed.proj.weight", 4)
    width, patch_size = patch_proj[0], patch_proj[2]
    num_patches = _shape(weights, "encoder.pos_embed", 3)[1] - 1
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"encoder.pos_embed is for {num_patches} patches, which make no square image")
    codebook_size, codebook_dim = _shape(weights, "quantize.embedding.weight", 2)
    return LavitVisualTokenizerConfig(
        hidden_size=width,
        intermediate_size=_shape(weights, "encoder.blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_depth(weights, "encoder.blocks."),
        num_attention_heads=choose_heads(width, text_config, encoder_heads),
        image_size=side * patch_size,
        patch_size=patch_size,
        merger_num_hidden_layers=_depth(weights, "causal_encoder.blocks."),
        merger_num_attention_heads=choose_heads(width, text_config, heads),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
    )


def detokenizer_config(
    weights: dict[str, torch.Tensor],
    variant: str,
    visual_config: LavitVisualTokenizerConfig,
    num_unconditional_tokens: int = 77,
) -> LavitDetokenizerConfig:
    """From the shapes of a decoder under its official names; heads as in the merger."""
    projections = ["unet_proj_1", "unet_proj_2"] if variant == "highres" else ["unet_proj"]
    sizes: dict[str, Any] = {"num_unconditional_tokens": num_unconditional_tokens}
    if variant == "highres":
        sizes = {"pooled_embed_dim": _shape(weights, "unet_attnpool.c_proj.weight", 2)[0]}
    _, num_queries, width = _shape(weights, "query_embed", 3)
    return LavitDetokenizerConfig(
        hidden_size=width,
        intermediate_size=_shape(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_depth(weights, "blocks."),
        num_attention_heads=visual_config.merger_num_attention_heads,
        num_queries=num_queries,
        codebook_size=visual_config.codebook_size,
        codebook_dim=visual_config.codebook_dim,
        feature_size=_shape(weights, "decode_task_layer.2.weight", 2)[0],
        variant=variant,
        prompt_embed_dims=[_shape(weights, f"{name}.weight", 2)[0] for name in projections],
        **sizes,
    )


def lavit_config(
    text_config: PreTrainedConfig,
    visual_config: LavitVisualTokenizerConfig,
    text_vocab_size: int,
    share_understanding_merger: bool,
) -> LavitConfig:
    """The whole model's."""
    return LavitConfig(
        text_config=text_config,
        visual_config=visual_config,
        text_vocab_size=text_vocab_size,
        share_understanding_merger=share_understanding_merger,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def _shape(weights: dict[str, torch.Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in weights:
        raise ValueError(f"the weights lack {key}: not an official LaVIT checkpoint, or an incomplete one")
    shape = tuple(weights[key].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{key} has the shape {shape}, but {dimensions} dimensions were expected")
    return shape


def _depth(weights: dict[str, torch.Tensor], prefix: str) -> int:
    layers = {int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix)}
    return max(layers, default=-1) + 1
