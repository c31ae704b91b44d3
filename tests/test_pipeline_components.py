"""The components of a LavitPipeline: dtypes, adapters, slicing, tiling, offload, other kinds of autoencoder."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from packaging.version import Version
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import (
    an_image,
    codes,
    latents_of,
    seeded,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
)
from transformers import CLIPConfig, CLIPImageProcessorPil

from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


@pytest.fixture(scope="module", params=["highres", "lowres"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def highres():
    return tiny_pipeline()


def test_a_half_precision_vae_that_overflows_is_decoded_in_full_precision_and_stays_as_it_is():
    pipe = tiny_pipeline()
    latents = torch.randn(1, 4, 8, 8, generator=seeded(0))
    wanted = pipe.vae.half().float().decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    got = pipe.decode_latents(latents)
    assert got.dtype == torch.float32 and pipe.vae.dtype == torch.float16
    torch.testing.assert_close(got, wanted)


def test_every_component_may_have_its_own_dtype():
    pipe = tiny_pipeline()
    reference = latents_of(pipe, visual_tokens=codes(5), generator=seeded(0))
    pipe.unet.to(torch.bfloat16)
    pipe.detokenizer.to(torch.bfloat16)
    out = pipe(visual_tokens=codes(5), generator=seeded(0), output_type="latent")
    assert out.images.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(out.images.float().flatten(), reference.flatten(), dim=0) > 0.95
    assert len(pipe("a cat").images) == 1


def test_lora_on_the_unet_loads_and_scales(tmp_path):
    pipe = tiny_pipeline()
    plain = latents_of(pipe, visual_tokens=codes(5), generator=seeded(0))
    trained = tiny_unet()
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(trained))
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    adapted = latents_of(pipe, visual_tokens=codes(5), generator=seeded(0))
    off = latents_of(pipe, visual_tokens=codes(5), generator=seeded(0), cross_attention_kwargs={"scale": 0.0})
    assert not torch.allclose(adapted, plain)
    torch.testing.assert_close(off, plain)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe, visual_tokens=codes(5), generator=seeded(0)), plain)


def test_adapters_of_the_unet_are_weighted_fused_and_unfused():
    pipe = tiny_pipeline()

    def draw(**kwargs):
        return latents_of(pipe, visual_tokens=codes(5), generator=seeded(0), **kwargs)

    plain = draw()
    for name in ("style", "colour"):
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name=name)
    pipe.set_adapters(["style", "colour"], [0.3, 0.6])
    assert pipe.get_list_adapters() == {"unet": ["style", "colour"]}
    both = draw()
    pipe.set_adapters("style", 0.3)
    style = draw()
    assert not torch.allclose(style, plain) and not torch.allclose(style, both)
    pipe.fuse_lora(adapter_names=["style"])
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(draw(), style, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(), style, atol=1e-4, rtol=1e-4)
    pipe.disable_lora()
    torch.testing.assert_close(draw(), plain, atol=1e-4, rtol=1e-4)
    pipe.delete_adapters(["style", "colour"])
    torch.testing.assert_close(draw(), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("patches", [False, True])
def test_slicing_and_tiling_of_the_vae_are_switched_on_the_pipeline(patches):
    parts = {}
    if patches:
        vae = LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1))
        torch.nn.init.orthogonal_(vae.components)
        vae.tile_latent_min_size = 5
        parts = {"vae": vae, "unet": tiny_unet(channels=12), "scheduler": tiny_scheduler("sample")}
    pipe = tiny_pipeline(**parts)

    def draw():
        settings = {"num_inference_steps": 1, "height": 32, "width": 24, "output_type": "pt"}
        return pipe(visual_tokens=codes(3, 4), generator=seeded(0), **settings).images

    whole = draw()
    pipe.enable_vae_slicing()
    sliced = draw()
    torch.testing.assert_close(sliced, whole)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    tiled = draw()
    assert tiled.shape == whole.shape
    if patches:  # patches are independent of each other
        torch.testing.assert_close(tiled, whole)
        images = torch.randn(2, 3, 32, 24, generator=seeded(1))
        encoded = pipe.vae.encode(images).latent_dist.mode()
        pipe.disable_vae_tiling()
        torch.testing.assert_close(encoded, pipe.vae.encode(images).latent_dist.mode())
    pipe.disable_vae_tiling()
    assert torch.equal(draw(), whole)


def test_offload_and_slicing_change_no_result(pipe):
    fresh = tiny_pipeline(pipe.detokenizer.config.variant)
    wanted = pipe(["a cat", "dogs"], generator=[seeded(0), seeded(1)], output_type="pt").images
    fresh.vae.enable_slicing()
    fresh.enable_attention_slicing()
    fresh.enable_model_cpu_offload(device="cpu")
    got = fresh(["a cat", "dogs"], generator=[seeded(0), seeded(1)], output_type="pt").images
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    again = fresh.reconstruct(an_image(), generator=seeded(0), output_type="pt").images
    torch.testing.assert_close(again, pipe.reconstruct(an_image(), generator=seeded(0), output_type="pt").images)


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available(),
    reason="below 0.42 group offload of diffusers itself needs an accelerator",
)
def test_group_offload_changes_no_result(highres):
    fresh = tiny_pipeline()
    fresh.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    drawn, wanted = (latents_of(each, "a cat", generator=seeded(1)) for each in (fresh, highres))
    torch.testing.assert_close(drawn, wanted)
    again, wanted = (
        each.reconstruct(an_image(), generator=seeded(1), output_type="latent").images for each in (fresh, highres)
    )
    torch.testing.assert_close(again, wanted)


def test_sequential_offload_changes_no_result(pipe):
    """With accelerate's hooks as `enable_sequential_cpu_offload` sets them; that itself refuses the CPU."""
    fresh = tiny_pipeline(pipe.detokenizer.config.variant)
    modules = [component for component in fresh.components.values() if isinstance(component, torch.nn.Module)]
    for module in modules:
        cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)
    assert {weight.device.type for module in modules for weight in module.parameters()} == {"meta"}
    for arguments in ({"prompt": "a cat"}, {"prompt": [an_image(), "in snow"]}):
        drawn, wanted = (latents_of(each, generator=seeded(1), **arguments) for each in (fresh, pipe))
        torch.testing.assert_close(drawn, wanted)


