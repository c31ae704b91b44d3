"""What vLLM reads and draws is what the library does: `make test-vllm`, in an environment with vLLM."""

import base64
import io
import os

import pytest
import torch
from PIL import Image

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.timeout(1200)
GREEDY = vllm.SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 2},
        "enable_mm_embeds": True,
    }
    return vllm.LLM(str(LAVIT_EMOJI), **options)


@pytest.fixture(scope="module")
def pipe():
    return LavitPipeline.from_pretrained(LAVIT_EMOJI)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """The 48 originals on the sheet of samples: 12 in a row of cells of 106 by 353 pixels."""
    sheet = Image.open(LAVIT_EMOJI / "samples.png").convert("RGB")
    corners = [(10 + 106 * column, 56 + 353 * row) for row in range(4) for column in range(12)]
    return [sheet.crop((x, y, x + 96, y + 96)) for x, y in corners]


def written(pipe, inputs, **options) -> list[list[int]]:
    """New ids of the library's greedy search, without the end."""
    rows = pipe.model.generate(**inputs, do_sample=False, num_beams=1, **options)
    return [until_end(row[inputs["input_ids"].shape[1] :].tolist()) for row in rows]


def until_end(ids: list[int], end: int = 2) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_greedy_captions_are_the_librarys(llm, pipe, images):
    prompts = [{"prompt": "<image>", "multi_modal_data": {"image": image}} for image in images]
    read = [until_end(list(output.outputs[0].token_ids)) for output in llm.generate(prompts, GREEDY)]
    expected = written(pipe, pipe.processor(images=images), max_new_tokens=12)
    assert read == expected
    assert len({tuple(ids) for ids in expected}) > 20


def test_an_image_takes_the_positions_that_it_takes_in_the_library(llm, pipe, images):
    text = "<image> Question: which style is this? Answer:"
    (output,) = llm.generate([{"prompt": text, "multi_modal_data": {"image": images[0]}}], GREEDY)
    inputs = pipe.processor(images=images[:1], text=text)
    assert output.prompt_token_ids == pipe.model.model.expand_inputs(**inputs).input_ids[0].tolist()


def test_a_prompt_of_ids_is_taken_as_it_is(llm, pipe, images):
    inputs = pipe.processor(images=images[:1], text="<image>Question: what is it? Answer:")
    prompt = {"prompt_token_ids": inputs["input_ids"][0].tolist(), "multi_modal_data": {"image": images[0]}}
    (output,) = llm.generate([prompt], GREEDY)
    assert until_end(list(output.outputs[0].token_ids)) == written(pipe, inputs, max_new_tokens=12)[0]


def test_a_conversation_has_several_images_and_turns(llm, pipe, images):
    def conversation(part):
        return [
            {"role": "user", "content": [part(images[0]), {"type": "text", "text": "which style is this?"}]},
            {"role": "assistant", "content": "flat"},
            {"role": "user", "content": [part(images[1]), {"type": "text", "text": "what is it?"}]},
        ]

    (output,) = llm.chat(
        conversation(lambda image: {"type": "image_url", "image_url": {"url": data_uri(image)}}), GREEDY
    )
    inputs = pipe.processor.apply_chat_template(
        conversation(lambda image: {"type": "image", "image": image}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert output.prompt_token_ids == pipe.model.model.expand_inputs(**inputs).input_ids[0].tolist()
    assert until_end(list(output.outputs[0].token_ids)) == written(pipe, inputs, max_new_tokens=12)[0]


@torch.no_grad()
def test_features_that_were_computed_elsewhere_are_read(llm, pipe, images):
    inputs = pipe.processor(images=images[:1])
    features = pipe.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    (output,) = llm.generate([{"prompt": "<image>", "multi_modal_data": {"image": [features]}}], GREEDY)
    assert until_end(list(output.outputs[0].token_ids)) == written(pipe, inputs, max_new_tokens=12)[0]


@pytest.mark.parametrize("text", ["<image><image>", "[IMG][/IMG][IMG][/IMG]", "what is it?"])
def test_a_prompt_needs_a_slot_for_each_image(llm, images, text):
    with pytest.raises(ValueError, match=r"image slots .* but pixel_values has 1 images"):
        llm.generate([{"prompt": text, "multi_modal_data": {"image": images[0]}}], GREEDY)


def test_the_likeliest_codes_are_the_librarys(llm, pipe):
    vocabulary = pipe.model.config.vocabulary
    to_the_end = vllm.SamplingParams(temperature=0, max_tokens=140, stop_token_ids=[vocabulary.eoi_token_id])
    (output,) = llm.generate(["red apple[IMG]"], to_the_end)
    inputs = pipe.processor(text="red apple", generation_mode="image")
    expected = pipe.model.generate(
        **inputs, generation_mode="image", do_sample=False, guidance_scale=1.0, max_image_tokens=140
    )
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert list(output.outputs[0].token_ids) == expected[0].tolist()


def test_sampled_codes_end_the_image_and_can_be_decoded(llm, pipe):
    vocabulary = pipe.model.config.vocabulary
    sampling = vllm.SamplingParams(n=4, top_k=50, seed=0, max_tokens=140, stop_token_ids=[vocabulary.eoi_token_id])
    (output,) = llm.generate(["red apple[IMG]"], sampling)
    drawn = [torch.tensor(answer.token_ids) for answer in output.outputs]
    assert all(ids[-1] == vocabulary.eoi_token_id for ids in drawn)
    codes = [vocabulary.codes_of(ids[:-1]) for ids in drawn]
    assert len({tuple(row.tolist()) for row in codes}) > 1
    assert len(pipe(visual_tokens=codes).images) == 4
