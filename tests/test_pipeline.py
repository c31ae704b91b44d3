"""LavitPipeline on tiny real components: what is drawn."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import SDXLCFGCutoffCallback
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
