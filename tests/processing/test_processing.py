"""LavitProcessor: prompts of text and images to ids."""

import numpy as np
import pytest
import torch
from PIL import Image
from trained_processor import (
    CODEBOOK_SIZE,
    FIXTURES,
    ids_of,
    marks,
    reference_processor,
    rows,
    trained_processor,
    trained_tokenizer,
)
from transformers import AutoProcessor, LlamaTokenizer

from modeling_lavit import LavitConfig, LavitImageProcessor, LavitProcessor


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


def test_special_ids_lie_right_above_the_text_and_codes_above_them(processor):
    text_vocab_size = len(processor.tokenizer) - 2
    assert marks(processor) == (text_vocab_size, text_vocab_size + 1, text_vocab_size + 2)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == processor.tokenizer.unk_token_id


def test_an_image_prompt_is_the_text_and_img_without_bos(processor):
    inputs = processor(text="a red apple", generation_mode="image")
    assert rows(inputs) == [[*ids_of(processor, "a red apple"), processor.boi_token_id]]
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_other_prompts_are_the_text_alone(processor, mode):
    assert rows(processor(text="a red apple", generation_mode=mode)) == [ids_of(processor, "a red apple")]


def test_bos_is_added_on_request_alone(processor):
    bos = processor.tokenizer.bos_token_id
    assert rows(processor(text="a cat", add_special_tokens=True)) == [[bos, *ids_of(processor, "a cat")]]
    assert bos not in rows(processor(text="a cat"))[0]


