"""generate(): interleaved sequences, text, outputs, and serving."""

import pytest
import torch
from tiny import (
    BOI,
    CODE,
    END,
    EOI,
    PROMPTS,
    THREE,
    draw_images,
    left_padded,
    seeded,
    tiny_config,
    tiny_images,
    tiny_model,
    without_padding,
)
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from modeling_lavit.decoding_lavit import row_generators
from modeling_lavit.logits_lavit import LavitGrammarLogitsProcessor


# --- interleaved mode ---


def test_interleaved_sequences_follow_the_grammar(talkative):
    prompts = [row[:-1] for row in PROMPTS]
    batch = left_padded(prompts)
    out = talkative.generate(
        **batch,
        generation_mode="interleaved",
        min_image_tokens=3,
        max_image_tokens=5,
        guidance_scale=2.0,
        max_new_tokens=60,
        generator=seeded(0),
    )
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    num_images = 0
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        count = None
        for token in row:
            if count is None:
                assert token <= BOI
                count = 0 if token == BOI else None
            elif token == EOI:
                assert 3 <= count <= 5
                num_images, count = num_images + 1, None
            else:
                assert CODE <= token < END
                count += 1
        assert count is None
    assert num_images >= 3


def test_interleaved_mode_ends_at_eos_and_pads(talkative):
    ends_soon = tiny_model()
    with torch.no_grad():
        ends_soon.lm_head.weight.copy_(talkative.lm_head.weight)
        ends_soon.lm_head.weight[9] = ends_soon.lm_head.weight[BOI]
    out = ends_soon.generate(
        **left_padded([[1, 20], [1, 30]]),
        generation_mode="interleaved",
        **THREE,
        eos_token_id=9,
        pad_token_id=4,
        max_new_tokens=80,
        generator=seeded(1),
    )
    for row in out[:, 2:].tolist():
        assert 9 in row
        assert set(row[row.index(9) + 1 :]) <= {4}


def test_an_image_inside_interleaved_text_is_guided_as_in_image_mode(talkative):
    out = talkative.generate(
        **left_padded([[1, 20], [1, 30, 40, 50]]),
        generation_mode="interleaved",
        **THREE,
        guidance_scale=3.0,
        do_sample=False,
        max_new_tokens=40,
    )
    checked = 0
    for row in out.tolist():
        row = row[row.index(1) :]
        starts = [index for index, token in enumerate(row) if token == BOI]
        for start in starts:
            again = talkative.generate(
                torch.tensor([row[: start + 1]]),
                generation_mode="image",
                **THREE,
                guidance_scale=3.0,
                do_sample=False,
            )
            assert again[0].tolist() == row[start + 1 : start + 5]
            checked += 1
    assert checked >= 4


def test_interleaved_batches_equal_each_prompt_alone(talkative):
    prompts = [row[:-1] for row in PROMPTS]
    settings = {"generation_mode": "interleaved", "guidance_scale": 2.0, "max_new_tokens": 30, **THREE}
    together = talkative.generate(**left_padded(prompts), generator=[seeded(i) for i in range(3)], **settings)
    for index, prompt in enumerate(prompts):
        alone = talkative.generate(torch.tensor([prompt]), generator=seeded(index), **settings)
        new = alone[0, len(prompt) :].tolist()
        assert together[index, max(map(len, prompts)) :].tolist()[: len(new)] == new


def test_no_image_is_opened_that_could_not_be_finished():
    vocabulary = tiny_config().vocabulary
    grammar = LavitGrammarLogitsProcessor(vocabulary, min_image_tokens=3, max_image_tokens=5, max_length=8)
    scores = torch.zeros(1, END)
    assert grammar(torch.tensor([[1, 2, 3]]), scores)[0, BOI] == 0
    assert grammar(torch.tensor([[1, 2, 3, 4]]), scores)[0, BOI] == float("-inf")
    closing = grammar(torch.tensor([[1, 2, BOI, CODE, CODE, CODE, CODE]]), scores)[0]
    assert closing.isfinite().nonzero().flatten().tolist() == [EOI]


# --- text mode ---


