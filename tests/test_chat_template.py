"""LavitProcessor.apply_chat_template: conversations to prompts."""

import base64

import pytest
import torch
from PIL import Image
from trained_processor import (
    FIXTURES,
    reference_processor,
    trained_processor,
)

from modeling_lavit import LavitProcessor


MODES = ["text", "image", "interleaved"]


@pytest.fixture
def processor() -> LavitProcessor:
    return trained_processor()


@pytest.fixture
def image() -> Image.Image:
    return Image.open(FIXTURES / "img0_96x60_RGB.png")


@pytest.fixture
def other() -> Image.Image:
    return Image.open(FIXTURES / "img1_50x80_RGB.png")


@pytest.fixture(scope="module")
def reference() -> tuple[LavitProcessor, dict]:
    return reference_processor()


def message(role: str, *blocks) -> dict:
    def content(block: str | dict) -> dict:
        return {"type": "text", "text": block} if isinstance(block, str) else {"type": "image", **block}

    return {"role": role, "content": [content(block) for block in blocks]}


def test_a_chat_becomes_questions_and_answers(processor):
    chat = [
        {"role": "system", "content": "Be brief."},
        message("user", {}, "what is it?"),
        message("assistant", "a cat"),
        {"role": "user", "content": "is it red?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "Be brief.\n<image>Question: what is it? Answer: a cat\nQuestion: is it red? Answer:"


def test_an_image_alone_in_a_chat_asks_for_a_caption(processor, image):
    inputs = processor.apply_chat_template(
        [message("user", {"image": image})], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert torch.equal(inputs["input_ids"], processor(images=image)["input_ids"])


@pytest.mark.parametrize("key", ["image", "path", "url", "base64"])
def test_chat_images_of_every_kind_reach_the_pixel_values(processor, image, key):
    path = FIXTURES / "img0_96x60_RGB.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    source = {"image": image, "path": str(path), "url": f"data:image/png;base64,{encoded}", "base64": encoded}[key]
    inputs = processor.apply_chat_template(
        [message("user", {key: source}, "what is it?")], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    want = processor(images=image, text="<image>Question: what is it? Answer:")
    assert torch.equal(inputs["input_ids"], want["input_ids"])
    assert torch.equal(inputs["pixel_values"], want["pixel_values"])


def test_a_batch_of_chats_may_mix_images_and_none(processor, image, other):
    chats = [[message("user", {"image": image}, {"image": other}, "a?")], [message("user", "b?")]]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    want = processor(images=[[image, other], []], text=["<image><image>Question: a? Answer:", "Question: b? Answer:"])
    assert torch.equal(inputs["input_ids"], want["input_ids"]) and inputs["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("as_processor_kwarg", [True, False])
def test_a_chat_in_image_mode_is_its_own_text_and_ends_with_img(processor, image, as_processor_kwarg):
    mode = {"generation_mode": "image"}
    options = {"processor_kwargs": mode} if as_processor_kwarg else mode
    inputs = processor.apply_chat_template(
        [message("user", {"image": image}, "in watercolour")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **options,
    )
    want = processor(images=image, text="<image>in watercolour", generation_mode="image")
    assert torch.equal(inputs["input_ids"], want["input_ids"])


def test_a_prefilled_answer_is_continued(processor):
    chat = [message("user", "what is it?"), message("assistant", "a red")]
    text = processor.apply_chat_template(chat, continue_final_message=True)
    assert text == "Question: what is it? Answer: a red"
