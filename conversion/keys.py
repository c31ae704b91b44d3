"""The one home of the official checkpoints' key names: how each becomes one of ours (see `rename_*`).

All functions take and return state dicts; tensors may be on the meta device, where only shapes count.
"""

import re

import torch


_BLOCK = [
    (r"\.norm0\.", ".self_attn_layer_norm."),
    (r"\.norm1\.", ".cross_attn_layer_norm."),
    (r"\.norm2\.", ".mlp_layer_norm."),
    (r"\.(token_causal_attn|self_attn)\.", ".self_attn."),
    (r"\.(token_cross_attn|cross_attn)\.", ".cross_attn."),
    (r"\.proj\.", ".projection."),
]

_ENCODER = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm1\.", ".layer_norm1."),
    (r"\.norm2\.", ".layer_norm2."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
]

_TOKENIZER = [
    (r"^token_predictor\.in_conv\.0\.", "selector.norm."),
    (r"^token_predictor\.in_conv\.1\.", "selector.in_proj."),
    (r"^token_predictor\.out_conv\.0\.", "selector.hidden_proj1."),
    (r"^token_predictor\.out_conv\.2\.", "selector.hidden_proj2."),
    (r"^token_predictor\.out_conv\.4\.", "selector.out_proj."),
    (r"^causal_encoder\.ln_vision\.", "merger.context_norm."),
    (r"^causal_encoder\.norm\.", "merger.norm."),
    (r"^causal_encoder\.blocks\.", "merger.layers."),
    (r"^quantize\.embedding\.", "quantizer.codebook."),
    (r"^encode_task_layer\.0\.", "quantizer.fc1."),
    (r"^encode_task_layer\.2\.", "quantizer.fc2."),
]

_DETOKENIZER = [
    (r"^pos_embed$", "position_embedding"),
    (r"^query_embed$", "query_embedding"),
    (r"^blocks\.", "layers."),
    (r"^decode_task_layer\.0\.", "fc1."),
    (r"^decode_task_layer\.2\.", "fc2."),
    (r"^unet_proj\.", "prompt_projections.0."),
    (r"^unet_proj_1\.", "prompt_projections.0."),
    (r"^unet_proj_2\.", "prompt_projections.1."),
    (r"^unet_attnpool\.positional_embedding$", "attention_pool.position_embedding"),
    (r"^unet_attnpool\.q_proj\.", "attention_pool.query."),
    (r"^unet_attnpool\.k_proj\.", "attention_pool.key."),
    (r"^unet_attnpool\.v_proj\.", "attention_pool.value."),
    (r"^unet_attnpool\.c_proj\.", "attention_pool.projection."),
]


# official weights that have no place in our models, and why
KNOWN_EXTRAS = {
    r"^(encoder\.)?head\.(weight|bias)$": "the vision tower's CLIP head, which LaVIT does not use",
    r"\.rotary_emb\.inv_freq$": "a constant that the language model computes itself",
    r"\.position_ids$": "a constant that CLIP computes itself",
}

# attention names of diffusers before 0.17
_VAE = [
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
]


def drop_known_extras(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict without what has no place in our models, and why each of those keys is left out."""
    reasons = {}
    for key in state_dict:
        for pattern, reason in KNOWN_EXTRAS.items():
            if re.search(pattern, key):
                reasons[key] = reason
    return {key: tensor for key, tensor in state_dict.items() if key not in reasons}, reasons


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def rename_encoder(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vision tower (no prefix) to `Blip2VisionModel` names; query and value bias become one vector.

    `head.*`, the unused CLIP head, is left out.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        is_pair = {key.replace("v_bias", "q_bias"), key.replace("q_bias", "v_bias")} <= state_dict.keys()
        if key.startswith("head.") or (key.endswith(".attn.v_bias") and is_pair):
            continue
        if key.endswith(".attn.q_bias") and is_pair:
            value_bias = state_dict[key.replace("q_bias", "v_bias")]
            key = key.replace("q_bias", "qkv.bias")
            tensor = torch.cat([tensor, torch.zeros_like(tensor), value_bias])
        renamed[_rename(key, _ENCODER)] = tensor
    return renamed


def rename_tokenizer(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tokenizer (`encoder.*` included where present) to our names; `vit_proj.*` keeps its name."""
    encoder = {
        key.removeprefix("encoder."): tensor for key, tensor in state_dict.items() if key.startswith("encoder.")
    }
    renamed = {f"encoder.{key}": tensor for key, tensor in rename_encoder(encoder).items()}
    for key, tensor in state_dict.items():
        if not key.startswith("encoder."):
            renamed[_rename(key, _TOKENIZER + _BLOCK)] = tensor
    return renamed


def rename_detokenizer(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Either decoder to `LavitDetokenizer` names; the codebook is not in the official file."""
    return {_rename(key, _DETOKENIZER + _BLOCK): tensor for key, tensor in state_dict.items()}


def rename_language_model(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`LlamaForCausalLM` to its place in `LavitForConditionalGeneration`."""
    return {re.sub(r"^model\.", "model.language_model.", key): tensor for key, tensor in state_dict.items()}


def rename_vae(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`AutoencoderKL` of any diffusers release to today's names; 1x1 convolutions become matrices."""
    renamed = {}
    for key, tensor in state_dict.items():
        new_key = _rename(key, _VAE)
        is_matrix = new_key != key and tensor.ndim == 4
        renamed[new_key] = tensor[:, :, 0, 0] if is_matrix else tensor
    return renamed


def rename_safety_checker(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`StableDiffusionSafetyChecker` to the names that transformers 5 gives CLIP's vision model."""
    return {key.replace("vision_model.vision_model.", "vision_model."): t for key, t in state_dict.items()}


def is_visual(key: str) -> bool:
    """Whether a name (`encoder.` in front of the vision tower's) is one of the whole official visual tokenizer."""
    if key.startswith("encoder."):
        return _rename(key.removeprefix("encoder."), _ENCODER).startswith(("embeddings.", "encoder.", "post_"))
    return key.startswith("vit_proj.") or _rename(key, _TOKENIZER) != key


def official_name(key: str) -> str:
    """The official name of a weight of `LavitForConditionalGeneration`, for messages."""
    if key.startswith("model.visual_tokenizer.encoder."):
        name = _undo(key.removeprefix("model.visual_tokenizer.encoder."), _ENCODER)
        return name.replace(".attn.qkv.bias", ".attn.q_bias and v_bias")
    if key.startswith("model.understanding.projection."):
        return key.replace("model.understanding.projection.", "vit_proj.")
    for prefix in ("model.visual_tokenizer.", "model.understanding."):
        if key.startswith(prefix):
            return _undo(key.removeprefix(prefix), _TOKENIZER + _BLOCK)
    return key.replace("model.language_model.", "model.")


def _undo(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in reversed(rules):
        # of two official names, the visual tokenizer's stands first
        original = re.sub(r"\((\w+)\|\w+\)", r"\1", pattern).replace("\\.", ".").strip("^$")
        if key.startswith(replacement) if pattern.startswith("^") else replacement in key:
            key = key.replace(replacement, original, 1)
    return key
