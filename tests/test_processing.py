"""LavitProcessor: prompts of text and pictures to ids, ids back to text and codes."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoProcessor, LlamaTokenizer

from modeling_lavit import LavitConfig, LavitImageProcessor, LavitProcessor


FIXTURES = Path(__file__).parent / "fixtures" / "preprocess"
REFERENCE = Path(__file__).parent / "fixtures" / "prompts"
CODEBOOK_SIZE = 24
MODES = ["text", "image", "interleaved"]


@pytest.fixture(scope="module")
def tokenizer() -> LlamaTokenizer:
    """A trained byte-fallback BPE as Llama's, with `[IMG]` and `[/IMG]` right above its text ids."""
    corpus = [
        "Question: what is it? Answer: a red apple on the table",
        "it is running in watercolour",
        "two blue cats",
    ]
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens])
    bpe.train_from_iterator(corpus * 4, trainer)
    state = json.loads(bpe.to_str())["model"]
    return LlamaTokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        add_bos_token=True,
        pad_token="</s>",
        extra_special_tokens={"boi_token": "[IMG]", "eoi_token": "[/IMG]"},
    )


@pytest.fixture
def processor(tokenizer) -> LavitProcessor:
    return LavitProcessor(
        LavitImageProcessor(size={"height": 16, "width": 16}), tokenizer, codebook_size=CODEBOOK_SIZE
    )


@pytest.fixture
def picture() -> Image.Image:
    return Image.open(FIXTURES / "img0_96x60_RGB.png")


@pytest.fixture
def other() -> Image.Image:
    return Image.open(FIXTURES / "img1_50x80_RGB.png")


@pytest.fixture(scope="module")
def reference() -> tuple[LavitProcessor, dict]:
    """A processor around the reference checkpoint's tokenizer, and what the reference made with it."""
    marks = {"boi_token": "[IMG]", "eoi_token": "[/IMG]"}
    tokenizer = LlamaTokenizer.from_pretrained(REFERENCE, extra_special_tokens=marks, pad_token="</s>")
    processor = LavitProcessor(LavitImageProcessor(), tokenizer, codebook_size=128)
    return processor, json.loads((REFERENCE / "expected.json").read_text())