def test_an_image_alone_is_one_slot_and_its_pixels(processor, image):
    boi, eoi, _ = marks(processor)
    inputs = processor(images=image)
    assert rows(inputs) == [[boi, eoi]]
    assert torch.equal(inputs["pixel_values"], processor.image_processor(image, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("mode", MODES)
def test_a_question_stands_behind_its_slot_and_is_tokenized_by_itself(processor, image, mode):
    boi, eoi, _ = marks(processor)
    question = "Question: what is it? Answer:"
    inputs = processor(images=image, text=f"<image>{question}", generation_mode=mode)
    assert rows(inputs) == [[boi, eoi, *ids_of(processor, question), *([boi] if mode == "image" else [])]]


def test_spaces_next_to_a_mark_make_no_difference(processor, image):
    tight = processor(images=image, text="a photo of<image>in watercolour")
    assert rows(tight) == rows(processor(images=image, text="a photo of <image>  in watercolour"))


def test_a_path_bytes_and_an_array_are_images_too(processor, image):
    path = FIXTURES / "img0_96x60_RGB.png"
    want = processor(images=image)["pixel_values"]
    for source in (path, str(path), path.read_bytes(), np.asarray(image)):
        assert torch.equal(processor(images=source)["pixel_values"], want)


def test_a_batch_is_padded_on_the_left_and_equals_one_by_one(processor, image, other):
    texts = ["<image>what is it?", "<image>a<image>b", "two blue cats"]
    inputs = processor(images=[[image], [other, image], []], text=texts)
    singles = [
        processor(images=image, text=texts[0]),
        processor(images=[other, image], text=texts[1]),
        processor(text=texts[2]),
    ]
    assert rows(inputs) == [rows(single)[0] for single in singles]
    assert torch.equal(inputs["pixel_values"], torch.cat([s["pixel_values"] for s in singles[:2]]))
    assert (inputs["attention_mask"].diff(dim=1) >= 0).all() and inputs["attention_mask"][:, -1].all()
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_a_flat_list_is_handed_to_the_marks_in_order_over_the_batch(processor, image, other):
    texts = ["<image>a<image>b", "no image", "<image>"]
    flat = processor(images=[image, other, other], text=texts)
    nested = processor(images=[[image, other], [], [other]], text=texts)
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert torch.equal(flat["input_ids"], nested["input_ids"])


def test_without_text_each_image_or_each_inner_list_is_a_prompt(processor, image, other):
    boi, eoi, _ = marks(processor)
    assert rows(processor(images=[image, other])) == [[boi, eoi]] * 2
    assert rows(processor(images=[[image, other], [other]])) == [[boi, eoi] * 2, [boi, eoi]]
    assert rows(processor(images=image, generation_mode="image")) == [[boi, eoi, boi]]


def test_codes_at_a_mark_become_their_ids_between_img_marks(processor):
    boi, eoi, offset = marks(processor)
    inputs = processor(text="<image> in watercolour", visual_tokens=[3, 0, 23], generation_mode="image")
    codes = [offset + 3, offset, offset + 23]
    assert rows(inputs) == [[boi, *codes, eoi, *ids_of(processor, "in watercolour"), boi]]
    assert "pixel_values" not in inputs


def test_codes_without_a_mark_go_in_front_each_once(processor):
    boi, eoi, offset = marks(processor)
    text = ids_of(processor, "a cat")
    first, second = [boi, offset + 1, offset + 2, eoi], [boi, offset + 5, eoi]
    assert rows(processor(text="a cat", visual_tokens=[[1, 2], [5]])) == [[*first, *second, *text]]
    assert rows(processor(text=["a cat", "a cat"], visual_tokens=[[1, 2], [5]])) == [[*first, *text], [*second, *text]]
    nested = processor(text=["a cat", "a cat"], visual_tokens=[[[1, 2], [5]], []])
    assert rows(nested) == [[*first, *second, *text], text]
    assert rows(processor(visual_tokens=[[1, 2], [5]])) == [first, second]


@pytest.mark.parametrize(
    "codes",
    [
        [4, 7],
        (4, 7),
        torch.tensor([4, 7]),
        np.array([4, 7]),
        [torch.tensor([4, 7])],
        torch.tensor([[4, 7]]),
        [[[4, 7]]],
    ],
    ids=str,
)
def test_codes_are_taken_in_every_shape_of_sequence(processor, codes):
    boi, eoi, offset = marks(processor)
    assert rows(processor(text="<image>", visual_tokens=codes)) == [[boi, offset + 4, offset + 7, eoi]]


def test_reference_compat_leaves_the_marks_around_codes_out_of_image_prompts_only(processor):
    boi, eoi, offset = marks(processor)
    text = ids_of(processor, "running")
    for mode, want in (("image", [offset + 4, *text, boi]), ("text", [boi, offset + 4, eoi, *text])):
        inputs = processor(text="<image>running", visual_tokens=[4], generation_mode=mode, reference_compat=True)
        assert rows(inputs) == [want]


def test_reference_compat_drops_the_alpha_of_images(processor):
    clear = Image.open(FIXTURES / "img2_64x64_RGBA.png")
    compat = processor(images=clear, reference_compat=True)["pixel_values"]
    assert torch.equal(compat, processor(images=clear.convert("RGB"))["pixel_values"])
    assert not torch.equal(compat, processor(images=clear)["pixel_values"])


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image><image>", 1, r"prompt 0 has 2 <image> mark\(s\), but gets 1 image"),
        ("<image>", 2, r"prompt 0 has 1 <image> mark\(s\), but gets 2 image"),
        ("no mark", 1, r"prompt 0 has 0 <image> mark\(s\), but gets 1 image"),
        (["<image>", "<image>"], 1, r"prompt 1 has 1 <image> mark\(s\), but gets 0 image"),
        (["<image>", "<image>"], 3, r"prompt 1 has 1 <image> mark\(s\), but gets 2 image"),
        (["<image>", "a"], [[0], [0]], r"prompt 1 has 0 <image> mark\(s\), but gets 1 image"),
        (["<image>", "a"], [[0]], "2 prompts, but images for 1"),
        ("<image>", 0, "images is empty"),
    ],
)
def test_images_and_marks_that_disagree_are_named_with_prompt_and_numbers(processor, image, text, images, message):
    images = [image] * images if isinstance(images, int) else [[image for _ in group] for group in images]
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_a_mark_without_any_image_is_refused(processor):
    with pytest.raises(ValueError, match=r"prompt 1 has 1 <image> mark\(s\), but gets 0"):
        processor(text=["a", "<image>b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "nothing to process"),
        ({"text": "a", "generation_mode": "video"}, "generation_mode must be one of .*'video'"),
        ({"text": "", "generation_mode": "image"}, "prompt 0 is empty"),
        ({"text": "  "}, "prompt 0 is empty"),
        ({"text": ["a", ""], "generation_mode": "image"}, "prompt 1 is empty"),
        ({"text": []}, "empty list"),
        ({"text": 3}, "text must be a string or a list of strings, got int"),
        ({"text": ["a", None]}, "text must be a string or a list of strings"),
        ({"text": "draw [IMG] now"}, r"prompt 0 holds \[IMG\].*mark images by <image>"),
        ({"text": ["a", "b [/IMG]"]}, "prompt 1 holds"),
        ({"text": "a red apple", "max_length": 2}, "prompt 0 has .* tokens, more than the context of 2"),
        ({"text": "a", "videos": [1]}, "neither videos nor audio"),
        ({"images": "no_such.png"}, "no_such.png"),
        ({"images": [None]}, "NoneType"),
        ({"text": "<image>", "visual_tokens": [-1]}, "from -1 to -1; they are codes, counted from 0 to 23"),
        ({"text": "<image>", "visual_tokens": [0, 24]}, "go from 0 to 24"),
        ({"text": "<image>", "visual_tokens": []}, "no codes"),
        ({"text": "<image>", "visual_tokens": [0.5]}, "got float"),
        ({"text": "<image>", "visual_tokens": [True]}, "got bool"),
        ({"text": "<image>", "visual_tokens": "12"}, "got str"),
        ({"text": ["a", "b"], "visual_tokens": [[1], [2], [3]]}, "2 prompts without <image> and 3 images"),
        ({"text": "<image>a<image>", "visual_tokens": [[1]]}, "prompt 0 has 2"),
        ({"text": "<image>", "visual_tokens": [1], "images": np.zeros((4, 4, 3), np.uint8)}, "cannot mix"),
    ],
    ids=str,
)
def test_bad_calls_say_what_is_wrong(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**call)


