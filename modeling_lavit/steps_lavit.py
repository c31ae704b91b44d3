"""One decoding step of a plain Llama: its arithmetic, and nothing around it.

Between two forwards of transformers' Llama lie the preparation of inputs, masks that are built anew, and a few hundred
calls of modules: for small models, or few rows, more than the arithmetic itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel


ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
NEEDED_ARGUMENTS = {"attention_mask", "past_key_values", "position_ids"}
KNOWN_ARGUMENTS = NEEDED_ARGUMENTS | {"inputs_embeds", "logit_range", "logits_to_keep", "use_cache"}


def grows_freely(cache: Cache | None) -> bool:
    """Whether a cache is made of plain tensors that grow with every step: its rows can be dropped, its end cut off."""
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


def can_step_plainly(model: nn.Module, model_kwargs: dict[str, Any]) -> bool:
    """Whether [`plain_step`] computes what `model.forward` does.

    Not so with hooks, adapters, quantized or sharded weights, attention other than softmax over everything before, in
    training, or where more is asked of the model than logits. `model.uses_plain_steps = False` says no, too.
    """
    llama = model.model.language_model
    if not model.uses_plain_steps or model.training or type(llama) is not LlamaModel:
        return False
    if not KNOWN_ARGUMENTS >= model_kwargs.keys() >= NEEDED_ARGUMENTS:
        return False
    if llama.config._attn_implementation not in ("sdpa", "eager"):
        return False
    for module in (model, model.model, *llama.modules()):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(type(weight) is not nn.Parameter for weight in module._parameters.values() if weight is not None):
            return False
    return all(
        type(getattr(part, name)) is nn.Linear
        for layer in llama.layers
        for part, names in ((layer.self_attn, ATTENTION_MATRICES), (layer.mlp, MLP_MATRICES))
        for name in names
    )


def plain_step(model: nn.Module, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
    """The logits (B, T, V) of the newest ids (B, T), as `model.forward` computes them."""
    cache, positions = model_kwargs["past_key_values"], model_kwargs["position_ids"]
    hidden_states = llama_step(
        model.model.language_model,
        input_ids,
        positions[:, -input_ids.shape[1] :],
        model_kwargs["attention_mask"],
        cache,
    )
    logits = model._compute_logits(hidden_states, model_kwargs.get("logit_range"))
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def llama_step(
    llama: LlamaModel,
    input_ids: torch.LongTensor,
    position_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None,
    cache: Cache,
) -> torch.Tensor:
    """The newest ids through a Llama; their keys and values are put behind the cache's.

    Args:
        llama: for which [`can_step_plainly`] holds.
        input_ids, position_ids: (B, T), the newest.
        attention_mask: (B, S), 0 on padding, or None; S counts the ids in the cache and the newest.
        cache: for which [`grows_freely`] holds, filled.

    Returns:
        (B, T, E), normed.
    """
    rows, count = input_ids.shape
    hidden_states = llama.embed_tokens(input_ids)
    cos, sin = llama.rotary_emb(hidden_states, position_ids)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = cos.shape[-1] // 2
    # the half that comes from behind is subtracted: rotating is x · cos + roll(x) · sin
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    length = cache.get_seq_length() + count
    allowed = torch.ones(count, length, dtype=torch.bool, device=input_ids.device).tril(length - count)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None].bool()
    mask = hidden_states.new_zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(hidden_states.dtype).min)

    for layer, cached in zip(llama.layers, cache.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        normed = _norm(layer.input_layernorm, hidden_states)
        query, key, value = (
            F.linear(normed, one.weight, one.bias).view(rows, count, -1, attention.head_dim)
            for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        rotated = torch.cat([query, key], dim=2)
        rotated = torch.addcmul(rotated * cos, rotated.roll(half, -1), sin).transpose(1, 2)
        query, key = rotated.split([query.shape[2], key.shape[2]], dim=1)
        cached.keys = torch.cat([cached.keys, key], dim=2)
        cached.values = torch.cat([cached.values, value.transpose(1, 2)], dim=2)
        attended = F.scaled_dot_product_attention(
            query,
            cached.keys,
            cached.values,
            attn_mask=mask,
            scale=attention.scaling,
            enable_gqa=attention.num_key_value_groups > 1,
        )
        attended = attended.transpose(1, 2).reshape(rows, count, -1)
        hidden_states = hidden_states + F.linear(attended, attention.o_proj.weight, attention.o_proj.bias)
        normed = _norm(layer.post_attention_layernorm, hidden_states)
        gate = mlp.act_fn(F.linear(normed, mlp.gate_proj.weight, mlp.gate_proj.bias))
        gate = gate.mul_(F.linear(normed, mlp.up_proj.weight, mlp.up_proj.bias))
        hidden_states = hidden_states + F.linear(gate, mlp.down_proj.weight, mlp.down_proj.bias)
    return _norm(llama.norm, hidden_states)


def _norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype == torch.float32:
        return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)
    # Llama's norm rounds before it multiplies
    normed = F.rms_norm(hidden_states.float(), norm.weight.shape, eps=norm.variance_epsilon)
    return norm.weight * normed.to(hidden_states.dtype)