def test_text_mode_never_writes_visual_ids_though_the_model_prefers_them(talkative):
    prompts = left_padded([row[:-1] for row in PROMPTS])
    assert (talkative(**prompts).logits.argmax(-1) >= BOI).any()
    for settings in ({}, {"do_sample": True, "generator": seeded(0)}, {"num_beams": 3}, {"reference_compat": True}):
        out = talkative.generate(**prompts, max_new_tokens=12, **settings)
        assert (out[:, prompts["input_ids"].shape[1] :] < BOI).all()


def test_text_is_returned_behind_the_prompt_as_it_was_given(model):
    batch = left_padded([[1, BOI, EOI, 40], [1, 20, 21, BOI, EOI, 40]])
    out = model.generate(**batch, pixel_values=tiny_images(2), max_new_tokens=6)
    assert torch.equal(out[:, :6], batch["input_ids"])
    assert out.shape[1] <= 12


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_batch_of_images_is_described_as_each_alone(model, settings):
    pixels, rows = tiny_images(3), [[1, BOI, EOI, 40], [1, 20, 21, BOI, EOI], [BOI, EOI]]
    sampled = "do_sample" in settings
    generators = [seeded(i) for i in range(3)] if sampled else None
    together = model.generate(
        **left_padded(rows), pixel_values=pixels, max_new_tokens=8, generator=generators, **settings
    )
    for index, row in enumerate(rows):
        alone = model.generate(
            torch.tensor([row]),
            pixel_values=pixels[index : index + 1],
            max_new_tokens=8,
            generator=seeded(index) if sampled else None,
            **settings,
        )
        assert together[index, 5:].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_a_long_prompt_is_computed_once_for_all_its_rows(model, settings):
    rows = [[1, BOI, EOI, *range(3, 33)], [BOI, EOI, *range(3, 38)]]
    read = {**left_padded(rows), "pixel_values": tiny_images(2), "max_new_tokens": 6, **settings}
    computed, images = [], []

    def count_rows(module, args, kwargs):
        given = kwargs["input_ids"] if kwargs["inputs_embeds"] is None else kwargs["inputs_embeds"]
        computed.append(tuple(given.shape[:2]))

    def count_images(module, args, kwargs):
        images.append(len(kwargs["inputs_embeds"]))

    parts = {model.model.language_model: count_rows, model.model.visual_tokenizer.encoder.encoder: count_images}
    hooks = [part.register_forward_pre_hook(count, with_kwargs=True) for part, count in parts.items()]
    try:
        shared = model.generate(**read, generator=seeded(0))
    finally:
        for hook in hooks:
            hook.remove()
    (prompts, positions), (rows_that_go_on, step) = computed[:2]
    assert (prompts, step) == (2, 1) and positions > 32 and rows_that_go_on > 2
    assert images == [2]
    # what is returned of every position is computed for every row
    apart = model.generate(**read, generator=seeded(0), return_dict_in_generate=True)
    assert torch.equal(shared, apart.sequences)


def test_text_reads_continuous_features_and_equals_steps_of_forward(model):
    pixels, ids = tiny_images(1), torch.tensor([[1, BOI, EOI, 40]])
    new = model.generate(ids, pixel_values=pixels, max_new_tokens=5, eos_token_id=None)[0, 4:].tolist()
    for index, token in enumerate(new):
        so_far = torch.cat([ids, torch.tensor([new[:index]], dtype=torch.long)], dim=1)
        logits = model(so_far, pixel_values=pixels).logits[0, -1, :BOI]
        assert int(logits.argmax()) == token


def test_presets_name_the_settings_of_captions_and_answers(model):
    prompt, pixels = torch.tensor([[BOI, EOI]]), tiny_images(1)
    caption = model.generate(prompt, pixel_values=pixels, generation_preset="caption")
    by_hand = model.generate(prompt, pixel_values=pixels, num_beams=2, min_new_tokens=8, max_new_tokens=36)
    assert torch.equal(caption, by_hand)
    answer = model.generate(prompt, pixel_values=pixels, generation_preset="answer")
    by_hand = model.generate(
        prompt,
        pixel_values=pixels,
        num_beams=5,
        min_new_tokens=2,
        max_new_tokens=10,
        length_penalty=0.0,
        early_stopping=True,
    )
    assert torch.equal(answer, by_hand)
    short = model.generate(prompt, pixel_values=pixels, generation_preset="caption", max_new_tokens=9)
    assert short.shape[1] <= 2 + 9


