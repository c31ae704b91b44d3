"""What LavitPipeline uses where a call does not say follows its components."""

import json

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler
from tiny import an_image, codes, latents_of, seeded, tiny_pipeline

from modeling_lavit import (
    LavitDetokenizer,
    LavitForConditionalGeneration,
    LavitPatchAutoencoder,
    LavitPipeline,
    LavitProcessor,
    LavitUNet2DConditionModel,
)


SETTINGS = {
    "default_num_inference_steps": 2,
    "default_decoder_guidance_scale": 3.0,
    "default_guidance_scale": 2.0,
    "default_multimodal_guidance_scale": 1.5,
    "default_top_k": 7,
    "default_temperature": 0.6,
    "aspect_ratios": {"1:1": (16, 16), "1:2": (16, 32)},
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**SETTINGS)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def draws_the_same(pipe, other) -> bool:
    other.set_progress_bar_config(disable=True)
    assert pipe.defaults == other.defaults
    prompts = ("a red apple", [an_image(), "in snow"])
    drawn = [[latents_of(each, prompt, generator=seeded(0)) for prompt in prompts] for each in (pipe, other)]
    return all(torch.equal(*pair) for pair in zip(*drawn, strict=True))


def test_a_pipeline_of_the_components_draws_the_same(pipe):
    assert draws_the_same(pipe, LavitPipeline(**pipe.components))


def test_from_pipe_draws_the_same(pipe):
    assert draws_the_same(pipe, LavitPipeline.from_pipe(pipe))


def test_from_pipe_takes_components_of_any_class():
    vae = LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1))
    unet = LavitUNet2DConditionModel.from_config(
        dict(tiny_pipeline().unet.config) | {"in_channels": 12, "out_channels": 12}
    )
    pipe = tiny_pipeline(vae=vae, unet=unet.eval())
    other = LavitPipeline.from_pipe(pipe)
    assert other.vae is vae and other.unet is unet
    scheduler = DDIMScheduler()
    assert LavitPipeline.from_pipe(pipe, scheduler=scheduler).scheduler is scheduler


def test_a_saved_pipeline_draws_the_same(pipe, folder):
    assert draws_the_same(pipe, LavitPipeline.from_pretrained(folder))
    assert "default_top_k" not in json.loads((folder / "model_index.json").read_text())


def test_components_loaded_one_by_one_draw_the_same(pipe, folder):
    loaded = LavitPipeline(
        processor=LavitProcessor.from_pretrained(folder),
        model=LavitForConditionalGeneration.from_pretrained(folder),
        detokenizer=LavitDetokenizer.from_pretrained(folder / "detokenizer"),
        unet=type(pipe.unet).from_pretrained(folder / "unet"),
        vae=type(pipe.vae).from_pretrained(folder / "vae"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
    )
    assert draws_the_same(pipe, loaded)


def test_the_auto_pipeline_draws_the_same(pipe, folder):
    loaded = AutoPipelineForText2Image.from_pretrained(folder)
    assert type(loaded) is LavitPipeline and draws_the_same(pipe, loaded)
    assert draws_the_same(pipe, AutoPipelineForText2Image.from_pipe(pipe))


def test_settings_in_the_model_index_of_an_earlier_version_are_read(pipe, folder, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | SETTINGS))
    loaded = LavitPipeline.from_pretrained(tmp_path)
    assert draws_the_same(pipe, loaded)
    assert draws_the_same(pipe, LavitPipeline(**loaded.components))


def test_a_setting_changed_in_a_component_is_used_at_once():
    pipe = tiny_pipeline()
    pipe.detokenizer.config.default_num_inference_steps = 5
    pipe.model.generation_config.generation_presets = {"image": {"max_image_tokens": 4}}
    assert pipe("a cat", output_type="latent").visual_tokens.lengths.max() <= 4
    assert pipe.num_timesteps == 5


def test_pipelines_of_different_components_keep_their_own_settings(pipe):
    assert tiny_pipeline(default_top_k=3).model.generation_config.generation_presets["image"]["top_k"] == 3
    assert pipe.model.generation_config.generation_presets["image"]["top_k"] == 7


def test_without_a_vae_it_draws_the_same_latents_and_nothing_else(pipe, folder, tmp_path):
    loaded = LavitPipeline.from_pretrained(folder, vae=None)
    assert loaded.vae is None and draws_the_same(pipe, loaded)
    with pytest.raises(ValueError, match='has no vae: it gives output_type="latent" alone'):
        loaded(visual_tokens=codes(3))
    loaded.save_pretrained(tmp_path)
    assert draws_the_same(pipe, LavitPipeline.from_pretrained(tmp_path))