def ids_of(processor: LavitProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(inputs) -> list[list[int]]:
    """Ids without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def marks(processor: LavitProcessor) -> tuple[int, int, int]:
    return processor.boi_token_id, processor.eoi_token_id, processor.visual_offset


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


def test_a_picture_alone_is_one_slot_and_its_pixels(processor, picture):
    boi, eoi, _ = marks(processor)
    inputs = processor(images=picture)
    assert rows(inputs) == [[boi, eoi]]
    assert torch.equal(inputs["pixel_values"], processor.image_processor(picture, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("mode", MODES)
def test_a_question_stands_behind_its_slot_and_is_tokenized_by_itself(processor, picture, mode):
    boi, eoi, _ = marks(processor)
    question = "Question: what is it? Answer:"
    inputs = processor(images=picture, text=f"<image>{question}", generation_mode=mode)
    assert rows(inputs) == [[boi, eoi, *ids_of(processor, question), *([boi] if mode == "image" else [])]]


def test_spaces_next_to_a_mark_make_no_difference(processor, picture):
    tight = processor(images=picture, text="a photo of<image>in watercolour")
    assert rows(tight) == rows(processor(images=picture, text="a photo of <image>  in watercolour"))


def test_a_path_bytes_and_an_array_are_pictures_too(processor, picture):
    path = FIXTURES / "img0_96x60_RGB.png"
    want = processor(images=picture)["pixel_values"]
    for source in (path, str(path), path.read_bytes(), np.asarray(picture)):
        assert torch.equal(processor(images=source)["pixel_values"], want)


def test_a_batch_is_padded_on_the_left_and_equals_one_by_one(processor, picture, other):
    texts = ["<image>what is it?", "<image>a<image>b", "two blue cats"]
    inputs = processor(images=[[picture], [other, picture], []], text=texts)
    singles = [
        processor(images=picture, text=texts[0]),
        processor(images=[other, picture], text=texts[1]),
        processor(text=texts[2]),
    ]
    assert rows(inputs) == [rows(single)[0] for single in singles]
    assert torch.equal(inputs["pixel_values"], torch.cat([s["pixel_values"] for s in singles[:2]]))
    assert (inputs["attention_mask"].diff(dim=1) >= 0).all() and inputs["attention_mask"][:, -1].all()
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_a_flat_list_is_handed_to_the_marks_in_order_over_the_batch(processor, picture, other):
    texts = ["<image>a<image>b", "no picture", "<image>"]
    flat = processor(images=[picture, other, other], text=texts)
    nested = processor(images=[[picture, other], [], [other]], text=texts)
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert torch.equal(flat["input_ids"], nested["input_ids"])


def test_without_text_each_picture_or_each_inner_list_is_a_prompt(processor, picture, other):
    boi, eoi, _ = marks(processor)
    assert rows(processor(images=[picture, other])) == [[boi, eoi]] * 2
    assert rows(processor(images=[[picture, other], [other]])) == [[boi, eoi] * 2, [boi, eoi]]
    assert rows(processor(images=picture, generation_mode="image")) == [[boi, eoi, boi]]


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


def test_reference_compat_drops_the_alpha_of_pictures(processor):
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
def test_pictures_and_marks_that_disagree_are_named_with_prompt_and_numbers(processor, picture, text, images, message):
    images = [picture] * images if isinstance(images, int) else [[picture for _ in group] for group in images]
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_a_mark_without_any_picture_is_refused(processor):
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


def test_the_tokenizers_context_is_the_limit_where_none_is_given(tokenizer):
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


def test_codes_come_back_from_the_ids_of_image_mode_cut_at_the_end_mark(processor):
    boi, eoi, offset = marks(processor)
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([[offset + 3, offset + 1, eoi, pad, pad], [offset + 2, offset + 2, offset, offset + 23, eoi]])
    got = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [codes.tolist() for codes in got] == [[3, 1], [2, 2, 0, 23]]
    again = processor(text=["<image>", "<image>"], visual_tokens=got)
    assert rows(again) == [[boi, *ids[0, :3].tolist()], [boi, *ids[1].tolist()]]


def test_drawn_pictures_pass_through_image_mode(processor, picture):
    assert processor.post_process_multimodal_output([picture], generation_mode="image") == [picture]
    floats = torch.rand(2, 3, 4, 4)
    assert processor.post_process_multimodal_output(floats, generation_mode="image") is floats


def test_text_comes_back_without_marks_and_visual_ids(processor):
    boi, eoi, offset = marks(processor)
    ids = [[boi, offset + 1, eoi, *ids_of(processor, "two blue cats"), 2]]
    for mode in (None, "text"):
        got = processor.post_process_multimodal_output(torch.tensor(ids), generation_mode=mode)
        assert [text.strip() for text in got] == ["two blue cats"]
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == "two blue cats"


def test_interleaved_output_is_strings_and_codes_in_order(processor):
    boi, eoi, offset = marks(processor)
    before, after = ids_of(processor, "a cat"), ids_of(processor, "it is red")
    row = [*before, boi, offset + 7, offset + 8, eoi, boi, offset, eoi, *after, 2, 2]
    unfinished = [boi, offset + 9]
    got = processor.post_process_multimodal_output([row, unfinished], generation_mode="interleaved")
    shown = [[part.strip() if isinstance(part, str) else part.tolist() for part in parts] for parts in got]
    assert shown == [["a cat", [7, 8], [0], "it is red"], [[9]]]


def test_an_unknown_mode_of_the_output_is_refused(processor):
    with pytest.raises(ValueError, match="'audio'"):
        processor.post_process_multimodal_output([[1]], generation_mode="audio")


@pytest.mark.parametrize(
    ("text", "caption", "reference"),
    [
        (" a red apple. it is big. ", "a red apple", "a red apple"),
        ("the st. james church", "the st. james church", "the st"),
        ("a 3.5 inch disk.", "a 3.5 inch disk", "a 3"),
        ("a cat\na dog", "a cat", "a cat\na dog"),
        ("a cat", "a cat", "a cat"),
        ("", "", ""),
    ],
)
def test_a_caption_is_the_first_sentence(processor, text, caption, reference):
    assert processor.post_process_caption(text) == [caption]
    assert processor.post_process_caption([text], reference_compat=True) == [reference]


@pytest.mark.parametrize(
    ("text", "answer", "reference"),
    [
        (" red\nblue", "red", "red"),
        ("red Question: what?", "red", "red Question: what?"),
        ("red question: what?", "red", "red"),
        ("red, white and blue", "red, white and blue", "red"),
        ("no. it is big", "no", "no"),
        ("yes Long answer: it is", "yes", "yes"),
    ],
)
def test_an_answer_ends_before_whatever_else_the_model_says(processor, text, answer, reference):
    assert processor.post_process_answer(text) == [answer]
    assert processor.post_process_answer(text, reference_compat=True) == [reference]


def test_captions_and_answers_are_read_from_ids_and_the_prompt_is_taken_off(processor, picture):
    prompts = processor(images=[picture, picture], text=["<image>Question: what is it? Answer:", "<image>it is"])
    replies = ["a red apple. it", "two blue cats"]
    generated = [
        [*row, *ids_of(processor, reply), 2, 2]
        for row, reply in zip(prompts["input_ids"].tolist(), replies, strict=True)
    ]
    for post_process in (processor.post_process_answer, processor.post_process_caption):
        assert post_process(generated, input_ids=prompts["input_ids"]) == ["a red apple", "two blue cats"]
        twice = [row for row in generated for _ in range(2)]
        assert len(post_process(twice, input_ids=prompts["input_ids"])) == 4


def test_texts_have_the_ids_of_the_reference(reference):
    processor, expected = reference
    texts, ids = expected["text_tokenizer"]["texts"], expected["text_tokenizer"]["ids"]
    known = {text: row for text, row in zip(texts, ids, strict=True) if text}
    assert rows(processor(text=list(known))) == list(known.values())


def test_a_prompt_of_picture_and_text_has_the_ids_of_the_reference(reference):
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


@pytest.mark.parametrize("kind", ["captions", "answers"])
def test_generated_ids_become_the_texts_of_the_reference(reference, kind):
    processor, expected = reference
    post_process = {"captions": processor.post_process_caption, "answers": processor.post_process_answer}[kind]
    for case in expected[kind]:
        new_ids = [row[1:] for row in case["ids"]]  # the first id is the reference's placeholder
        assert post_process(new_ids, reference_compat=True) == case["text"], case["id"]


def test_a_broken_byte_costs_itself_alone(processor):
    byte_ids = processor.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "北京".encode()])
    ids = [[*ids_of(processor, "a cat"), *byte_ids[:-1], 2]]  # cut within the last letter, as a token limit may
    assert processor.post_process_caption(ids) == ["a cat北\ufffd\ufffd"]
    assert processor.post_process_caption([[*ids[0][:-1], byte_ids[-1], 2]]) == ["a cat北京"]
    assert processor.post_process_multimodal_output(ids) == ["a cat北\ufffd\ufffd"]


@pytest.mark.parametrize("text", ["a red apple", "two  spaces", "Question: café 北京?", "x\ny"])
def test_valid_text_is_decoded_as_by_the_tokenizer(processor, text):
    ids = [ids_of(processor, text)]
    assert processor.post_process_multimodal_output(ids) == processor.batch_decode(ids) == [text]


def test_lemmatisation_is_done_by_spacy_or_refused(processor):
    try:
        import spacy  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install spacy"):
            processor.post_process_answer("cats", lemmatize=True)
    else:
        assert processor.post_process_answer("Cats", lemmatize=True) == ["cat"]


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


def test_a_picture_alone_in_a_chat_asks_for_a_caption(processor, picture):
    inputs = processor.apply_chat_template(
        [message("user", {"image": picture})], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert torch.equal(inputs["input_ids"], processor(images=picture)["input_ids"])


@pytest.mark.parametrize("key", ["image", "path", "url", "base64"])
def test_chat_pictures_of_every_kind_reach_the_pixel_values(processor, picture, key):
    path = FIXTURES / "img0_96x60_RGB.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    source = {"image": picture, "path": str(path), "url": f"data:image/png;base64,{encoded}", "base64": encoded}[key]
    inputs = processor.apply_chat_template(
        [message("user", {key: source}, "what is it?")], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    want = processor(images=picture, text="<image>Question: what is it? Answer:")
    assert torch.equal(inputs["input_ids"], want["input_ids"])
    assert torch.equal(inputs["pixel_values"], want["pixel_values"])


def test_a_batch_of_chats_may_mix_pictures_and_none(processor, picture, other):
    chats = [[message("user", {"image": picture}, {"image": other}, "a?")], [message("user", "b?")]]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    want = processor(
        images=[[picture, other], []], text=["<image><image>Question: a? Answer:", "Question: b? Answer:"]
    )
    assert torch.equal(inputs["input_ids"], want["input_ids"]) and inputs["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("as_processor_kwarg", [True, False])
def test_a_chat_in_image_mode_is_its_own_text_and_ends_with_img(processor, picture, as_processor_kwarg):
    mode = {"generation_mode": "image"}
    options = {"processor_kwargs": mode} if as_processor_kwarg else mode
    inputs = processor.apply_chat_template(
        [message("user", {"image": picture}, "in watercolour")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **options,
    )
    want = processor(images=picture, text="<image>in watercolour", generation_mode="image")
    assert torch.equal(inputs["input_ids"], want["input_ids"])


def test_a_prefilled_answer_is_continued(processor):
    chat = [message("user", "what is it?"), message("assistant", "a red")]
    text = processor.apply_chat_template(chat, continue_final_message=True)
    assert text == "Question: what is it? Answer: a red"


def test_saving_and_loading_gives_an_equal_processor(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").is_file() and (tmp_path / "tokenizer.json").is_file()
    loaded = LavitProcessor.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text(), name
    assert loaded.codebook_size == CODEBOOK_SIZE
    assert loaded.chat_template == processor.chat_template and marks(loaded) == marks(processor)
    for call in (
        {"images": picture, "text": "<image>Question: what is it? Answer:"},
        {"text": ["a red apple", "two"], "generation_mode": "image"},
    ):
        before, after = processor(**call), loaded(**call)
        assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)


def test_autoprocessor_finds_it_beside_a_lavit_config(processor, tmp_path):
    LavitConfig().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LavitProcessor and type(loaded.image_processor) is LavitImageProcessor


def test_the_calls_of_the_transformers_pipelines_work(processor, picture):
    single = processor(images=[picture], text="<image>a", return_tensors="pt").to(dtype=torch.float16)
    assert single["pixel_values"].dtype == torch.float16 and single["input_ids"].dtype == torch.int64
    batch = processor(images=[picture, picture], text=["<image>a", "<image>a cat"], return_tensors="pt", padding=True)
    assert batch["input_ids"].shape[0] == 2
    text_only = processor(images=None, text=["a", "a cat"], return_tensors="pt", padding=True)
    assert "pixel_values" not in text_only
    assert len(processor.post_process_image_text_to_text(batch["input_ids"], skip_special_tokens=True)) == 2
