"""What formats change is measured, saved formats load by themselves, and the card says what was measured."""

import json

import pytest
import torch
from tiny import an_image, seeded, tiny_pipeline

from modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.command_line import main
from modeling_lavit.evaluation.formats import changed_codes, load_in_format
from modeling_lavit.publishing.card import model_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_patches_count_that_either_keeps():
    codes, others = torch.tensor([[3, -1, 5, -1]]), torch.tensor([[3, -1, 6, 2]])
    assert changed_codes(codes, codes) == 0 and changed_codes(codes, others) == pytest.approx(2 / 3)


def test_the_command_writes_what_the_card_says(folder, tmp_path):
    images, output = tmp_path / "images", folder / "evaluation" / "formats"
    images.mkdir()
    for colour in ("red", "green", "white"):
        an_image(colour).save(images / f"{colour}.png")
    arguments = ["--images", str(images), "--model", str(folder), "--output", str(output), "--formats", "bfloat16"]
    assert main(["evaluate", "formats", *arguments]) == 0
    rows = json.loads((output / "results.json").read_text())["formats"]
    assert rows["float32"]["codes_changed"] == rows["float32"]["captions_changed"] == 0
    assert rows["bfloat16"]["bytes"] < 0.6 * rows["float32"]["bytes"]
    assert "| bfloat16 |" in model_card(folder) and "on 3 images" in model_card(folder)
    assert f"{100 * rows['bfloat16']['codes_changed']:.2f} %" in model_card(folder)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_weights_load_by_from_pretrained_alone(folder, tmp_path, name):
    pytest.importorskip("torchao.quantization")
    # int4 has groups of 32 weights, wider than some layers of the tiny model
    model = load_in_format(str(folder if name == "int8" else LAVIT_EMOJI), name, "cpu")
    model.save_pretrained(tmp_path)
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path)
    weights = [one.model.language_model.layers[0].mlp.up_proj.weight for one in (model, loaded)]
    assert type(weights[0]) is type(weights[1]) is not torch.nn.Parameter
    size = model.config.visual_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=seeded(0), dtype=torch.bfloat16)
    assert torch.equal(loaded.get_image_tokens(pixels).codes, model.get_image_tokens(pixels).codes)
    card = model_card(tmp_path, base_model="me/whole")
    assert "base_model_relation: quantized" in card
