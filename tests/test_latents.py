"""What an autoencoder's config says of its latents counts, as in diffusers' own pipelines."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny import STEPS, codes, seeded, tiny_pipeline, tiny_vae

from modeling_lavit.pixels_lavit import scale_latents, unscale_latents


MEAN_AND_STD = {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [0.5, 2.0, 1.5, 1.0]}
CONFIGS = {"scale": {}, "mean and deviation": MEAN_AND_STD, "shift": {"shift_factor": 0.7}}


def pipeline_of(settings: dict):
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.4, force_upcast=False, **settings)
    return tiny_pipeline(vae=vae)


@pytest.mark.parametrize("settings", [{}, MEAN_AND_STD], ids=["scale", "mean and deviation"])
def test_images_are_those_of_the_pipeline_of_stable_diffusion_xl(settings):
    pipe, tokens, latents = pipeline_of(settings), codes(4), torch.randn(1, 4, 8, 8, generator=seeded(0))
    scale = {"num_inference_steps": STEPS, "output_type": "pt", "latents": latents}
    drawn = pipe(visual_tokens=tokens, decoder_guidance_scale=3.0, **scale).images
    stock = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        add_watermarker=False,
    )
    stock.set_progress_bar_config(disable=True)
    conditions, _ = pipe.encode_visual_tokens(tokens)
    expected = stock(**conditions, guidance_scale=3.0, height=16, width=16, **scale).images
    torch.testing.assert_close(drawn, expected)


def test_a_shift_is_added_as_in_stable_diffusion_3():
    """Its pipeline decodes `latents / scaling_factor + shift_factor`."""
    pipe, latents = pipeline_of(CONFIGS["shift"]), torch.randn(1, 4, 8, 8, generator=seeded(0))
    expected = pipe.vae.decode(latents / 0.4 + 0.7).sample
    torch.testing.assert_close(pipe.decode_latents(latents), expected)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_what_is_encoded_for_training_is_decoded_again(settings):
    vae, latents = pipeline_of(settings).vae, torch.randn(2, 4, 8, 8, generator=seeded(0))
    scaled = scale_latents(latents, vae.config)
    assert not torch.equal(scaled, latents)
    torch.testing.assert_close(unscale_latents(scaled, vae.config), latents)