def test_the_tokenizers_context_is_the_limit_where_none_is_given():
    tokenizer = trained_tokenizer()
    short = LlamaTokenizer(
        vocab={token: i for token, i in tokenizer.get_vocab().items() if i < tokenizer.boi_token_id},
        merges=[],
        pad_token="</s>",
        model_max_length=5,
        extra_special_tokens={"boi_token": "[IMG]", "eoi_token": "[/IMG]"},
    )
    processor = LavitProcessor(LavitImageProcessor(), short)
    assert len(rows(processor(text="abc"))[0]) <= 5
    with pytest.raises(ValueError, match="prompt 1 has .* tokens, more than the context of 5"):
        processor(text=["abc", "a red apple on the table"])


def test_padding_to_a_length_or_a_multiple_and_on_the_right_is_an_option(processor):
    assert processor(text=["a", "a red apple"], pad_to_multiple_of=16)["input_ids"].shape[1] == 16
    inputs = processor(text="a", padding="max_length", max_length=9, padding_side="right")
    assert inputs["attention_mask"][0].tolist() == [1] + [0] * 8
    ragged = processor(text=["a", "a red apple"], padding=False, return_tensors=None)["input_ids"]
    assert [len(row) for row in ragged] == [len(ids_of(processor, text)) for text in ("a", "a red apple")]


def test_a_tokenizer_without_img_marks_is_refused():
    bare = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3}, merges=[])
    with pytest.raises(ValueError, match="needs .IMG. and ./IMG. with adjacent ids"):
        LavitProcessor(LavitImageProcessor(), bare)


def test_texts_have_the_ids_of_the_reference(reference):
    processor, expected = reference
    texts, ids = expected["text_tokenizer"]["texts"], expected["text_tokenizer"]["ids"]
    known = {text: row for text, row in zip(texts, ids, strict=True) if text}
    assert rows(processor(text=list(known))) == list(known.values())


def test_a_prompt_of_image_and_text_has_the_ids_of_the_reference(reference):
    processor, expected = reference
    prompt = expected["multimodal"]["prompt"]
    codes = [i - processor.visual_offset for i in prompt if i >= processor.visual_offset]
    inputs = processor(
        text=f"<image>{expected['multimodal']['text']}",
        visual_tokens=codes,
        generation_mode="image",
        reference_compat=True,
    )
    assert rows(inputs) == [[*prompt, processor.boi_token_id]]


def test_saving_and_loading_gives_an_equal_processor(processor, image, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").is_file() and (tmp_path / "tokenizer.json").is_file()
    loaded = LavitProcessor.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text(), name
    assert loaded.codebook_size == CODEBOOK_SIZE
    assert loaded.chat_template == processor.chat_template and marks(loaded) == marks(processor)
    for call in (
        {"images": image, "text": "<image>Question: what is it? Answer:"},
        {"text": ["a red apple", "two"], "generation_mode": "image"},
    ):
        before, after = processor(**call), loaded(**call)
        assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)


def test_autoprocessor_finds_it_beside_a_lavit_config(processor, tmp_path):
    LavitConfig().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LavitProcessor and type(loaded.image_processor) is LavitImageProcessor


