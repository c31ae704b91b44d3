"""generate() of images: guidance, caches, seeds, limits, and the equivalences that make it predictable."""

import pytest
import torch
from tiny import (
    BOI,
    CODE,
    END,
    EOI,
    NUM_PATCHES,
    PROMPTS,
    THREE,
    draw_images,
    left_padded,
    right_padded,
    seeded,
    tiny_images,
    tiny_model,
    tiny_text_config,
    without_padding,
)
from transformers import CompileConfig, GenerationConfig

from modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.decoding_lavit import draw, next_uniforms
from modeling_lavit.drafts_lavit import LavitDraftIndex, join_codes


# --- image mode ---


def test_image_mode_returns_codes_up_to_the_closing_id_and_padding_behind(model):
    rows = draw_images(model, PROMPTS * 4, generator=seeded(0))
    lengths = set()
    for row in rows:
        ids = row.tolist()
        end = ids.index(EOI)
        lengths.add(end)
        assert 4 <= end <= NUM_PATCHES
        assert all(CODE <= token < END for token in ids[:end])
        assert all(token == 2 for token in ids[end + 1 :])
    assert len(lengths) > 1


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_of_prompts_equals_each_prompt_alone(model, scale, do_sample):
    settings = {"guidance_scale": scale, "do_sample": do_sample}
    together = draw_images(model, PROMPTS, generator=[seeded(i) for i in range(3)], **settings)
    for index, prompt in enumerate(PROMPTS):
        alone = draw_images(model, [prompt], generator=seeded(index), **settings)
        assert without_padding(together[index]) == without_padding(alone[0])


def test_a_batch_of_prompts_with_images_equals_each_alone(model):
    pixels = tiny_images(3)
    rows = [[1, BOI, EOI, 40, BOI], [1, BOI, EOI, 7, BOI, EOI, BOI]]
    together = draw_images(model, rows, pixel_values=pixels, do_sample=False)
    alone = [
        draw_images(model, rows[:1], pixel_values=pixels[:1], do_sample=False),
        draw_images(model, rows[1:], pixel_values=pixels[1:], do_sample=False),
    ]
    assert [without_padding(row) for row in together] == [without_padding(row[0]) for row in alone]


def test_images_of_drawing_prompts_are_read_as_their_discrete_codes(model):
    pixels = tiny_images(1)
    codes = (model.get_image_tokens(pixels).codes + CODE).tolist()
    with_pixels = draw_images(model, [[1, BOI, EOI, 40, BOI]], pixel_values=pixels, do_sample=False)
    with_codes = draw_images(model, [[1, BOI, *codes, EOI, 40, BOI]], do_sample=False)
    assert torch.equal(with_pixels, with_codes)


def test_the_opening_id_is_appended_where_a_prompt_lacks_it(model):
    bare = [[1, 20, 30], [1, 33, BOI], [1, 70, 80, 90]]
    opened = [row if row[-1] == BOI else [*row, BOI] for row in bare]
    assert torch.equal(draw_images(model, bare, do_sample=False), draw_images(model, opened, do_sample=False))


def test_an_image_that_was_begun_is_continued(model):
    begun = [1, 20, BOI, CODE + 3, CODE + 9]
    new = draw_images(model, [begun], do_sample=False, min_image_tokens=6, max_image_tokens=6)
    assert new.shape[1] == 6 - 2 + 1
    assert new[0, -1] == EOI


@pytest.mark.parametrize("pad", [0, 2, 77, BOI, CODE + 1])
def test_the_pad_id_and_its_side_are_irrelevant(model, pad):
    expected = draw_images(model, PROMPTS, do_sample=False)
    for batch in (left_padded(PROMPTS, pad), right_padded(PROMPTS, pad)):
        new = model.generate(**batch, generation_mode="image", min_image_tokens=4, guidance_scale=3.0, do_sample=False)
        assert torch.equal(new, expected)


def test_batched_guidance_equals_two_separate_passes(model):
    scale, prompt = 3.0, PROMPTS[0]
    new = draw_images(model, [prompt], do_sample=False, guidance_scale=scale)[0].tolist()
    written: list[int] = []
    for token in new:
        conditional = model(torch.tensor([prompt + written])).logits[0, -1].log_softmax(-1)
        unconditional = model(torch.tensor([[BOI] + written])).logits[0, -1].log_softmax(-1)
        scores = unconditional + scale * (conditional - unconditional)
        allowed = torch.full_like(scores, float("-inf"))
        allowed[CODE:END] = 0
        if len(written) >= 4:
            allowed[EOI] = 0
        if len(written) == NUM_PATCHES:
            allowed[CODE:END] = float("-inf")
        assert int((scores + allowed).argmax()) == token
        written.append(token)
    unguided = draw_images(model, [prompt], do_sample=False, guidance_scale=None)[0].tolist()
    assert unguided != new


