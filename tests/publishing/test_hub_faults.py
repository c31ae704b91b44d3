"""Damaged and malicious folders: refused in one line, before anything is built or read from elsewhere."""

import json
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_detokenizer, tiny_model, tiny_processor, tiny_scheduler, tiny_unet
from transformers import AutoModel, AutoModelForCausalLM

from modeling_lavit import LavitForConditionalGeneration, LavitModel, LavitPipeline
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    pipe = LavitPipeline(
        processor=tiny_processor(),
        model=tiny_model(),
        detokenizer=tiny_detokenizer(),
        unet=tiny_unet(channels=12),
        vae=LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1)),
        scheduler=tiny_scheduler("sample"),
    )
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    pipe.save_pretrained(folder, max_shard_size="50kB")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipe"))


def edit(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_part(path: Path, part: str, **values):
    edit(path, **{part: json.loads(path.read_text())[part] | values})


def name_file(index: Path, name):
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {next(iter(weight_map)): name})


CONFIG, INDEX, UNET = "config.json", "model.safetensors.index.json", "unet/config.json"
UNET_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
FAULTS = {
    "a config that is a list": (lambda f: (f / CONFIG).write_text("[1]"), "must hold a JSON object, not list"),
    "a deep config": (lambda f: (f / CONFIG).write_text('{"a":' * 100_000), "nested too deeply"),
    "a config of bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "no valid JSON"),
    "an ill-typed config": (lambda f: edit(f / CONFIG, text_vocab_size="many"), "text_vocab_size"),
    "no map of weights": (lambda f: edit(f / INDEX, weight_map=[1]), "is no index of weights"),
    "a weight without a file": (lambda f: name_file(f / INDEX, 3), "is no index of weights"),
    "weights elsewhere": (lambda f: name_file(f / INDEX, "../../secret.safetensors"), "must lie beside"),
    "weights far away": (lambda f: name_file(f / INDEX, "/etc/passwd"), "must lie beside"),
    "a UNet's weights elsewhere": (
        lambda f: name_file(f / UNET_INDEX, "../x.safetensors"),
        "must lie beside",
    ),
    "an index that is a list": (lambda f: (f / "model_index.json").write_text("[1]"), "must hold a JSON object"),
    "a component elsewhere": (lambda f: edit(f / "model_index.json", **{"../x": ["diffusers", "A"]}), "'../x'"),
    "code elsewhere": (
        lambda f: edit(f / "model_index.json", _class_name=["../x", "A"]),
        "no class of a library",
    ),
    "code far away": (
        lambda f: edit(f / "model_index.json", unet=["/tmp/x", "A"]),
        "no class of a library",
    ),
    "a hundred thousand layers": (
        lambda f: edit_part(f / CONFIG, "text_config", num_hidden_layers=100_000),
        "num_hidden_layers=100000",
    ),
    "a hundred thousand layers of the encoder": (
        lambda f: edit_part(f / CONFIG, "visual_config", num_hidden_layers=100_000),
        "num_hidden_layers=100000",
    ),
    "a width of a billion": (
        lambda f: edit_part(f / CONFIG, "text_config", hidden_size=10**9, head_dim=8),
        "not (326, 1000000000)",
    ),
    "a codebook of a billion": (
        lambda f: edit_part(f / CONFIG, "visual_config", codebook_dim=10**9),
        "not (24, 1000000000)",
    ),
    "a context of a billion patches": (
        lambda f: edit_part(f / CONFIG, "visual_config", image_size=4 * 10**5),
        "position_embedding (1, 17, 32), not (1, 10000000001, 32)",
    ),
    "a detokenizer of a billion": (
        lambda f: edit(f / "detokenizer" / CONFIG, hidden_size=10**9),
        "detokenizer: no model can be built from the configuration",
    ),
    "a UNet of a hundred thousand layers": (
        lambda f: edit(f / UNET, layers_per_block=100_000),
        "layers_per_block=100000",
    ),
    "a UNet of a billion": (lambda f: edit(f / UNET, block_out_channels=[8, 10**9]), "unet"),
}


# (fault, whether diffusers' own class is asked)
CASES = [(fault, False) for fault in FAULTS]
CASES += [(fault, True) for fault in ("a deep config", "code elsewhere", "a UNet of a billion")]


@pytest.mark.parametrize("fault, by_base", CASES)
def test_a_fault_is_one_line_at_once(folder, fault, by_base):
    loader = DiffusionPipeline if by_base else LavitPipeline
    break_it, message = FAULTS[fault]
    break_it(folder)
    start = time.process_time()
    with pytest.raises((ValueError, OSError)) as refused:
        loader.from_pretrained(folder)
    assert message in str(refused.value), refused.value
    assert time.process_time() - start < 3


def test_a_compressed_archive_is_refused(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    for auto_class in (LavitForConditionalGeneration, AutoModelForCausalLM):
        assert torch.equal(auto_class.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="compressed archive"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_and_its_base_model_load_each_others_checkpoints(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is LavitModel
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no weights for lm_head.weight"):
        LavitForConditionalGeneration.from_pretrained(tmp_path / "base")
    again = LavitModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again.understanding.projection.weight, model.model.understanding.projection.weight)


def test_tied_embeddings_are_no_missing_weights(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_other_shapes_are_accepted_on_request_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = torch.ones(4, 4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight \(4, 4\), not \(326, 32\)"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (326, 32)


def test_the_model_reads_only_when_it_is_loaded_to_draw_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert LavitForConditionalGeneration.from_pretrained(tmp_path, generation_only=True).model.visual_tokenizer is None