def test_the_calls_of_the_transformers_pipelines_work(processor, image):
    single = processor(images=[image], text="<image>a", return_tensors="pt").to(dtype=torch.float16)
    assert single["pixel_values"].dtype == torch.float16 and single["input_ids"].dtype == torch.int64
    batch = processor(images=[image, image], text=["<image>a", "<image>a cat"], return_tensors="pt", padding=True)
    assert batch["input_ids"].shape[0] == 2
    text_only = processor(images=None, text=["a", "a cat"], return_tensors="pt", padding=True)
    assert "pixel_values" not in text_only
    assert len(processor.post_process_image_text_to_text(batch["input_ids"], skip_special_tokens=True)) == 2


@pytest.mark.parametrize("text", ["a </s> b", "say </s>", "<s>hi", "x<unk>y", "<0x0A>"])
def test_control_tokens_typed_in_a_text_are_text(processor, text):
    (ids,) = rows(processor(text=text))
    assert not set(ids) & set(processor.tokenizer.all_special_ids) and processor.decode(ids) == text
    (ids,) = rows(processor(text="a cat</s>", split_special_tokens=False))
    assert ids[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["a \ud800 b", "\udc80", "a <image> \udfff"])
def test_half_a_surrogate_pair_is_refused(processor, image, text):
    with pytest.raises(ValueError, match="prompt 0 is no valid text: it has half of a surrogate pair"):
        processor(text=text, images=[image] if "<image>" in text else None)


@pytest.mark.parametrize("kind", [tuple, np.array, iter, lambda prompts: {prompt: 0 for prompt in prompts}.keys()])
def test_prompts_come_in_every_usual_sequence(processor, kind):
    prompts = ["a red apple", "two blue cats"]
    assert rows(processor(text=kind(prompts))) == rows(processor(text=prompts))


def test_prompts_without_images_may_be_none_in_the_list_of_lists(processor, image):
    inputs = processor(images=[[image], None], text=["<image>a", "b"])
    assert torch.equal(inputs["input_ids"], processor(images=[[image], []], text=["<image>a", "b"])["input_ids"])


def test_arguments_that_ask_for_nothing_are_taken(processor):
    nothing = {"truncation": False, "return_length": False, "return_overflowing_tokens": False, "stride": 0}
    assert rows(processor(text="a cat", **nothing, padding=False)) == rows(processor(text="a cat"))
    with pytest.raises(ValueError, match="does not support .'return_length'"):
        processor(text="a cat", return_length=True)


def test_truncation_cuts_text_and_never_an_image(processor, image):
    text = "<image>what is it on the table"
    (whole,) = rows(processor(images=image, text=text))
    assert rows(processor(images=image, text=text, truncation=True, max_length=len(whole))) == [whole]
    assert rows(processor(images=image, text=text, truncation=True, max_length=5)) == [whole[:5]]
    assert rows(processor(text="a red apple", truncation=True, max_length=3, generation_mode="image")) == [
        [*ids_of(processor, "a red apple")[:2], processor.boi_token_id]
    ]
    for length in (0, 1):
        with pytest.raises(ValueError, match="more than the context|would cut its images"):
            processor(images=image, text=text, truncation=bool(length), max_length=length or 1)
    with pytest.raises(ValueError, match="would cut its images"):
        processor(images=image, text="what is it <image>", truncation=True, max_length=4)


def test_what_engines_and_trainers_ask_of_a_processor(processor, image):
    assert processor.image_token_id == processor.boi_token_id and processor.model_input_names[0] == "input_ids"
    inputs = processor(images=[image, image], text="<image>a<image>", return_mm_token_type_ids=True)
    counted = processor._get_num_multimodal_tokens(image_sizes=[(60, 96), (60, 96)])
    assert inputs["mm_token_type_ids"].sum() == sum(counted.num_image_tokens) == 4
    assert sum(counted.num_image_patches) == len(inputs["pixel_values"])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_are_those_of_the_prompt_as_given(processor, image, side):
    prompts = ["look at <image> what is it", "a"]
    inputs = processor(
        images=[[image], []], text=prompts, return_offsets_mapping=True, padding_side=side, return_tensors=None
    )
    for prompt, ids, spans in zip(prompts, inputs["input_ids"], inputs["offset_mapping"], strict=True):
        assert len(ids) == len(spans) and [start for start, _ in spans] == sorted(start for start, _ in spans)
        assert all(0 <= start <= end <= len(prompt) for start, end in spans)
        assert all(i in processor.image_token_ids for i, (a, b) in zip(ids, spans, strict=True) if "<" in prompt[a:b])
