"""The visual tokenizer as a plain reading of the paper computes it: every row, every mask, attention in the open."""

import torch
import torch.nn.functional as F

from modeling_lavit import LavitVisualTokenizer
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitQuantizer, LavitTokenMerger


def merge(merger: LavitTokenMerger, features: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """(B, N, C) and (B, N) to the kept rows: all N rows go through all layers, and are dropped at the end."""
    mask = keep_mask.to(features.dtype)
    diagonal = torch.eye(features.shape[1], dtype=mask.dtype, device=mask.device)
    self_allowed = torch.maximum(mask[:, None, None] * torch.ones_like(diagonal).tril(), diagonal)
    cross_allowed = 1 - mask[:, None, None]
    context = merger.context_norm(features)
    for layer in merger.layers:
        features = layer(features, context, self_allowed, cross_allowed)
    return merger.norm(features)[keep_mask]


def quantize(quantizer: LavitQuantizer, features: torch.Tensor) -> torch.Tensor:
    """Merged features to codes, with the whole distance and a one-hot matrix."""
    unit = F.normalize(quantizer.project(features), dim=-1)
    codebook = quantizer.codebook.weight
    distances = unit.pow(2).sum(-1, keepdim=True) + codebook.pow(2).sum(-1) - 2 * unit @ codebook.T
    one_hot = torch.zeros_like(distances).scatter_(1, distances.argmin(-1, keepdim=True), 1)
    return one_hot.argmax(-1)


def tokenize(tokenizer: LavitVisualTokenizer, pixel_values: torch.Tensor, **selection) -> torch.Tensor:
    """Images to codes; build the tokenizer with `attn_implementation="eager"`."""
    features = tokenizer.encode_patches(pixel_values)
    keep_mask, _ = tokenizer.select(features, **selection)
    return quantize(tokenizer.quantizer, merge(tokenizer.merger, features, keep_mask))
