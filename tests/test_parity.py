"""Every component gives what the reference model gave, on weights and inputs recorded from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_lavit import LavitDetokenizer, LavitDetokenizerConfig, LavitVisualTokenizer, LavitVisualTokenizerConfig
from modeling_lavit.conversion.keys import rename_detokenizer, rename_tokenizer


FIXTURES = Path(__file__).parent / "fixtures" / "parity"
CASES = [
    pytest.param(folder, case, id=f"{folder}-{case['id']}")
    for folder in ("small", "mid")
    for case in json.loads((FIXTURES / folder / "cases.json").read_text())["cases"]
]


def load(folder: str, names: list[str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in names:
        for key, tensor in load_file(FIXTURES / folder / name).items():
            tensors[key] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def sizes(folder: str) -> dict:
    index = json.loads((FIXTURES / folder / "cases.json").read_text())
    return index["config"] | {"mlp_hidden": index["mlp_hidden"], "num_patches": index["num_patches"]}


def build_tokenizer(folder: str, weights: dict[str, torch.Tensor]) -> tuple[LavitVisualTokenizer, dict]:
    """The tokenizer, and what the file holds besides (the projection to the language model)."""
    size = sizes(folder)
    config = LavitVisualTokenizerConfig(
        hidden_size=size["width"],
        intermediate_size=size["mlp_hidden"],
        num_hidden_layers=size["vit_layers"],
        num_attention_heads=size["width"] // size["vit_head_width"],
        image_size=size["img"],
        patch_size=size["patch"],
        merger_num_hidden_layers=size["merger_layers"],
        merger_num_attention_heads=size["heads"],
        codebook_size=size["n_code"],
        codebook_dim=size["code_dim"],
    )
    model = LavitVisualTokenizer(config).eval()
    renamed = rename_tokenizer(weights)
    report = model.load_state_dict(renamed, strict=False)
    assert not [key for key in report.missing_keys if key.split(".")[0] in {key.split(".")[0] for key in renamed}]
    assert set(report.unexpected_keys) <= {"vit_proj.weight", "vit_proj.bias"}
    return model, {key: renamed[key] for key in report.unexpected_keys}


def build_detokenizer(folder: str, variant: str, weights: dict[str, torch.Tensor]) -> LavitDetokenizer:
    size = sizes(folder)
    highres = variant == "highres"
    config = LavitDetokenizerConfig(
        hidden_size=size["width"],
        intermediate_size=size["mlp_hidden"],
        num_hidden_layers=size["dec_layers"],
        num_attention_heads=size["heads"],
        num_queries=size["num_patches"],
        codebook_size=size["n_code"],
        codebook_dim=size["code_dim"],
        feature_size=size["dec_out"],
        variant=variant,
        prompt_embed_dims=[size["hi1"], size["hi2"]] if highres else [size["low_dim"]],
        pooled_embed_dim=size["hi_pool"],
    )
    model = LavitDetokenizer(config).eval()
    state_dict = rename_detokenizer(weights) | {"codebook.weight": weights["quantize.embedding.weight"]}
    known = model.state_dict().keys()
    report = model.load_state_dict({k: v for k, v in state_dict.items() if k in known}, strict=False)
    assert report.missing_keys in ([], ["unconditional_embedding"])
    return model


@pytest.mark.parametrize("folder, case", CASES)
@torch.no_grad()
def test_component_reproduces_the_recorded_outputs_of_the_reference(folder: str, case: dict):
    io = load(folder, case["io"])
    checked = set()

    def check(name: str, got: torch.Tensor):
        checked.add(name)
        if name in case.get("exact", ()):
            assert torch.equal(got, io[name].to(got.dtype)), name
        else:
            torch.testing.assert_close(got, io[name], rtol=case["rtol"], atol=case["atol"])

    kind = case["kind"].removesuffix("_eps")
    weights = load(folder, case["weights"])
    if kind.startswith("decoder"):
        variant = kind.removeprefix("decoder_")
        decoder_keys = load(folder, case["weights"][1:]).keys()
        kept = {k: v for k, v in weights.items() if k in decoder_keys or k == "quantize.embedding.weight"}
        model = build_detokenizer(folder, variant, kept)
        if "query_embed" in io:
            model.query_embedding.copy_(io["query_embed"])
        names = ["".join(name.rpartition(".")[:2]) for name in case["inputs"] if name.endswith("codes")]
        for prefix in names:
            # step by step: an image among them has no codes, which the whole refuses
            output = model.conditions(
                model.decode(*model.pad(io[f"{prefix}codes"].long(), io[f"{prefix}counts"].long()))
            )
            check(f"{prefix}prompt_embeds", output.prompt_embeds)
            if variant == "highres":
                check(f"{prefix}pooled", output.pooled_prompt_embeds)
        assert checked == set(case["outputs"])
        return

    if kind == "encode_features":
        base_files = [name for name in case["weights"] if name == "tokenizer.safetensors"]
        for group, files in (("base", base_files), ("override", case["weights"])):
            if not any(name.startswith(group) for name in case["outputs"]):
                continue
            model, projection = build_tokenizer(folder, load(folder, files))
            for name, noise in (("argmax", None), ("gumbel", io["gumbel_noise"])):
                selection = "argmax" if noise is None else "sample"
                encoded = model.encode(io["pixel_values"], selection=selection, gumbel_noise=noise)
                features = encoded.features @ projection["vit_proj.weight"].T + projection["vit_proj.bias"]
                check(f"{group}.{name}.features", features)
                check(f"{group}.{name}.counts", encoded.lengths)
        assert checked == set(case["outputs"])
        return

    model, _ = build_tokenizer(folder, weights)
    if kind == "eva_vit":
        embedded = model.encoder.embeddings(io["pixel_values"])
        states = model.encoder.encoder(inputs_embeds=embedded).last_hidden_state
        cls_name, patch_name = case["outputs"]
        check(cls_name, states[:, 0].reshape_as(io[cls_name]))
        check(patch_name, model.encode_patches(io["pixel_values"]))
    elif kind == "token_predictor":
        check(case["outputs"][0], model.selector(io[case["inputs"][0]]))
    elif kind == "token_merger":
        features = io[case["inputs"][0]]
        for name in case["inputs"][1:]:
            check(name.replace("mask", "packed"), model.merger(features, io[name]))
    elif kind == "quantizer":
        quantizer = model.quantizer
        projected = quantizer.project(io["merged"])
        check("z", projected)
        check("ids", quantizer(io["merged"]))
        check("z_q", quantizer.codebook(quantizer(io["merged"])))
        check("ids_direct", quantizer.nearest(io["z_direct"]))
        check("z_q_direct", quantizer.codebook(quantizer.nearest(io["z_direct"])))
    elif kind == "tokenize_image":
        text_vocab = sizes(folder)["text_vocab"]
        for name, noise in (("argmax", None), ("gumbel", io["gumbel_noise"])):
            selection = "argmax" if noise is None else "sample"
            tokens = model.tokenize(io["pixel_values"], selection=selection, gumbel_noise=noise)
            check(f"{name}.counts", tokens.lengths)
            check(f"{name}.ids", tokens.codes + text_vocab + 2)
            wrapped = [
                torch.cat([torch.tensor([text_vocab]), codes + text_vocab + 2, torch.tensor([text_vocab + 1])])
                for codes in tokens.split()
            ]
            check(f"{name}.ids_add_special", torch.cat(wrapped))
            check(f"{name}.quantize", model.quantizer.codebook(tokens.codes))
    assert checked == set(case["outputs"])
