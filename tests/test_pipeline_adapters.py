"""LavitPipeline with what users of diffusers put into a pipeline to draw in fewer or faster steps."""

import pytest
import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from tiny import codes, latents_of, seeded, tiny_pipeline, tiny_unet


def random_adapter(folder) -> None:
    """A LoRA file for the tiny UNet, with weights that change what it draws."""
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for index, (name, weight) in enumerate(unet.named_parameters()):
        if "lora" in name:
            weight.data = torch.randn(weight.shape, generator=seeded(index))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def test_an_lcm_adapter_draws_in_few_steps_without_guidance(tmp_path):
    random_adapter(tmp_path)
    pipe = tiny_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    settings = {"num_inference_steps": 2, "decoder_guidance_scale": 1.0}
    plain = latents_of(pipe, visual_tokens=codes(5, 3), generator=[seeded(0), seeded(1)], **settings)
    pipe.load_lora_weights(tmp_path)
    adapted = latents_of(pipe, visual_tokens=codes(5, 3), generator=[seeded(0), seeded(1)], **settings)
    assert adapted.isfinite().all() and not torch.allclose(adapted, plain)
    pipe.fuse_lora()
    fused = latents_of(pipe, visual_tokens=codes(5, 3), generator=[seeded(0), seeded(1)], **settings)
    torch.testing.assert_close(fused, adapted, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    again = latents_of(pipe, visual_tokens=codes(5, 3), generator=[seeded(0), seeded(1)], **settings)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)


def test_a_unet_that_is_told_the_guidance_scale_runs_one_half():
    config = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel(**config | {"time_cond_proj_dim": 8}).eval()
    pipe = tiny_pipeline(unet=unet)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    rows = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    low, high = (
        latents_of(
            pipe,
            visual_tokens=codes(5),
            generator=seeded(0),
            num_inference_steps=2,
            decoder_guidance_scale=scale,
        )
        for scale in (2.0, 8.0)
    )
    assert rows == [1] * 4
    assert not torch.equal(low, high)


def test_a_tiny_autoencoder_takes_the_place_of_the_vae(tmp_path):
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(**channels, **blocks).eval()
    pipe = tiny_pipeline(vae=vae)
    latents = latents_of(pipe, visual_tokens=codes(5), generator=seeded(0))
    drawn = pipe(visual_tokens=codes(5), generator=seeded(0), output_type="pt").images
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert drawn.shape == (1, 3, 16, 16)
    torch.testing.assert_close(drawn, (decoded / 2 + 0.5).clamp(0, 1))
    pipe.save_pretrained(tmp_path)
    assert type(type(pipe).from_pretrained(tmp_path).vae) is AutoencoderTiny


@pytest.mark.parametrize("change", ["channels_last", "compiled", "compiled in place"])
def test_a_unet_in_another_form_draws_the_same(change, tmp_path):
    pipe = tiny_pipeline()
    expected = latents_of(pipe, visual_tokens=codes(5, 3), generator=[seeded(0), seeded(1)])
    if change == "channels_last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    elif change == "compiled":
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    else:
        pipe.unet.compile(backend="eager", fullgraph=True)
    drawn = latents_of(pipe, visual_tokens=codes(5, 3), generator=[seeded(0), seeded(1)])
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)
