"""The language model is lifted out as a stock one, tuned by others, and put back."""

import json
import shutil

import pytest
import torch
from tiny import BOI, an_image, seeded, tiny_pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_lavit import LavitForConditionalGeneration, LavitPipeline
from modeling_lavit.command_line import main
from modeling_lavit.publishing.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_pipeline().save_pretrained(folder)
    an_image().save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def lifted(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifted") / "llama"
    assert main(["lift", str(folder), "--model", str(whole)]) == 0
    return folder


def put_back(lifted, whole, output) -> int:
    image = str(whole / "red.png")
    return main(["put-back", str(lifted), "--model", str(whole), "--image", image, "-o", str(output)])


def test_what_is_lifted_is_a_stock_llama_with_its_tokenizer(whole, lifted):
    llama = AutoModelForCausalLM.from_pretrained(lifted)
    assert type(llama) is LlamaForCausalLM and "auto_map" not in json.loads((lifted / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(lifted)("a red apple[IMG]", return_tensors="pt").input_ids
    assert ids[0, -1] == BOI
    model = LavitForConditionalGeneration.from_pretrained(whole)
    torch.testing.assert_close(llama(ids).logits, model(ids).logits)


def test_a_tuned_one_is_put_back_and_the_new_checkpoint_reads_and_draws(whole, lifted, tmp_path, capsys):
    tuned = AutoModelForCausalLM.from_pretrained(lifted)
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    assert put_back(tmp_path / "tuned", whole, tmp_path / "new") == 0
    assert f"{tmp_path / 'new'}: it says of {whole / 'red.png'}: " in capsys.readouterr().out
    new, old = (LavitPipeline.from_pretrained(folder) for folder in (tmp_path / "new", whole))
    weights = new.model.state_dict()
    changed = [name for name, weight in old.model.state_dict().items() if not torch.equal(weight, weights[name])]
    assert changed == ["model.language_model.layers.0.mlp.down_proj.weight"]
    assert len(new("a red apple", generator=seeded(0)).images) == 1
    assert "custom_pipelines" in json.loads((tmp_path / "new" / "config.json").read_text())
    assert verify(tmp_path / "new").unknown == verify(whole).unknown


def test_one_that_is_put_back_leaves_no_variant_of_the_old_one(whole, lifted, tmp_path):
    shutil.copytree(whole, tmp_path / "whole")
    shutil.copy(whole / "model.safetensors", tmp_path / "whole" / "model.fp16.safetensors")
    assert put_back(lifted, tmp_path / "whole", tmp_path / "new") == 0
    assert not (tmp_path / "new" / "model.fp16.safetensors").exists() and (tmp_path / "new" / "unet").is_dir()


def test_what_fails_halfway_leaves_no_checkpoint(whole, lifted, tmp_path, monkeypatch):
    def full(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr("modeling_lavit.publishing.language_model.refresh_folder", full)
    assert put_back(lifted, whole, tmp_path / "new") == 2
    assert not list(tmp_path.iterdir())


def test_one_that_does_not_fit_is_refused_by_name_and_nothing_is_written(whole, lifted, tmp_path, capfd):
    resized = AutoModelForCausalLM.from_pretrained(lifted)
    resized.resize_token_embeddings(resized.config.vocab_size + 8)
    resized.save_pretrained(tmp_path / "resized")
    deeper = LlamaForCausalLM(type(resized.config)(**resized.config.to_dict() | {"num_hidden_layers": 3}))
    deeper.save_pretrained(tmp_path / "deeper")
    broken = AutoModelForCausalLM.from_pretrained(lifted)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    refused = {"resized": "it must keep its sizes", "deeper": "layers.2", "broken": "damaged"}
    for name, message in refused.items():
        assert put_back(tmp_path / name, whole, tmp_path / "new") == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
    assert put_back(lifted, whole, tmp_path / "resized") == 2
    assert "exists already" in capfd.readouterr().err
