"""The block that merger and detokenizer are made of: self attention, cross attention, feed-forward.

Legend: B images, N patches, R rows (queries), K keys, C width, H heads, D = C / H.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention (B, H, R, D) by explicit matrix products; returns (B, R, H, D) and the weights."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def leaky_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    allowed: torch.Tensor,
    epsilon: float,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """The merger's attention, differentiable with respect to `allowed`.

    With `e = allowed · exp(a - max_j a)`, the maximum taken over *all* keys, and `S` the sum of `e`, a row is
    `(e v + epsilon · mean(v)) / (S + epsilon)`. Without epsilon, a row that may see nothing is zero.

    Args:
        query: (B, H, R, D). key, value: (B, H, K, D).
        allowed: (B, 1, R or 1, K), one where a key may be seen, zero elsewhere.
        present: (B, 1, 1, K) bool, which keys maximum and mean are taken over; None for all.

    Returns:
        (B, R, H, D).
    """
    logits = torch.matmul(query * scaling, key.transpose(2, 3)).float()
    if present is None:
        mean = value.mean(2, keepdim=True)
    else:
        logits = logits.masked_fill(~present, float("-inf"))
        shares = present / present.sum(-1, keepdim=True)
        mean = torch.matmul(shares.to(value.dtype), value)
    weights = logits.sub_(logits.detach().amax(-1, keepdim=True)).exp_() * allowed
    total = weights.sum(-1, keepdim=True) + epsilon
    hidden = torch.matmul(weights.to(value.dtype), value) + epsilon * mean
    return (hidden / total.clamp_min(torch.finfo(torch.float32).tiny)).to(value.dtype).transpose(1, 2)


def mixed_precision(norm: nn.LayerNorm, linear: nn.Linear, device: torch.device) -> AbstractContextManager:
    """Autocast to the dtype of `linear` where that is narrower than the one of `norm`.

    A model loaded in half precision keeps its norms, and with them its residual stream, in float32: summed up over
    many layers in half precision it would lose the small increments.
    """
    if norm.weight.dtype == torch.float32 and linear.weight.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, linear.weight.dtype)
    return nullcontext()


def take_rows(hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows (B, R) of every image: (B, N, C) to (B, R, C)."""
    return hidden_states.gather(1, rows[..., None].expand(-1, -1, hidden_states.shape[-1]))


def requested(
    layers: tuple[torch.Tensor, ...], asked: bool | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """Of all layers' outputs those that `output_hidden_states` asks for: all, none, or a list of layers' numbers.

    As in transformers, layers that are not on the list are None, so that every layer keeps its place.
    """
    if not asked:
        return None
    if asked is True:
        return layers
    return tuple(layer if index in asked else None for index, layer in enumerate(layers))


class FewRowsLinear(nn.Linear):
    """As its base class; for a few rows on a CPU in float32 it multiplies in the other order, which is faster.

    MKL packs the matrix of weights anew for every product of the usual order with 3 to 8 rows, with AVX-512 of 2 and 3
    (measured on two AMD EPYC: `python -m benchmarks.run --only few_rows`). Those are the rows of a step that draws one
    to four images with guidance, or reads as many with two beams. Small matrices lie in the cache, and gain nothing.
    """

    ROWS = range(2, 4) if torch.backends.cpu.get_cpu_capability() == "AVX512" else range(3, 9)
    LEAST_WEIGHTS = 2**21

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        if rows not in self.ROWS or self.weight.numel() < self.LEAST_WEIGHTS or torch.compiler.is_compiling():
            return super().forward(input)
        # a sharded or quantized weight is of another type
        plain = type(self.weight) is nn.Parameter and input.dtype == self.weight.dtype == torch.float32
        if not plain or self.weight.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(input)
        output = (self.weight @ input.reshape(rows, -1).T).T.contiguous()
        output = output if self.bias is None else output + self.bias
        return output.reshape(*input.shape[:-1], -1)


class LavitAttention(nn.Module):
    """Multi-head attention, of a sequence to itself (`qkv` in one matrix) or to a context."""

    is_causal = False

    def __init__(self, config: PreTrainedConfig, num_heads: int, epsilon: float, is_cross_attention: bool):
        super().__init__()
        width = config.hidden_size
        if width % num_heads:
            raise ValueError(f"hidden_size {width} is not a multiple of the number of attention heads {num_heads}")
        self.config = config
        self.num_heads = num_heads
        self.scaling = (width // num_heads) ** -0.5
        self.epsilon = epsilon
        if is_cross_attention:
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            self.value = nn.Linear(width, width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (B, R, C).
            context: (B, K, C); the sequence itself when None.
            allowed: (B, 1, R or 1, K) multiplicative mask; present: (B, 1, 1, K); see [`leaky_attention`].
            attention_mask: (B, 1, R or 1, K) additive mask.
            rows: (B, R') of a sequence that attends to itself: these rows alone are queries.
        """
        if context is None:
            projected = self.qkv(hidden_states).chunk(3, dim=-1)
            if rows is not None:
                projected = take_rows(projected[0], rows), *projected[1:]
        else:
            projected = self.query(hidden_states), self.key(context), self.value(context)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        if allowed is not None and (self.epsilon or allowed.requires_grad):
            attended = leaky_attention(query, key, value, self.scaling, allowed, self.epsilon, present)
        else:
            if allowed is not None:
                attention_mask = (1 - allowed.to(query.dtype)) * torch.finfo(query.dtype).min
                attention_mask = attention_mask.expand(-1, -1, query.shape[2], -1)
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation,  # pyright: ignore[reportArgumentType]
                eager_attention_forward,
            )
            attended, _ = attention_interface(
                self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0
            )
            if allowed is not None:
                attended = attended * allowed.amax(-1).transpose(1, 2)[..., None].to(attended.dtype)
        return self.projection(attended.flatten(2))


class LavitMLP(nn.Module):
    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class LavitLayer(GradientCheckpointingLayer):
    """Self attention, cross attention to a fixed context, feed-forward; pre-norm, residual (paper section 3.1)."""

    def __init__(self, config: PreTrainedConfig, num_heads: int, layer_norm_eps: float, epsilon: float):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=layer_norm_eps)
        self.self_attn = LavitAttention(config, num_heads, epsilon, is_cross_attention=False)
        self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=layer_norm_eps)
        self.cross_attn = LavitAttention(config, num_heads, epsilon, is_cross_attention=True)
        self.mlp_layer_norm = nn.LayerNorm(config.hidden_size, eps=layer_norm_eps)
        self.mlp = LavitMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        self_allowed: torch.Tensor | None = None,
        cross_allowed: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        self_present: torch.Tensor | None = None,
        cross_present: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, C) to (B, N, C), or to (B, R, C) where `rows` (B, R) asks for these alone; the rest see
        [`LavitAttention.forward`]."""
        attended = self.self_attn(
            self.self_attn_layer_norm(hidden_states), allowed=self_allowed, present=self_present, rows=rows
        )
        if rows is not None:
            hidden_states = take_rows(hidden_states, rows)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.cross_attn(
            self.cross_attn_layer_norm(hidden_states), context, cross_allowed, cross_attention_mask, cross_present
        )
        return hidden_states + self.mlp(self.mlp_layer_norm(hidden_states))
