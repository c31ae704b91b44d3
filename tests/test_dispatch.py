"""Weights over several places: no block is split, and what is computed stays the same."""

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from tiny import BOI, EOI, tiny_images, tiny_model

from modeling_lavit import LavitForConditionalGeneration


IDS = torch.tensor([[1, 20, BOI, EOI, 30]])
BLOCKS = ("Blip2EncoderLayer", "LavitLayer", "LlamaDecoderLayer")


@pytest.fixture(scope="module", params=[False, True], ids=["own_merger", "shared_merger"])
def model(request):
    return tiny_model(share_understanding_merger=request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_model_in_memory_and_on_disk_computes_the_same_and_splits_no_block(model, folder, tmp_path, share):
    memory = {"cpu": int(share * compute_module_sizes(model)[""])}
    planned = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in BLOCKS]
    assert len(blocks) > 4
    spread = LavitForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=tmp_path
    )
    for device_map in (planned, spread.hf_device_map):
        assert "disk" in device_map.values()
        assert not [name for name in device_map for block in blocks if name.startswith(f"{block}.")]
    pixels, settings = tiny_images(1), {"max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(spread(IDS, pixel_values=pixels).logits, model(IDS, pixel_values=pixels).logits)
    written = [one.generate(IDS, pixel_values=pixels, **settings) for one in (spread, model)]
    assert torch.equal(*written)
    drawn = [
        one.generate(IDS, pixel_values=pixels, generation_mode="image", do_sample=False) for one in (spread, model)
    ]
    assert torch.equal(*drawn)
