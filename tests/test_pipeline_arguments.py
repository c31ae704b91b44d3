"""What LavitPipeline takes and refuses: prompts in every form, generators, settings out of range."""

import io

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from tiny import (
    CODEBOOK_SIZE,
    NUM_PATCHES,
    an_image,
    codes,
    latents_of,
    seeded,
    tiny_detokenizer,
    tiny_pipeline,
    tiny_scheduler,
)
from transformers import StoppingCriteria, pipeline
from transformers.utils import is_torchvision_available

from modeling_lavit.prompts_lavit import split_batch


NAN = float("nan")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def written(pipe, prompt, **kwargs) -> list[list[int]]:
    return [row.tolist() for row in pipe.generate_visual_tokens(prompt, **kwargs).split()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 on, got 0"),
        ({"prompt": "a", "num_inference_steps": -1}, "from 1 on, got -1"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "whole number from 1 on, got 2.5"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1 on, got 0"),
        ({"visual_tokens": codes(3), "num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"prompt": "a", "max_image_tokens": 0}, "max_image_tokens must be a whole number from 1 on, got 0"),
        (
            {"prompt": "a", "guidance_scale": -1},
            "guidance_scale must be a number from 0 on .0 and 1 mean none., got -1",
        ),
        ({"prompt": "a", "guidance_scale": NAN}, "guidance_scale must be a number from 0 on"),
        ({"prompt": "a", "guidance_scale": "4"}, "guidance_scale must be a number from 0 on"),
        ({"prompt": "a", "top_p": 1.5}, "top_p must be a share above 0 and up to 1, which means all, got 1.5"),
        ({"prompt": "a", "top_p": NAN}, "top_p must be a share"),
        ({"prompt": "a", "temperature": 0.0}, "temperature.*strictly positive"),
        ({"prompt": "a", "top_k": -1}, "top_k.*strictly positive"),
        ({"prompt": "a", "repetition_penalty": 0.0}, "penalty.*strictly positive"),
        ({"prompt": "a", "num_beams": 0}, "num_beams must be a whole number from 1 on, got 0"),
        (
            {"prompt": "a", "num_images_per_prompt": -2},
            "num_images_per_prompt must be .* from 1 on, got -2",
        ),
        ({"prompt": "a", "decoder_guidance_scale": -1}, "decoder_guidance_scale must be a number from 0 on"),
        ({"prompt": "a", "decoder_guidance_scale": NAN}, "decoder_guidance_scale must be a number from 0 on"),
        ({"prompt": "a", "guidance_rescale": NAN}, "guidance_rescale must be a number from 0 on"),
        ({"prompt": "a", "eta": NAN}, "eta must be a number from 0 on"),
        ({"prompt": "a", "original_size": (16,)}, r"original_size must be two numbers of pixels, got \(16,\)"),
        ({"prompt": "a", "decoder_guidance_interval": (0.2,)}, r"0 <= start < stop <= 1, got \(0.2,\)"),
        ({"prompt": "a", "decoder_guidance_interval": None}, "0 <= start < stop <= 1, got None"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": None}, "must be among .*, got None"),
        ({"prompt": "a", "output_type": "jpeg"}, r"output_type must be one of \('pil', 'np', 'pt', 'latent'\)"),
        ({"prompt": "a", "output_type": None}, "output_type must be one of"),
        ({"prompt": "a", "height": "16"}, "height must be a positive multiple of 8, got '16'"),
        ({"prompt": "a", "generator": 3}, r"got 3: for a seed write torch.Generator\(\).manual_seed\(seed\)"),
        ({"prompt": "a", "generator": "0"}, "generator must be a torch.Generator, or one for each image"),
        ({"prompt": "a", "generator": [0]}, "generator must be a torch.Generator"),
        ({"visual_tokens": codes(3), "generator": 3}, "generator must be a torch.Generator"),
        (
            {"prompt": "a", "image": an_image()},
            r"image is no argument of LavitPipeline: images are part of the prompt",
        ),
        ({"prompt": "a", "strength": 0.5}, "strength is no argument"),
        ({"prompt": "a", "seed": 0}, r"give generator=torch.Generator\(\).manual_seed\(seed\)"),
        ({"visual_tokens": codes(3), "seed": 0}, "seed is no argument"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 7)}, r"of \(1, 4, 8, 8\), got \(1, 4, 8, 7\)"),
        ({"prompt": ["a", "b"], "latents": torch.zeros(1, 4, 8, 8)}, r"of \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"),
        ({"prompt": "a", "latents": torch.full((1, 4, 8, 8), NAN)}, "latents hold NaN"),
        ({"prompt": "a", "latents": [1.0]}, "latents must be a tensor"),
        ({"prompt": "a \ud800 cat"}, r"prompt 0 is no Unicode text: it holds the lone surrogate '\\ud800'"),
        ({"prompt": [an_image(), "\udfff"]}, "lone surrogate"),
        ({"prompt": "a", "negative_prompt": "\ud800", "guidance_scale": 2}, "negative prompt 0 is no Unicode"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "2 negative prompts were given for 1 prompts"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt must be a string, or one for each prompt"),
        ({"prompt": "a", "negative_prompt": "b", "guidance_scale": 1}, "negative_prompt needs guidance"),
        ({"visual_tokens": codes(3), "negative_prompt": "b"}, "of the stage that visual_tokens replace"),
        ({"visual_tokens": [torch.tensor([], dtype=torch.long)]}, r"images \[0\] have no visual tokens"),
        ({"visual_tokens": [[1], []]}, r"images \[1\] have no visual tokens"),
        ({"visual_tokens": codes(3, 0)}, r"images \[1\] have no visual tokens"),
        ({"visual_tokens": [torch.tensor([NAN])]}, "must be codes, whole numbers, got torch.float32"),
        ({"visual_tokens": torch.tensor([1, 2])}, "a list with a 1-D tensor of codes for each image, got Tensor"),
        ({"prompt": np.zeros((4, 4, 3))}, "must be a string, an image or a non-empty list"),
        ({"prompt": [np.zeros((4, 4, 3)), "a"]}, "prompt 0 holds ndarray"),
        ({"prompt": []}, "non-empty list"),
        ({"prompt": iter([])}, "non-empty list"),
        ({"prompt": [[], ["a"]]}, "prompt 0 is empty"),
    ],
)
def test_bad_input_is_refused_before_any_model_runs(pipe, arguments, message):
    ran = []
    hooks = [part.register_forward_pre_hook(lambda *_: ran.append(1)) for part in (pipe.model, pipe.detokenizer)]
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    for hook in hooks:
        hook.remove()
    assert not ran


def test_guidance_of_0_and_of_1_is_none(pipe):
    drawn = [written(pipe, "a cat", generator=seeded(0), guidance_scale=scale) for scale in (0, 1, 1.0, 3)]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]
    decoded = [
        latents_of(pipe, visual_tokens=codes(4), generator=seeded(0), decoder_guidance_scale=scale)
        for scale in (0, 1, 3)
    ]
    assert torch.equal(decoded[0], decoded[1]) and not torch.equal(decoded[0], decoded[2])


def test_each_prompt_may_have_its_own_guidance(pipe):
    prompts = ["a cat", "two blue dogs"]
    each = [written(pipe, prompt, generator=seeded(i), guidance_scale=2 + i) for i, prompt in enumerate(prompts)]
    for scales in ([2, 3], (2.0, 3.0), torch.tensor([2.0, 3.0])):
        both = written(pipe, prompts, generator=[seeded(0), seeded(1)], guidance_scale=scales)
        assert both == each[0] + each[1]


def test_nothing_to_reconstruct_is_an_error(pipe):
    with pytest.raises(ValueError, match="image is an empty list"):
        pipe.reconstruct([])


def test_an_image_left_without_codes_is_an_error(pipe):
    with pytest.raises(ValueError):
        pipe.generate_visual_tokens("a cat", max_new_tokens=0)


@pytest.mark.parametrize(
    ("values", "lengths", "message"),
    [
        ([1, 2], [2, 0], "each from 1 on, got .2, 0"),
        ([], [0], "each from 1 on"),
        ([], [], "each from 1 on"),
        ([1.0, NAN], [2], "codes must be whole numbers, got torch.float32"),
        ([1, 2], [1.0, 1.0], "lengths must be whole numbers"),
        ([1, 2], [1], "codes must be packed"),
        ([0, CODEBOOK_SIZE], [2], "codes must be in 0 … 23"),
        ([-1, 0], [2], "codes must be in 0 … 23"),
        ([0] * (NUM_PATCHES + 1), [NUM_PATCHES + 1], "at most 16 can be decoded"),
    ],
)
def test_the_detokenizer_refuses_what_are_no_codes_of_images(values, lengths, message):
    def numbers(entries):
        return torch.tensor(entries, dtype=None if entries else torch.long)

    with pytest.raises(ValueError, match=message):
        tiny_detokenizer()(numbers(values), numbers(lengths))


def test_generators_may_be_a_tuple(pipe):
    drawn = [latents_of(pipe, ["a cat", "dogs"], generator=kind([seeded(0), seeded(1)])) for kind in (list, tuple)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "collected",
    [
        tuple,
        np.array,
        lambda prompts: np.array(prompts, dtype=object),
        pandas.Series,
        lambda prompts: Dataset.from_dict({"prompt": prompts})["prompt"],
        iter,
    ],
)
def test_prompts_are_taken_from_every_usual_collection(pipe, collected):
    prompts = ["a red apple", "two blue cats"]
    generators = [seeded(0), seeded(1)]
    wanted = written(pipe, prompts, generator=[seeded(0), seeded(1)])
    assert written(pipe, collected(prompts), generator=generators) == wanted


def test_a_collection_is_one_multimodal_prompt_where_it_holds_an_image_itself():
    image = an_image()
    assert split_batch((image, "in snow")) == ([[image, "in snow"]], False)
    assert split_batch([(image, "in snow"), ["a cat"]]) == ([[image, "in snow"], ["a cat"]], True)
    assert split_batch("a cat") == ([["a cat"]], False)
    assert split_batch(["a cat"]) == ([["a cat"]], True)
    assert split_batch(image) == ([[image]], False)


def test_strings_in_a_prompt_are_text_even_where_they_look_like_paths(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    an_image().save("cat.png")
    assert written(pipe, ["cat.png"], generator=seeded(0)) == written(pipe, "cat.png", generator=seeded(0))


def test_images_of_a_prompt_come_as_paths_files_bytes_or_rows_of_datasets(pipe, tmp_path):
    path = tmp_path / "cat.png"
    an_image().save(path)
    wanted = written(pipe, [an_image(), "in snow"], generator=seeded(0))
    with path.open("rb") as file:
        for part in (path, file, io.BytesIO(path.read_bytes()), path.read_bytes(), {"bytes": path.read_bytes()}):
            assert written(pipe, [part, "in snow"], generator=seeded(0)) == wanted
    assert written(pipe, [{"bytes": None, "path": str(path)}, "in snow"], generator=seeded(0)) == wanted
    assert written(pipe, path, generator=seeded(0)) == written(pipe, an_image(), generator=seeded(0))


def test_a_negative_prompt_stands_in_the_unconditional_stream(pipe):
    settings = {"guidance_scale": 3.0}
    plain = written(pipe, "a cat", generator=seeded(0), **settings)
    away = written(pipe, "a cat", generator=seeded(0), negative_prompt="two dogs in snow", **settings)
    inputs = pipe.processor(text="a cat", generation_mode="image")
    negative = pipe.processor(text="two dogs in snow", generation_mode="image").input_ids
    ids = pipe.model.generate(
        **inputs, generation_mode="image", generator=seeded(0), negative_prompt_ids=negative, guidance_scale=3.0
    )
    assert away == [pipe.model.decode_image_tokens(ids)[0].tolist()] != plain
    assert written(pipe, "a cat", generator=seeded(0), negative_prompt="", **settings) == plain


def test_negative_prompts_are_one_for_all_or_one_for_each(pipe):
    def draw(prompts, negative, *seeds):
        generators = [seeded(s) for s in seeds]
        return written(pipe, prompts, generator=generators, negative_prompt=negative, guidance_scale=3.0)

    each = draw(["a cat", "two blue dogs"], ["in snow on the table", ""], 0, 1)
    assert each == draw(["a cat"], "in snow on the table", 0) + draw(["two blue dogs"], None, 1)
    both = draw(["a cat", "two blue dogs"], "in snow", 0, 1)
    assert both == draw(["a cat"], "in snow", 0) + draw(["two blue dogs"], ("in snow",), 1)


class StopAfter(StoppingCriteria):
    def __init__(self, count: int):
        self.count, self.calls = count, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= self.count, dtype=torch.bool)


def test_stopping_criteria_of_the_caller_stop_the_visual_tokens(pipe):
    steps = []
    tokens = pipe.generate_visual_tokens(
        ["a cat", "dogs"],
        stopping_criteria=[StopAfter(3)],
        callback_on_token=lambda step, ids: steps.append(step),
    )
    assert tokens.lengths.tolist() == [3, 3] and steps == [0, 1, 2]


def test_the_token_callback_sees_the_whole_batch_once_a_step_where_text_and_images_mix(pipe):
    prompts = ["a red apple", [an_image(), "in snow"], "dogs"]
    seen = []
    batch = pipe.generate_visual_tokens(
        prompts_of(prompts),
        generator=[seeded(s) for s in range(3)],
        max_image_tokens=6,
        callback_on_token=lambda step, ids: seen.append((step, len(ids))),
    )
    assert seen == [(step, 3) for step in range(len(seen))] and len(seen) <= 7
    for i, row in enumerate(batch.split()):
        alone = pipe.generate_visual_tokens(prompts_of(prompts)[i : i + 1], generator=seeded(i), max_image_tokens=6)
        assert torch.equal(alone.codes, row)
    defaults = pipe.defaults
    assert defaults.guidance_scale != defaults.multimodal_guidance_scale


def prompts_of(prompts) -> list[list]:
    return [prompt if isinstance(prompt, list) else [prompt] for prompt in prompts]


def test_pndm_draws_with_its_first_steps_left_out_and_asks_for_four_otherwise():
    pipe = tiny_pipeline(scheduler=PNDMScheduler.from_config(tiny_scheduler().config, skip_prk_steps=True))
    assert torch.isfinite(latents_of(pipe, visual_tokens=codes(4))).all()
    pipe.scheduler = PNDMScheduler.from_config(tiny_scheduler().config)
    assert torch.isfinite(latents_of(pipe, visual_tokens=codes(4), num_inference_steps=4)).all()
    with pytest.raises(ValueError, match="PNDMScheduler needs 4 num_inference_steps or more, got 3"):
        pipe(visual_tokens=codes(4))


def test_a_scheduler_that_is_none_of_stable_diffusion_is_refused(pipe):
    other = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is no scheduler of Stable Diffusion"):
        other(visual_tokens=codes(4))


@pytest.fixture(scope="module")
def draw(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    draw = pipeline("text-to-image", model=str(folder))
    draw.decoder.set_progress_bar_config(disable=True)
    return draw


def pixels(images) -> list:
    return [np.asarray(image).tolist() for image in images]


def test_the_text_to_image_task_draws_from_generators_and_datasets_one_by_one(draw):
    asked = []

    def prompts():
        for prompt in ("a cat", "dogs"):
            asked.append(prompt)
            yield prompt

    drawn = draw(prompts(), generator=seeded(0))
    assert asked == []
    first = next(drawn)
    assert asked == ["a cat"] and isinstance(first, Image.Image)
    assert len(list(drawn)) == 1
    listed = [draw(prompt, generator=seeded(0)) for prompt in ("a cat",)]
    assert pixels([first]) == pixels(listed)

    class Prompts(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return ["a cat", "dogs"][i]

    assert [image.size for image in draw(Prompts())] == [(16, 16)] * 2


@pytest.mark.parametrize("collected", [tuple, np.array, pandas.Series])
def test_the_text_to_image_task_takes_collections_as_a_batch(draw, collected):
    generators = [seeded(0), seeded(1)]
    drawn = draw(collected(["a cat", "dogs"]), generator=generators)
    assert pixels(drawn) == pixels(draw(["a cat", "dogs"], generator=[seeded(0), seeded(1)]))


def test_the_text_to_image_task_says_what_is_wrong(draw):
    for arguments, message in (({"seed": 0}, "manual_seed"), ({"num_images_per_prompt": 0}, "whole number")):
        with pytest.raises(ValueError, match=message):
            draw("a cat", **arguments)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed: the task works")
def test_the_any_to_any_task_names_torchvision_where_it_is_missing(draw):
    with pytest.raises(ImportError, match="(?i)torchvision"):
        pipeline("any-to-any", model=draw.model.name_or_path)