def test_a_guidance_scale_of_one_is_a_single_stream(model):
    for scale in (None, 1.0):
        out = model.generate(
            **left_padded(PROMPTS[:2]),
            generation_mode="image",
            guidance_scale=scale,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert out.past_key_values.layers[0].keys.shape[0] == 2


def test_a_negative_prompt_takes_the_place_of_the_unconditional_stream(model):
    scale, prompt, negative = 3.0, PROMPTS[1], [1, 50, 60, 70, BOI]
    new = draw_images(model, [prompt], do_sample=False, negative_prompt_ids=torch.tensor([negative]))[0].tolist()
    conditional = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    unconditional = model(torch.tensor([negative])).logits[0, -1].log_softmax(-1)
    scores = unconditional + scale * (conditional - unconditional)
    assert new[0] == CODE + int(scores[CODE:END].argmax())


def test_the_computed_rows_of_the_head_give_what_the_full_head_gives_masked(model, monkeypatch):
    expected = draw_images(model, PROMPTS, generator=seeded(3))
    ranges = set()
    compute = type(model)._compute_logits

    def compute_all(self, hidden_states, logit_range):
        ranges.add(logit_range)
        return compute(self, hidden_states, None)

    monkeypatch.setattr(type(model), "_compute_logits", compute_all)
    assert torch.equal(draw_images(model, PROMPTS, generator=seeded(3)), expected)
    assert ranges == {(EOI, END)}


@pytest.mark.parametrize("mode", ["image", "interleaved", "text"])
def test_a_static_cache_and_no_cache_equal_the_dynamic_cache(talkative, mode):
    rows = PROMPTS if mode == "image" else [row[:-1] for row in PROMPTS]
    settings = {"generation_mode": mode, "do_sample": False}
    if mode != "image":
        settings["max_new_tokens"] = 40
    if mode != "text":
        settings |= {"guidance_scale": 2.0, "min_image_tokens": 3}
    dynamic = talkative.generate(**left_padded(rows), **settings)
    static = talkative.generate(**left_padded(rows), cache_implementation="static", **settings)
    without = talkative.generate(**left_padded(rows), use_cache=False, **settings)
    assert torch.equal(static, dynamic)
    assert torch.equal(without, dynamic)


def test_a_compiled_decode_step_draws_the_same_image(model):
    torch.compiler.reset()
    settings = {"cache_implementation": "static", "do_sample": False, "max_image_tokens": 6}
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    compiled = draw_images(model, PROMPTS, compile_config=compile_config, **settings)
    assert torch.equal(compiled, draw_images(model, PROMPTS, **settings))


# --- seeds ---


def test_the_same_seed_draws_the_same_images_and_another_seed_others(model):
    first, again, other = (draw_images(model, PROMPTS, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert first.tolist() != other.tolist()


def test_without_a_generator_every_call_differs(model):
    draws = {str(draw_images(model, PROMPTS[:1]).tolist()) for _ in range(4)}
    assert len(draws) > 1


@pytest.mark.parametrize("generator", [None, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {"generation_mode": "image", "guidance_scale": 2.0},
        {"generation_mode": "interleaved", "max_new_tokens": 20},
        {"generation_mode": "text", "do_sample": True, "max_new_tokens": 5},
        {"generation_mode": "text", "do_sample": True, "num_beams": 2, "max_new_tokens": 5},
    ],
)
def test_the_global_random_state_is_left_untouched(model, settings, generator):
    before = torch.random.get_rng_state()
    generator = None if generator is None else seeded(generator)
    model.generate(**left_padded([row[:-1] for row in PROMPTS]), generator=generator, **settings)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_generator_makes_sampled_text_reproducible_with_and_without_beams(model):
    for beams in (1, 2):
        draws = [
            model.generate(
                torch.tensor([[1, 20]]), do_sample=True, num_beams=beams, max_new_tokens=8, generator=seeded(seed)
            ).tolist()
            for seed in (3, 3, 4)
        ]
        assert draws[0] == draws[1] != draws[2]


def test_several_images_per_prompt_are_distinct_draws_that_equal_single_ones(model):
    generators = [seeded(seed) for seed in range(6)]
    rows = draw_images(model, PROMPTS[:2], num_return_sequences=3, generator=generators)
    assert rows.shape[0] == 6
    drawn = [tuple(without_padding(row)) for row in rows]
    assert len(set(drawn)) == 6
    for index in (1, 5):
        alone = draw_images(model, [PROMPTS[index // 3]], generator=seeded(index))
        assert drawn[index] == tuple(without_padding(alone[0]))


def test_a_single_generator_gives_each_row_a_seed_of_its_own(model):
    rows = draw_images(model, PROMPTS[:1], num_return_sequences=4, generator=seeded(9))
    assert len({tuple(without_padding(row)) for row in rows}) == 4
    seeds = torch.randint(2**63 - 1, (4,), generator=seeded(9)).tolist()
    alone = draw_images(model, PROMPTS[:1], generator=seeded(seeds[2]))
    assert without_padding(rows[2]) == without_padding(alone[0])


def test_sampling_follows_temperature_top_k_and_top_p(model):
    greedy = draw_images(model, PROMPTS, do_sample=False).tolist()
    for settings in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert draw_images(model, PROMPTS, generator=seeded(1), **settings).tolist() == greedy
    assert draw_images(model, PROMPTS, generator=seeded(1), top_k=0, temperature=1.5).tolist() != greedy


def test_drawn_ids_follow_their_probabilities_and_never_have_none():
    probabilities = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]]).repeat(2, 1)
    generators = [seeded(0), seeded(1)]
    drawn = torch.stack([draw(probabilities, next_uniforms(generators)) for _ in range(2000)])
    for row in range(2):
        shares = torch.bincount(drawn[:, row], minlength=6) / 2000
        torch.testing.assert_close(shares, probabilities[0], atol=0.04, rtol=0)
        assert shares[probabilities[0] == 0].sum() == 0


# --- looking ahead ---


class Forwards:
    """Counts a model's forwards."""

    def __init__(self, model):
        self.count = 0
        self.hook = model.model.register_forward_pre_hook(self)

    def __call__(self, module, arguments):
        self.count += 1


def knowing(*images: list[int]):
    """A tiny model that knows some images' codes."""
    knows = tiny_model()
    knows.set_draft_codes([torch.tensor(codes) for codes in images])
    return knows


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("draft_length", [1, 5])
def test_looking_ahead_writes_the_same_images_and_uses_up_the_same_numbers(model, scale, do_sample, draft_length):
    settings = {"guidance_scale": scale, "do_sample": do_sample}
    # images that the model will draw, some of them changed on the way
    drawn = [
        [
            id - CODE
            for id in draw_images(model, PROMPTS[1:2], generator=seeded(i), **settings)[0].tolist()
            if id != EOI
        ]
        for i in range(3)
    ]
    others = [[*codes[:5], 0, *codes[6:]] for codes in drawn]
    knows = knowing(*drawn[1:], *others)
    forwards = Forwards(knows)
    for prompts in (PROMPTS, PROMPTS[1:2]):
        for first in range(3):
            plain, looking = ([seeded(first + i) for i in range(len(prompts))] for _ in range(2))
            expected = draw_images(model, prompts, generator=plain, **settings)
            forwards.count = 0
            images = draw_images(knows, prompts, generator=looking, draft_length=draft_length, **settings)
            assert images.tolist() == expected.tolist()
            assert [torch.rand(1, generator=one) for one in looking] == [torch.rand(1, generator=one) for one in plain]
            if len(prompts) == 1:
                assert forwards.count < expected.shape[1]


def test_a_known_image_is_drawn_in_few_forwards(model):
    limits = {"min_image_tokens": 12, "max_image_tokens": 12, "generator": seeded(0)}
    expected = draw_images(model, PROMPTS[:1], **limits)
    knows = knowing((expected[0, :-1] - CODE).tolist())
    forwards = Forwards(knows)
    limits["generator"] = seeded(0)
    images = draw_images(knows, PROMPTS[:1], **limits)  # draft_length comes from the preset
    assert images.tolist() == expected.tolist()
    assert forwards.count == 4  # two codes, eight and one more, then two of which one is [/IMG]
    forwards.count, limits["generator"] = 0, seeded(0)
    assert draw_images(knows, PROMPTS[:1], draft_length=0, **limits).tolist() == expected.tolist()
    assert forwards.count == 13


def test_known_images_are_saved_with_the_model_and_can_be_taken_away(tmp_path):
    knows = knowing([1, 2, 3], [4, 5])
    knows.save_pretrained(tmp_path)
    again = type(knows).from_pretrained(tmp_path)
    assert again.draft_codes.tolist() == knows.draft_codes.tolist() == [1, 2, 3, -1, 4, 5, -1]
    again.set_draft_codes([])
    again.save_pretrained(tmp_path / "without")
    without = type(knows).from_pretrained(tmp_path / "without")
    assert without.draft_codes is None
    assert not (tmp_path / "without" / "draft_codes.safetensors").exists()


def test_known_images_need_codes_of_the_codebook(model):
    for codes in (torch.tensor([0, END - CODE]), torch.tensor([-1, 2]), torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match="must be codes"):
            model.set_draft_codes([codes])
    assert model.draft_codes is None


def test_the_continuation_is_that_of_the_longest_end_that_is_known():
    index = LavitDraftIndex(join_codes([torch.tensor(codes) for codes in ([1, 2, 3, 4], [9, 2, 3, 5, 6], [7, 8])]))
    assert index.continuation([9, 2, 3], 8) == [5, 6, -1]
    assert index.continuation([1, 2, 3], 8) == [4, -1]
    assert index.continuation([0, 1, 2, 3], 1) == [4]
    assert index.continuation([5, 6], 3) == [-1]
    assert index.continuation([7, 8], 3) == [-1]
    for nothing in ([4, 9], [6, 7], [3], []):
        assert index.continuation(nothing, 3) == []


@torch.no_grad()
@pytest.mark.slow
def test_looking_ahead_leaves_the_distribution_of_images_as_it_is(model):
    """Pearson's test on three codes of 300 images, their probabilities computed one by one; the third is looked up."""
    scale, top_k, draws = 3.0, 2, 300

    def next_probabilities(codes):
        logits = [model(torch.tensor([[*start, *codes]])).logits[0, -1] for start in (PROMPTS[1], [BOI])]
        conditional, unconditional = (each.log_softmax(-1) for each in logits)
        scores = (unconditional + scale * (conditional - unconditional))[CODE:END]
        best = scores.topk(top_k)
        return {CODE + code: p for code, p in zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True)}

    expected = {
        (first, second, third): p * q * r
        for first, p in next_probabilities([]).items()
        for second, q in next_probabilities([first]).items()
        for third, r in next_probabilities([first, second]).items()
    }
    counts = dict.fromkeys(expected, 0)
    generator = seeded(0)
    knows = knowing(*([code - CODE for code in codes] for codes in list(expected)[::2]))
    for _ in range(draws):
        ids = draw_images(
            knows, PROMPTS[1:2], **THREE, guidance_scale=scale, top_k=top_k, generator=generator, draft_length=2
        )
        counts[tuple(ids[0, :3].tolist())] += 1
    frequent = [codes for codes in expected if draws * expected[codes] >= 5]
    statistic = sum((counts[codes] - draws * expected[codes]) ** 2 / (draws * expected[codes]) for codes in frequent)
    assert len(frequent) > 2
    # the 99.9th percentile of chi square with seven degrees of freedom, the most there can be
    assert statistic < 24.3


def test_looking_ahead_needs_known_images_image_mode_and_a_cache_that_can_be_cut(model):
    knows = knowing([1, 2, 3])
    for settings, message in (
        ({"generation_mode": "interleaved"}, "draft_length"),
        ({"generation_mode": "text"}, "draft_length"),
        ({"draft_length": -1}, "draft_length"),
        ({"reference_compat": True}, "draft_length"),
        ({"cache_implementation": "static"}, "dynamic cache"),
        ({"num_beams": 2, "guidance_scale": None}, "num_beams"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_images(knows, PROMPTS, **({"draft_length": 3} | settings))
    with pytest.raises(ValueError, match="set_draft_codes"):
        draw_images(model, PROMPTS, draft_length=3)


# --- limits and errors ---


def test_limits_of_image_tokens_hold(model):
    rows = draw_images(model, PROMPTS * 2, min_image_tokens=5, max_image_tokens=7, generator=seeded(2))
    assert {row.tolist().index(EOI) for row in rows} <= {5, 6, 7}
    exact = draw_images(model, PROMPTS, min_image_tokens=6, max_image_tokens=6, generator=seeded(2))
    assert [row.tolist().index(EOI) for row in exact] == [6, 6, 6]


def test_a_general_limit_on_new_ids_counts_the_closing_id(model):
    rows = draw_images(model, PROMPTS, max_new_tokens=4, generator=seeded(2))
    assert [row.tolist().index(EOI) for row in rows] == [3, 3, 3]


def test_default_limits_are_clamped_to_the_number_of_patches(model):
    rows = model.generate(**left_padded(PROMPTS), generation_mode="image", generator=seeded(2))
    assert [row.tolist().index(EOI) for row in rows] == [NUM_PATCHES] * 3


def test_a_model_can_carry_better_image_defaults(model, tmp_path):
    own = tiny_model()
    own.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=2, generation_presets={"image": {"max_image_tokens": 3, "guidance_scale": 2.0}}
    )
    own.save_pretrained(tmp_path)
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path)
    new = loaded.generate(**left_padded(PROMPTS), generation_mode="image", generator=seeded(0))
    assert torch.equal(new, draw_images(model, PROMPTS, guidance_scale=2.0, generator=seeded(0), **THREE))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"generation_mode": "video"}, "generation_mode must be one of"),
        ({"generation_preset": "poem"}, "generation_preset must be one of"),
        ({"generation_mode": "image", "min_image_tokens": 9, "max_image_tokens": 8}, "9 is above max_image_tokens 8"),
        ({"generation_mode": "image", "max_image_tokens": 0}, "must be positive"),
        ({"generation_mode": "image", "max_length": 9}, "max_image_tokens limits the length"),
        ({"generation_mode": "image", "generator": [seeded(0)] * 3}, "3 generators were given for 2 rows"),
        ({"generation_mode": "image", "num_beams": 2, "do_sample": False, "guidance_scale": 2.0}, "beams"),
        ({"generation_mode": "image", "pixel_values": tiny_images(1)}, "0 image slots.*1 images"),
        ({"pixel_values": tiny_images(2)}, "0 image slots.*2 images"),
        ({"guidance_scale": 2.0}, "generation_mode is 'text'"),
        ({"generation_mode": "interleaved", "reference_compat": True}, "no interleaved mode"),
        ({"generation_mode": "interleaved", "max_new_tokens": 254}, "context of the language model is 256"),
        ({"generation_mode": "image", "do_sample": False, "num_return_sequences": 2}, "num_return_sequences"),
        ({"generation_mode": "image", "tempratur": 2.0}, "tempratur"),
    ],
)
def test_settings_that_cannot_be_met_are_an_error(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, 20, 30], [1, 40, 50]]), **settings)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_slot_without_its_image_is_an_error_in_every_mode(model, mode):
    with pytest.raises(ValueError, match="1 image slots.*0 images"):
        model.generate(torch.tensor([[1, BOI, EOI, 30]]), generation_mode=mode)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_prompt_longer_than_the_context_is_an_error_in_every_mode(mode):
    short = tiny_model(text_config=tiny_text_config(max_position_embeddings=40))
    with pytest.raises(ValueError, match="41 positions.*context of the language model is 40"):
        short.generate(torch.full((1, 40 + (mode != "image")), 5), generation_mode=mode)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_an_empty_prompt_is_an_error_in_every_mode(model, mode):
    ids = torch.tensor([[1, 20], [2, 2]])
    with pytest.raises(ValueError, match=r"prompts \[1\] are empty"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1], [0, 0]]), generation_mode=mode)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("knows", [False, True])
