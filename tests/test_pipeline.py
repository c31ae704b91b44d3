"""LavitPipeline and the transformers tasks, on tiny real components."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from packaging.version import Version
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import (
    CODEBOOK_SIZE,
    NUM_PATCHES,
    STEPS,
    an_image,
    codes,
    latents_of,
    seeded,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
)
from transformers import CLIPConfig, CLIPImageProcessorPil, pipeline

from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


@pytest.fixture(scope="module", params=["highres", "lowres"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def highres():
    return tiny_pipeline()


def test_a_seed_fixes_the_image_and_leaves_the_global_generator_alone(pipe):
    state = torch.random.get_rng_state()
    first, second, other = (latents_of(pipe, "a red apple", generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_image_of_a_batch_equals_the_image_drawn_alone_with_its_generator(pipe):
    prompts = ["a red apple on the table", "two cats"]
    settings = {"output_type": "latent", "max_image_tokens": 9}
    batch = pipe(prompts, num_images_per_prompt=2, generator=[seeded(s) for s in range(4)], **settings)
    for i, tokens in enumerate(batch.visual_tokens.split()):
        alone = pipe(prompts[i // 2], generator=seeded(i), **settings)
        assert torch.equal(alone.visual_tokens.codes, tokens)
        torch.testing.assert_close(alone.images, batch.images[i : i + 1], atol=1e-4, rtol=1e-4)


def test_the_images_of_one_prompt_are_distinct_draws(pipe):
    tokens = pipe.generate_visual_tokens("a red apple", num_images_per_prompt=3, generator=seeded(0))
    assert len({tuple(row.tolist()) for row in tokens.split()}) == 3


def test_the_two_stages_apart_equal_the_whole(pipe):
    whole = pipe("two blue cats", generator=seeded(3), output_type="latent")
    generator = seeded(3)
    tokens = pipe.generate_visual_tokens("two blue cats", generator=generator)
    assert torch.equal(tokens.codes, whole.visual_tokens.codes)
    apart = latents_of(pipe, visual_tokens=tokens, generator=generator)
    assert torch.equal(apart, whole.images)


def test_visual_tokens_may_be_a_list_and_be_decoded_more_than_once(pipe):
    tokens = codes(3, 7)
    from_list = latents_of(pipe, visual_tokens=list(tokens.split()), generator=[seeded(0), seeded(1)])
    torch.testing.assert_close(from_list, latents_of(pipe, visual_tokens=tokens, generator=[seeded(0), seeded(1)]))
    four = latents_of(pipe, visual_tokens=tokens, num_images_per_prompt=2, generator=[seeded(s) for s in (0, 9, 8, 1)])
    torch.testing.assert_close(four[[0, 3]], from_list, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(four[0], four[1])


def test_a_multimodal_prompt_depends_on_its_image_and_its_text(highres):
    def drawn(prompt):
        return highres.generate_visual_tokens(prompt, generator=seeded(0)).codes.tolist()

    reference = drawn([an_image("red"), "in snow"])
    assert reference == drawn([an_image("red"), "in snow"])
    assert reference != drawn([an_image("green"), "in snow"])
    assert reference != drawn([an_image("red"), "dogs"])
    assert reference != drawn(["in snow", an_image("red")])


def test_a_batch_of_multimodal_prompts_equals_its_prompts_one_by_one(highres):
    prompts = [[an_image(), "in snow"], ["cats and", an_image("green"), an_image("white")], ["a red apple"]]
    batch = highres.generate_visual_tokens(prompts, generator=[seeded(s) for s in range(3)])
    for i, row in enumerate(batch.split()):
        assert torch.equal(row, highres.generate_visual_tokens(prompts[i : i + 1], generator=seeded(i)).codes)


def test_reference_compat_reaches_the_processor_and_the_language_model(highres):
    prompt = [an_image(), "a red apple on the table is it big"]
    got = highres.generate_visual_tokens(prompt, generator=seeded(0), reference_compat=True)
    inputs = highres.processor(
        images=[prompt[0]], text="<image>" + prompt[1], generation_mode="image", reference_compat=True
    )
    ids = highres.model.generate(
        **inputs, generation_mode="image", guidance_scale=5.0, generator=seeded(0), reference_compat=True
    )
    assert torch.equal(got.codes, highres.model.decode_image_tokens(ids)[0])
    assert not torch.equal(got.codes, highres.generate_visual_tokens(prompt, generator=seeded(0)).codes)


def test_an_image_alone_is_a_prompt(highres):
    assert len(highres(an_image(), generator=seeded(0)).images) == 1


def test_reconstruct_decodes_the_tokens_of_the_image(pipe):
    out = pipe.reconstruct([an_image(), an_image("green")], generator=[seeded(0), seeded(1)], output_type="latent")
    pixels = pipe.processor.image_processor([an_image(), an_image("green")], return_tensors="pt").pixel_values
    tokens = pipe.model.model.visual_tokenizer.tokenize(pixels)
    assert torch.equal(out.visual_tokens.codes, tokens.codes)
    assert torch.equal(out.images, latents_of(pipe, visual_tokens=tokens, generator=[seeded(0), seeded(1)]))
    fewer = pipe.reconstruct(an_image(), keep_ratio=0.25, output_type="latent").visual_tokens
    assert fewer.lengths.tolist() == [NUM_PATCHES // 4]


@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0, 1)), (3.0, (0, 1)), (3.0, (1 / 3, 2 / 3))])
@torch.no_grad()
def test_the_denoising_is_ddim_with_guidance_on_the_conditions_of_the_detokenizer(pipe, scale, interval):
    tokens, lowres = codes(5, 12), pipe.detokenizer.config.variant == "lowres"
    noise = torch.randn(2, 4, 8, 8, generator=seeded(0))
    got = latents_of(
        pipe,
        visual_tokens=tokens,
        latents=noise,
        decoder_guidance_scale=scale,
        decoder_guidance_interval=interval,
    )

    cond, uncond = pipe.detokenizer(tokens.codes, tokens.lengths), pipe.detokenizer.unconditional(2)
    if lowres:
        learnt = pipe.detokenizer.config.num_unconditional_tokens
        assert uncond.attention_mask.sum(1).tolist() == [learnt, learnt]

    def predict(sample, step, conditions, rows):
        extra = {}
        if lowres:
            # what the mask hides must not matter: leave those rows out instead of masking them
            conditions = conditions.prompt_embeds[:, :rows]
        else:
            times = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
            extra["added_cond_kwargs"] = {"text_embeds": conditions.pooled_prompt_embeds, "time_ids": times}
            conditions = conditions.prompt_embeds
        return pipe.unet(sample, step, conditions, **extra).sample

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    sample = noise
    for index, step in enumerate(scheduler.timesteps):
        weight = scale if interval[0] <= index / STEPS < interval[1] else 1.0
        noise_cond = predict(sample, step, cond, NUM_PATCHES)
        noise_uncond = predict(sample, step, uncond, pipe.detokenizer.config.num_unconditional_tokens)
        sample = scheduler.step(noise_uncond + weight * (noise_cond - noise_uncond), step, sample).prev_sample
    torch.testing.assert_close(got, sample, atol=2e-4, rtol=2e-4)


def test_guidance_rescale_and_the_guidance_of_the_language_model_take_effect(highres):
    plain = latents_of(highres, visual_tokens=codes(6), generator=seeded(0))
    rescaled = latents_of(highres, visual_tokens=codes(6), generator=seeded(0), guidance_rescale=0.7)
    assert not torch.allclose(plain, rescaled)
    strong = highres.generate_visual_tokens("a red apple", generator=seeded(0), guidance_scale=9.0)
    assert strong.codes.tolist() != highres.generate_visual_tokens("a red apple", generator=seeded(0)).codes.tolist()


def test_steps_outside_the_guidance_interval_cost_half(pipe):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    latents_of(pipe, visual_tokens=codes(5), num_inference_steps=4, decoder_guidance_interval=(0.25, 0.75))
    hook.remove()
    assert rows == [1, 2, 2, 1]


def test_step_callbacks_see_and_change_the_latents_and_can_stop(pipe):
    seen = []

    def watch(loop, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        loop._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = latents_of(
        pipe,
        visual_tokens=codes(4),
        num_inference_steps=5,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] > seen[1][1]
    assert seen[0][2] == ["latents", "prompt_embeds"]
    assert not result.any()


def test_step_callbacks_may_be_those_of_diffusers_or_return_nothing(pipe):
    seen = []

    def watch(loop, step, timestep, tensors):
        seen.append((step, loop.guidance_scale))

    plain = latents_of(pipe, visual_tokens=codes(4), generator=seeded(0), callback_on_step_end=watch)
    assert seen == [(0, 7.0), (1, 7.0), (2, 7.0)]
    cut = latents_of(
        pipe,
        visual_tokens=codes(4),
        generator=seeded(0),
        decoder_guidance_interval=(0.5, 1),
        callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    )
    guided_in_the_middle = latents_of(
        pipe, visual_tokens=codes(4), generator=seeded(0), decoder_guidance_interval=(0.5, 0.67)
    )
    torch.testing.assert_close(cut, guided_in_the_middle, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cut, plain)


def test_the_token_callback_gets_every_id_of_every_image(highres):
    steps = []
    tokens = highres.generate_visual_tokens(
        ["a cat", "two dogs"],
        generator=[seeded(0), seeded(1)],
        callback_on_token=lambda step, ids: steps.append((step, ids)),
        max_image_tokens=7,
    )
    assert [step for step, _ in steps] == list(range(len(steps)))
    ids = torch.stack([ids for _, ids in steps], dim=1) - highres.model.config.vocabulary.visual_offset
    for row, wanted in zip(ids, tokens.split(), strict=True):
        assert torch.equal(row[: len(wanted)], wanted)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, UniPCMultistepScheduler])
def test_any_scheduler_of_stable_diffusion_can_be_set(scheduler):
    pipe = tiny_pipeline(scheduler=scheduler.from_config(tiny_scheduler().config))
    batch = latents_of(pipe, visual_tokens=codes(4, 6), generator=[seeded(0), seeded(1)])
    alone = latents_of(pipe, visual_tokens=[codes(4, 6).split()[1]], generator=seeded(1))
    assert torch.isfinite(batch).all()
    torch.testing.assert_close(batch[1:], alone, atol=1e-3, rtol=1e-3)


def test_output_types(highres):
    def draw(kind):
        return highres(visual_tokens=codes(3, 4), generator=[seeded(0), seeded(1)], output_type=kind).images

    pil, array, tensor, latents = (draw(kind) for kind in ("pil", "np", "pt", "latent"))
    assert [image.size for image in pil] == [(16, 16), (16, 16)]
    assert array.shape == (2, 16, 16, 3) and tensor.shape == (2, 3, 16, 16) and latents.shape == (2, 4, 8, 8)
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert array.min() >= 0 and array.max() <= 1
    np.testing.assert_allclose(np.asarray(pil[1]) / 255, array[1], atol=1 / 500)


def test_without_a_dictionary_a_tuple_comes_back(highres):
    images, tokens, flags = highres(visual_tokens=codes(3), return_dict=False)
    assert len(images) == 1 and tokens.lengths.tolist() == [3] and flags is None


def test_height_and_width_in_pixels_and_listed_aspect_ratios():
    pipe = tiny_pipeline(aspect_ratios={"1:1": (16, 16), "1:2": (16, 32)})
    assert latents_of(pipe, visual_tokens=codes(3), height=24, width=16).shape[2:] == (12, 8)
    assert latents_of(pipe, visual_tokens=codes(3), aspect_ratio="1:2").shape[2:] == (8, 16)


def test_a_decoder_of_the_official_size_offers_the_official_aspect_ratios(highres):
    unet = tiny_unet()
    unet.register_to_config(sample_size=512)
    assert tiny_pipeline(unet=unet).defaults.aspect_ratios == {
        "1:1": (1024, 1024),
        "4:3": (896, 1152),
        "3:2": (832, 1216),
        "16:9": (768, 1344),
        "2:3": (1216, 832),
        "3:4": (1152, 896),
    }
    assert highres.defaults.aspect_ratios == {"1:1": (16, 16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either prompt or visual_tokens"),
        ({"prompt": "a", "visual_tokens": codes(3)}, "not both"),
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": ["a", "  "]}, "prompt 1 is empty"),
        ({"prompt": []}, "non-empty list"),
        ({"prompt": 3}, "must be a string, an image"),
        ({"prompt": ["a", 3]}, "prompt 0 holds int"),
        ({"prompt": [["a"], "b"]}, "prompt 0 holds list"),
        ({"prompt": "a", "aspect_ratio": "16:9"}, r"must be one of \['1:1'\], got '16:9'"),
        ({"prompt": "a", "aspect_ratio": "1:1", "height": 16}, "either aspect_ratio or height and width"),
        ({"prompt": "a", "decoder_guidance_interval": (0.5, 0.2)}, "0 <= start < stop <= 1"),
        ({"prompt": "a", "height": 13}, "height must be a positive multiple of 8, got 13"),
        ({"prompt": ["a", "b"], "generator": [seeded(0)]}, "2 images are drawn, but 1 generators"),
        ({"visual_tokens": codes(3), "generator": [seeded(0)] * 2}, "1 images are drawn, but 2 generators"),
        ({"visual_tokens": codes(3, NUM_PATCHES + 1)}, "17 codes"),
        ({"visual_tokens": [torch.tensor([CODEBOOK_SIZE])]}, "codes must be in"),
        ({"visual_tokens": []}, "a 1-D tensor of codes"),
        ({"visual_tokens": codes(3), "top_k": 3}, "top_k"),
        ({"prompt": "a", "max_image_tokens": NUM_PATCHES + 1}, "takes 16 visual tokens at most"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs"),
        ({"prompt": "a", "num_interference_steps": 3}, "num_interference_steps"),
        ({"prompt": "a cat " * 200}, "context"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_wrong(highres, arguments, message):
    with pytest.raises(ValueError, match=message):
        highres(**arguments)


def test_defaults_are_properties_of_the_checkpoint():
    steps = []
    pipe = tiny_pipeline(default_num_inference_steps=2, default_decoder_guidance_scale=1.0, default_guidance_scale=1.0)

    def watch(loop, step, timestep, tensors):
        steps.append(loop.guidance_scale)
        return {}

    tokens = pipe("a cat", generator=seeded(0), callback_on_step_end=watch).visual_tokens
    assert steps == [1.0, 1.0]
    given = tiny_pipeline().generate_visual_tokens("a cat", generator=seeded(0), guidance_scale=1.0)
    assert torch.equal(tokens.codes, given.codes)


def test_a_call_changes_no_component():
    pipe = tiny_pipeline()
    before = {
        name: (dict(vars(part)), copy.deepcopy(part.state_dict()))
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    scheduler_config = dict(pipe.scheduler.config)
    pipe([an_image(), "a cat"])
    for name, (attributes, weights) in before.items():
        part = getattr(pipe, name)
        assert vars(part).keys() == attributes.keys()
        assert all(torch.equal(value, weights[key]) for key, value in part.state_dict().items())
        assert all(value.dtype == weights[key].dtype for key, value in part.state_dict().items())
        assert not part._forward_pre_hooks and not part._forward_hooks
    assert dict(pipe.scheduler.config) == scheduler_config


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


@pytest.fixture(scope="module")
def folder(highres, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    highres.save_pretrained(folder)
    return folder


def test_the_text_to_image_task_returns_images_as_they_were_asked_for(folder, highres):
    draw = pipeline("text-to-image", model=str(folder))
    draw.decoder.set_progress_bar_config(disable=True)
    one = draw("a cat", generator=seeded(0))
    assert np.array_equal(np.asarray(one), np.asarray(highres("a cat", generator=seeded(0)).images[0]))
    assert [image.size for image in draw(["a cat", "dogs"])] == [(16, 16)] * 2
    assert draw([an_image(), "in snow"], num_inference_steps=1).size == (16, 16)
    nested = draw(["a", "b", "c"], num_images_per_prompt=2, num_inference_steps=1)
    assert [len(images) for images in nested] == [2, 2, 2]


def test_the_image_text_to_text_task_reads_images(folder):
    read = pipeline("image-text-to-text", model=str(folder))
    answer = read(images=an_image(), text="<image>question answer", max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_the_any_to_any_task_reads_and_draws(folder, highres, monkeypatch):
    # It asks for torchvision wherever a model takes images, which this package reads without.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args: None)
    task = pipeline("any-to-any", model=str(folder))
    answer = task(images=an_image(), text="<image>question answer", max_new_tokens=4)
    assert isinstance(answer[0]["generated_text"], str)
    task.model.set_pixel_decoder(highres)
    drawn = task(text="a red apple", generation_mode="image")
    assert isinstance(drawn[0]["generated_image"], Image.Image)


def test_of_several_candidates_the_reranker_keeps_one_with_its_visual_tokens(pipe):
    seen = []

    def darkest(images, texts):
        seen.extend(texts)
        return [-float(np.asarray(image).mean()) for image in images]

    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    drawn = pipe(["a cat", "a dog"], num_images_per_prompt=3, generator=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    best = pipe(["a cat", "a dog"], num_candidates=3, reranker=darkest, generator=generators)
    means = np.array([np.asarray(image).mean() for image in drawn.images]).reshape(2, 3)
    kept = [int(row.argmin()) + 3 * i for i, row in enumerate(means)]
    assert seen == ["a cat"] * 3 + ["a dog"] * 3 and len(best.images) == 2
    for i, (image, own_codes) in enumerate(zip(best.images, best.visual_tokens.split(), strict=True)):
        assert np.array_equal(np.asarray(image), np.asarray(drawn.images[kept[i]]))
        assert torch.equal(own_codes, drawn.visual_tokens.split()[kept[i]])


def test_candidates_need_a_reranker_and_the_other_way_round(pipe):
    def nothing(images, texts):
        return [0.0]

    for arguments in ({"num_candidates": 2}, {"reranker": nothing}):
        with pytest.raises(ValueError, match="a reranker chooses among candidates"):
            pipe("a cat", **arguments)
    with pytest.raises(ValueError, match="give a prompt"):
        pipe("a cat", num_candidates=2, reranker=nothing, output_type="latent")
    with pytest.raises(ValueError, match=r"scores of shape \(1,\) for 2 images"):
        pipe("a cat", num_candidates=2, reranker=nothing)