def test_large_images_are_decoded_in_tiles(highres):
    fresh = tiny_pipeline()
    settings = {"visual_tokens": codes(4, 5), "generator": seeded(0), "height": 32, "width": 32}
    whole = fresh(output_type="pt", **settings).images
    fresh.vae.enable_tiling()
    tiled = fresh(output_type="pt", **settings | {"generator": seeded(0)}).images
    latents = fresh(output_type="latent", **settings | {"generator": seeded(0)}).images
    with torch.no_grad():
        wanted = fresh.vae.tiled_decode(latents / fresh.vae.config.scaling_factor).sample
    torch.testing.assert_close(tiled, (wanted / 2 + 0.5).clamp(0, 1))
    assert not torch.allclose(tiled, whole)


def test_drawing_from_text_can_leave_the_encoder_out(highres, tmp_path):
    highres.model.save_pretrained(tmp_path)
    model = type(highres.model).from_pretrained(tmp_path, generation_only=True).eval()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "visual_tokenizer" in name or "understanding" in name]
    pipe = tiny_pipeline(model=model)
    assert torch.equal(
        latents_of(pipe, "a cat", generator=seeded(1)), latents_of(highres, "a cat", generator=seeded(1))
    )
    for reads in (lambda: pipe([an_image(), "in snow"]), lambda: pipe.reconstruct(an_image())):
        with pytest.raises(ValueError, match="generation_only=True"):
            reads()
    with pytest.raises(ValueError, match="all its parts"):
        pipe.save_pretrained(tmp_path / "pipe")


def test_the_patch_autoencoder_serves_as_vae():
    vae = LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1))
    pipe = tiny_pipeline(vae=vae, unet=tiny_unet(channels=12), scheduler=tiny_scheduler("sample"))
    out = pipe("a cat", generator=seeded(0))
    assert out.images[0].size == (16, 16)


def test_flagged_images_come_back_black():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    ).eval()
    extractor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = tiny_pipeline(safety_checker=checker, feature_extractor=extractor)
    checker.concept_embeds_weights.data.fill_(2.0)
    out = pipe(visual_tokens=codes(3, 4), output_type="np")
    assert out.nsfw_content_detected == [False, False] and out.images.any()
    checker.concept_embeds_weights.data.fill_(-2.0)
    out = pipe(visual_tokens=codes(3, 4), output_type="np")
    assert out.nsfw_content_detected == [True, True] and not out.images.any()
    with pytest.raises(ValueError, match="feature_extractor"):
        tiny_pipeline(safety_checker=checker)