def test_a_model_can_override_a_preset(model):
    own = tiny_model()
    own.generation_config.generation_presets = {"caption": {"max_new_tokens": 9}, "haiku": {"max_new_tokens": 3}}
    prompt, pixels = torch.tensor([[BOI, EOI]]), tiny_images(1)
    caption = own.generate(prompt, pixel_values=pixels, generation_preset="caption")
    by_hand = model.generate(prompt, pixel_values=pixels, num_beams=2, min_new_tokens=8, max_new_tokens=9)
    assert torch.equal(caption, by_hand)
    assert own.generate(prompt, pixel_values=pixels, generation_preset="haiku").shape[1] <= 2 + 3


def test_text_features_of_transformers_go_on_working(model):
    prompt = torch.tensor([[1, 20, 30, 20, 30, 20]])
    expected = model.generate(prompt, max_new_tokens=8)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=8), expected)
    stock = LlamaForCausalLM(model.config.text_config).eval()
    assert torch.equal(model.generate(prompt, assistant_model=stock, max_new_tokens=8), expected)
    penalised = model.generate(prompt, repetition_penalty=1e4, max_new_tokens=8)[0, 6:].tolist()
    assert len(set(penalised)) == len(penalised)
    pinned = model.generate(prompt, prefix_allowed_tokens_fn=lambda row, ids: [17], max_new_tokens=3)
    assert pinned[0, 6:].tolist() == [17, 17, 17]


