"""Either stage of a pipeline without the other's components."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from tiny import an_image, codes, latents_of, seeded, tiny_pipeline

from modeling_lavit import LavitPipeline
from modeling_lavit.publishing.verify import verify


WITHOUT_MODEL = {"processor": None, "model": None}
WITHOUT_DECODER = {"detokenizer": None, "unet": None, "vae": None, "scheduler": None}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["built", "loaded", "loaded by diffusers"])
def decoder(pipe, saved, request):
    if request.param == "built":
        return LavitPipeline(**pipe.components | WITHOUT_MODEL)
    load = LavitPipeline if request.param == "loaded" else DiffusionPipeline
    return load.from_pretrained(saved, **WITHOUT_MODEL)


def test_visual_tokens_are_decoded_without_a_language_model(pipe, decoder):
    assert decoder.model is None and decoder.processor is None
    tokens = codes(5, 12)
    expected = latents_of(pipe, visual_tokens=tokens, generator=seeded(0))
    assert torch.equal(latents_of(decoder, visual_tokens=tokens, generator=seeded(0)), expected)
    rows = [row.tolist() for row in tokens.split()]
    assert torch.equal(latents_of(decoder, visual_tokens=rows, generator=seeded(0)), expected)
    assert decoder.defaults.num_inference_steps == pipe.defaults.num_inference_steps


def test_a_decoder_says_that_it_takes_no_prompts(decoder):
    message = "needs processor and model, which this pipeline was made without: it decodes visual_tokens alone"
    for draw in (decoder, decoder.generate_visual_tokens, decoder.reconstruct):
        with pytest.raises(ValueError, match=message):
            draw(an_image())


def test_visual_tokens_are_written_without_a_decoder(pipe, saved):
    writer = LavitPipeline.from_pretrained(saved, **WITHOUT_DECODER)
    tokens = writer.generate_visual_tokens("a red apple", generator=seeded(0), max_image_tokens=9)
    expected = pipe.generate_visual_tokens("a red apple", generator=seeded(0), max_image_tokens=9)
    assert torch.equal(tokens.codes, expected.codes)
    with pytest.raises(ValueError, match="needs detokenizer and unet and scheduler, .* it makes visual tokens alone"):
        writer("a red apple")


def test_a_decoder_is_saved_as_a_repository_of_its_own(decoder, tmp_path):
    tokens = codes(5, 12)
    decoder.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"config.json", "model.safetensors", "tokenizer.json", "handler.py", "space"}
    assert json.loads((tmp_path / "model_index.json").read_text())["model"] == [None, None]
    again = LavitPipeline.from_pretrained(tmp_path)
    expected = latents_of(decoder, visual_tokens=tokens, generator=seeded(0))
    assert torch.equal(latents_of(again, visual_tokens=tokens, generator=seeded(0)), expected)
    card = ModelCard((tmp_path / "README.md").read_text())
    assert "pixel decoder" in card.text and "visual_tokens=[codes]" in card.text and "AutoModelFor" not in card.text
    assert verify(tmp_path).is_ours


def test_a_writer_of_visual_tokens_is_saved_as_a_model_that_reads(saved, tmp_path):
    LavitPipeline.from_pretrained(saved, **WITHOUT_DECODER).save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert ModelCard((tmp_path / "README.md").read_text()).data.pipeline_tag == "image-text-to-text"
    assert LavitPipeline.from_pretrained(tmp_path).generate_visual_tokens("a red apple").codes.numel()
