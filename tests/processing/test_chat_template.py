"""LavitProcessor.apply_chat_template: conversations to prompts."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image
from trained_processor import (
    FIXTURES,
    reference_processor,
    trained_processor,
)

from modeling_lavit import LavitProcessor
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.processing.chat_template_lavit import DEFAULT_CHAT_TEMPLATE


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
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chats, return_tensors="pt", **options)
    want = processor(images=[[image, other], []], text=["<image><image>Question: a? Answer:", "Question: b? Answer:"])
    assert torch.equal(inputs["input_ids"], want["input_ids"]) and inputs["pixel_values"].shape[0] == 2
    ragged = processor.apply_chat_template(chats, **options)
    masks = want["attention_mask"].bool()
    assert ragged["input_ids"] == [ids[mask].tolist() for ids, mask in zip(want["input_ids"], masks, strict=True)]
    assert np.array_equal(ragged["pixel_values"], want["pixel_values"])


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


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        (["look at", {}, "what is it?"], "Question: look at <image> what is it? Answer:"),
        (["what is it?", {}], "Question: what is it? <image> Answer:"),
        ([{}, {}, "which?"], "<image><image>Question: which? Answer:"),
        ([{}, "a", "b"], "<image>Question: a b Answer:"),
    ],
)
def test_images_stand_where_the_message_has_them(processor, blocks, text):
    assert processor.apply_chat_template([message("user", *blocks)], add_generation_prompt=True) == text


def test_an_image_that_the_model_drew_stands_in_its_answer(processor, image):
    chat = [message("user", "draw a cat"), message("assistant", {"image": image}), message("user", "is it red?")]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    text = "Question: draw a cat Answer: <image>\nQuestion: is it red? Answer:"
    assert torch.equal(inputs["input_ids"], processor(images=image, text=text)["input_ids"])
    assert chat[1]["content"][0]["image"] is image


def test_marks_and_control_tokens_typed_in_a_chat_are_text(processor, image):
    chat = [message("user", {"image": image, "text": None}, "what is <image> or </s>?")]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = inputs["input_ids"][0]
    assert not set(ids.tolist()) & set(processor.tokenizer.all_special_ids) - set(processor.image_token_ids)
    assert processor.decode(ids) == "<image>Question: what is <image> or </s>? Answer:"
    assert (ids == processor.image_token_id).sum() == 1


def test_a_template_of_ones_own_writes_control_tokens_that_users_cannot(processor):
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"

    def ids_of_chat(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        return processor.apply_chat_template(chat, template, tokenize=True, return_dict=True)["input_ids"][0].tolist()

    tokenizer = processor.tokenizer
    ids = ids_of_chat("a cat")
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    with pytest.raises(ValueError, match="a message holds </s> as text"):
        ids_of_chat("a </s> cat")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_the_assistant_covers_its_answers_and_their_ends(processor, image, side):
    chats = [
        [
            message("user", "look at", {"image": image}, "what is it?"),
            message("assistant", "a red apple"),
            message("user", "<image> is what?"),
            message("assistant", "two cats"),
        ],
        [message("user", "is it?"), message("assistant", "it is")],
    ]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding_side": side, "truncation": True, "max_length": 300},
    )
    masked = zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    texts = [processor.decode(ids[mask.bool()]) for ids, mask in masked]
    assert [text.split("\n") for text in texts] == [["a red apple", " two cats", ""], ["it is", ""]]


def test_blocks_of_another_type_and_empty_conversations_are_refused(processor):
    with pytest.raises(Exception, match="text and images, got a block of type video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])
    with pytest.raises(ValueError, match="conversation is empty"):
        processor.apply_chat_template([])


def test_the_checkpoint_has_the_default_template():
    assert (LAVIT_EMOJI / "chat_template.jinja").read_text() == DEFAULT_CHAT_TEMPLATE