def test_generation_goes_on_from_a_cache(model):
    prompt = torch.tensor([[1, 20, 30]])
    whole = model.generate(prompt, max_new_tokens=8, eos_token_id=None)
    first = model.generate(prompt, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(rest, whole)


# --- outputs ---


class RecordingStreamer(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_streamer_gets_the_prompt_and_then_every_id(model, mode):
    streamer, prompt = RecordingStreamer(), torch.tensor([[1, 20, BOI]] if mode == "image" else [[1, 20, 30]])
    settings = {} if mode == "image" else {"max_new_tokens": 6}
    if mode != "text":
        settings |= {"guidance_scale": 2.0, "generator": seeded(0)}
    out = model.generate(prompt, generation_mode=mode, streamer=streamer, **settings)
    assert streamer.ended
    assert streamer.chunks[0] == prompt.tolist()
    new = out[0] if mode == "image" else out[0, 3:]
    assert [chunk[0] for chunk in streamer.chunks[1:]] == new.tolist()


def test_return_dict_has_sequences_scores_and_logits_of_every_step(model):
    out = draw_images(
        model,
        PROMPTS,
        generator=seeded(0),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        max_image_tokens=5,
    )
    steps = out.sequences.shape[1]
    assert len(out.scores) == len(out.logits) == steps
    assert out.scores[0].shape == (3, END)
    assert out.logits[0].shape == (6, END)  # both streams
    assert torch.equal(out.sequences, draw_images(model, PROMPTS, generator=seeded(0), max_image_tokens=5))


def test_stopping_criteria_see_the_prompt_and_what_was_written(model):
    lengths = []

    def observe(input_ids, scores, **kwargs):
        lengths.append(tuple(input_ids.shape))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    new = draw_images(model, PROMPTS, do_sample=False, stopping_criteria=[observe])
    assert lengths == [(3, 8), (3, 9)]
    assert new.shape == (3, 2)


def test_beams_without_guidance_draw_whole_images(model):
    rows = draw_images(model, PROMPTS, num_beams=3, num_return_sequences=2, do_sample=False, guidance_scale=None)
    assert rows.shape[0] == 6
    for row in rows:
        ids = without_padding(row)
        assert ids[-1] == EOI and all(CODE <= token < END for token in ids[:-1])


def test_reference_compat_allows_what_the_reference_allows():
    odd = tiny_model()
    with torch.no_grad():
        odd.lm_head.weight[3:] *= 0.1
    drawn = odd.generate(**left_padded(PROMPTS), generation_mode="image", reference_compat=True, do_sample=False)
    assert (drawn < 3).any()
    assert not ((drawn >= 3) & (drawn < BOI)).any()
    codes = [1, CODE + 3, CODE + 4, 20, BOI]
    settings = {"reference_compat": True, "do_sample": False, "min_image_tokens": 1}
    limited = odd.generate(torch.tensor([codes]), generation_mode="image", **settings)
    assert limited.shape[1] <= 4


def test_reference_compat_draws_all_rows_jointly(model):
    scores = model(torch.tensor(PROMPTS[1:2])).logits[:, -1].float()
    scores[:, 3:BOI] = float("-inf")
    scores[:, EOI] = float("-inf")
    expected = torch.multinomial(scores.softmax(-1), 1, generator=seeded(4))
    drawn = model.generate(
        torch.tensor(PROMPTS[1:2]),
        generation_mode="image",
        reference_compat=True,
        guidance_scale=1.0,
        top_k=0,
        generator=seeded(4),
    )
    assert drawn[0, 0] == expected[0, 0]


def test_segments_split_at_brackets_and_between_kinds(model):
    row = [1, 20, BOI, CODE, CODE + 5, EOI, BOI, CODE + 1, EOI, 30, BOI, EOI, 2]
    segments = [(kind, ids.tolist()) for kind, ids in model.split_segments(torch.tensor(row))]
    assert segments == [("text", [1, 20]), ("image", [0, 5]), ("image", [1]), ("text", [30]), ("text", [2])]
    assert [kind for kind, _ in model.split_segments([CODE, CODE + 1, EOI, 2])] == ["image", "text"]


def test_image_ids_decode_to_codes_or_through_the_attached_decoder(model):
    rows = torch.tensor([[CODE + 3, CODE + 1, EOI, 2], [CODE + 2, 2, CODE, EOI], [EOI, CODE + 7, 2, 2]])
    assert [codes.tolist() for codes in model.decode_image_tokens(rows)] == [[3, 1], [2, 0], []]
    attached = tiny_model()
    keys = attached.state_dict().keys()
    attached.set_pixel_decoder(lambda visual_tokens: [f"image of {len(codes)}" for codes in visual_tokens.split()])
    assert attached.decode_image_tokens(rows) == ["image of 2", "image of 2", "image of 0"]
    attached.set_pixel_decoder(torch.nn.Linear(1, 1))
    assert attached.state_dict().keys() == keys
    attached.set_pixel_decoder(None)
    assert attached.decode_image_tokens(rows)[0].tolist() == [3, 1]


def test_tokenised_prompts_hold_the_images_codes_and_no_padding(model):
    pixels = tiny_images(2)
    first, second = model.get_image_tokens(pixels).split()
    prompts = model.tokenize_prompt(**left_padded([[1, BOI, EOI, 40], [1, 5, 6, 7, BOI, EOI]]), pixel_values=pixels)
    assert prompts == [
        [1, BOI, *(first + CODE).tolist(), EOI, 40],
        [1, 5, 6, 7, BOI, *(second + CODE).tolist(), EOI],
    ]


@pytest.mark.parametrize("mode", ["text", "image"])
def test_continuous_batching_on_tokenised_prompts_equals_generate(mode):
    served, small = tiny_model(), ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    batch = left_padded([[1, BOI, EOI, 40], [1, 5, 6, BOI, EOI]])
    prompts = served.tokenize_prompt(**batch, pixel_values=tiny_images(2))
    if mode == "image":
        prompts = [[*prompt, BOI] for prompt in prompts]
        settings = {"do_sample": False, "min_image_tokens": 0, "max_image_tokens": 7}
        expected = [
            served.generate(torch.tensor([prompt]), generation_mode="image", **settings)[0, :7].tolist()
            for prompt in prompts
        ]
        outputs = served.generate_batch(
            prompts, generation_mode="image", max_image_tokens=7, continuous_batching_config=small, do_sample=False
        )
    else:
        expected = [
            served.generate(torch.tensor([prompt]), max_new_tokens=7)[0, len(prompt) :].tolist() for prompt in prompts
        ]
        outputs = served.generate_batch(
            prompts,
            GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=2, do_sample=False),
            continuous_batching_config=small,
        )
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_row_generators_copy_no_state_between_rows():
    first, second = row_generators(seeded(0), 2)
    assert first.initial_seed() != second.initial_seed()
    assert row_generators([first, second], 2) == [first, second]
