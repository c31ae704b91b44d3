"""LavitProcessor on the way out: ids back to texts and codes."""

import pytest
import torch
from PIL import Image
from trained_processor import FIXTURES, ids_of, marks, reference_processor, rows, trained_processor
from transformers import TextStreamer

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


def test_codes_come_back_from_the_ids_of_image_mode_cut_at_the_end_mark(processor):
    boi, eoi, offset = marks(processor)
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([[offset + 3, offset + 1, eoi, pad, pad], [offset + 2, offset + 2, offset, offset + 23, eoi]])
    got = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [codes.tolist() for codes in got] == [[3, 1], [2, 2, 0, 23]]
    again = processor(text=["<image>", "<image>"], visual_tokens=got)
    assert rows(again) == [[boi, *ids[0, :3].tolist()], [boi, *ids[1].tolist()]]


def test_drawn_images_pass_through_image_mode(processor, image):
    assert processor.post_process_multimodal_output([image], generation_mode="image") == [image]
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


def test_captions_and_answers_are_read_from_ids_and_the_prompt_is_taken_off(processor, image):
    prompts = processor(images=[image, image], text=["<image>Question: what is it? Answer:", "<image>it is"])
    replies = ["a red apple. it", "two blue cats"]
    generated = [
        [*row, *ids_of(processor, reply), 2, 2]
        for row, reply in zip(prompts["input_ids"].tolist(), replies, strict=True)
    ]
    for post_process in (processor.post_process_answer, processor.post_process_caption):
        assert post_process(generated, input_ids=prompts["input_ids"]) == ["a red apple", "two blue cats"]
        twice = [row for row in generated for _ in range(2)]
        assert len(post_process(twice, input_ids=prompts["input_ids"])) == 4


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


def test_images_show_in_decoded_ids_and_are_left_out_with_the_special_tokens(processor):
    boi, eoi, offset = marks(processor)
    text = ids_of(processor, "a cat")
    for ids, shown in (
        ([offset + 1, offset + 2, eoi], "[IMG:2 codes]"),
        ([*text, boi, offset, eoi, *text], "a cat[IMG:1 codes]a cat"),
        ([boi, offset, offset, eoi, boi, offset, eoi], "[IMG:2 codes][IMG:1 codes]"),
        ([*text, boi], "a cat[IMG]"),
        ([*text, boi, offset, offset], "a cat[IMG:2..."),
        ([boi, eoi, *text], "<image>a cat"),
    ):
        assert processor.decode(ids) == processor.decode(torch.tensor(ids)) == shown
        assert processor.batch_decode([ids, text]) == [shown, "a cat"]
        without = processor.decode(ids, skip_special_tokens=True)
        assert "IMG" not in without and without.count("a cat") == shown.count("a cat")


def test_a_streamer_that_is_given_the_processor_prints_the_marks_of_images(processor, capsys):
    boi, eoi, offset = marks(processor)
    streamer = TextStreamer(processor)
    ids = [*ids_of(processor, "a cat"), boi, *[offset + 3] * 12, eoi, *ids_of(processor, "is red")]
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert capsys.readouterr().out == "a cat[IMG:12 codes]is red\n"


def test_a_prompt_is_taken_off_id_by_id_even_if_it_ends_within_a_letter(processor):
    byte_ids = processor.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "北".encode()])
    prompt = [*ids_of(processor, "a cat"), *byte_ids[:2]]
    generated = [[*prompt, byte_ids[2], *ids_of(processor, "a dog"), 2]]
    for post_process in (processor.post_process_caption, processor.post_process_answer):
        assert post_process(generated, input_ids=[prompt]) == ["\ufffd a dog"]


def test_a_prompt_is_taken_off_wherever_it_is_padded_and_however_its_slots_are_filled(processor):
    boi, eoi, offset = marks(processor)
    text, answer, pad = ids_of(processor, "it is"), ids_of(processor, "red"), processor.tokenizer.pad_token_id
    prompt = [boi, eoi, *text]
    filled = [boi, offset + 1, offset + 2, eoi, *text]
    for given in (prompt, [pad, pad, *prompt], [*prompt, pad, pad]):
        for start in (prompt, filled, [pad, *prompt]):
            assert processor.post_process_answer([[*start, *answer, pad]], input_ids=[given]) == ["red"]


def test_prompts_that_do_not_belong_to_the_ids_are_refused(processor):
    ids = [ids_of(processor, "a cat")]
    for generated, prompts, message in (
        (ids, [ids_of(processor, "two")], "do not start with input_ids"),
        (ids * 3, ids * 2, "3 generated rows do not belong to 2 prompts"),
        (["a cat"], ids, "input_ids go with generated ids"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.post_process_caption(generated, input_ids=prompts)