def test_finished_rows_leave_the_forwards_and_the_others_do_not_notice(scale, knows):
    model = tiny_model()
    settings = {"guidance_scale": scale, "min_image_tokens": 1}
    if knows:  # the last row that is left looks ahead
        model.set_draft_codes([torch.arange(24), torch.arange(24).flip(0)])
    counts = []
    model.model.language_model.register_forward_hook(lambda *call: counts.append(len(call[2].last_hidden_state)))
    prompts, together = PROMPTS * 3, [seeded(i) for i in range(9)]
    images = draw_images(model, prompts, generator=together, **settings)
    lengths = [len(without_padding(image)) for image in images]
    assert len(set(lengths)) > 1
    if not knows:
        streams = 1 if scale is None else 2
        assert counts == [streams * sum(length > step for length in lengths) for step in range(max(lengths))]
    for index, prompt in enumerate(prompts):
        alone = seeded(index)
        image = draw_images(model, [prompt], generator=alone, **settings)
        assert without_padding(images[index]) == without_padding(image[0])
        # so many numbers were used up
        assert torch.equal(alone.get_state(), together[index].get_state())


def test_everything_is_returned_for_every_row_where_scores_are_asked_for(model):
    settings = {"generator": seeded(0), "min_image_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    out = draw_images(model, PROMPTS * 3, **settings)
    assert len(out.scores) == out.sequences.shape[1]
    assert all(len(scores) == 9 for scores in out.scores)
