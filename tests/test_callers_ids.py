"""Everything that comes out speaks the ids that the caller gave: outputs, conversations with a cache, lengths."""

import copy

import pytest
import torch
from tiny import (
    BOI,
    CODE,
    EOI,
    left_padded,
    right_padded,
    seeded,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_tokenizer,
)
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor

from modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.compat_lavit import CACHE_NAME


GREEDY = {"eos_token_id": None, "return_dict_in_generate": True}


def continued(model, ids, cache, **kwargs):
    return model.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY, **kwargs)


def whole(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=5, **GREEDY, **kwargs)


def assert_same(first, second):
    assert first.sequences.tolist() == second.sequences.tolist()
    for one, other in zip(first.scores, second.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pixels_again", [True, False])
@pytest.mark.parametrize("num_images", [1, 2])
def test_a_chat_with_images_goes_on_from_its_cache(model, num_images, pixels_again):
    pixels = tiny_images(num_images)
    ids = torch.tensor([[1, 20] + [BOI, EOI, 30] * num_images])
    first = whole(model, ids, pixel_values=pixels)
    further = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    expected = whole(model, further, pixel_values=pixels, output_scores=True)
    given = {"pixel_values": pixels} if pixels_again else {}
    second = continued(model, further, first.past_key_values, output_scores=True, **given)
    assert_same(second, expected)
    # and a third turn
    further = torch.cat([second.sequences, torch.tensor([[11, 12]])], dim=1)
    expected = whole(model, further, pixel_values=pixels, output_scores=True)
    assert_same(continued(model, further, second.past_key_values, output_scores=True), expected)


def test_a_second_turn_may_bring_a_second_image(model):
    pixels = tiny_images(2)
    first = whole(model, torch.tensor([[1, BOI, EOI, 30]]), pixel_values=pixels[:1])
    further = torch.cat([first.sequences, torch.tensor([[7, BOI, EOI, 9]])], dim=1)
    expected = whole(model, further, pixel_values=pixels, output_scores=True)
    for given in (pixels, pixels[1:]):
        cache = copy.deepcopy(first.past_key_values)
        assert_same(continued(model, further, cache, output_scores=True, pixel_values=given), expected)


@pytest.mark.parametrize("padded", [left_padded, right_padded])
def test_chats_of_a_batch_go_on_from_one_cache(model, padded):
    pixels, rows = tiny_images(3), [[1, BOI, EOI, 30], [1, 20, 21, BOI, EOI, 22, BOI, EOI], [1, 40]]
    batch = padded(rows)
    first = model.generate(**batch, pixel_values=pixels, max_new_tokens=4, **GREEDY)
    turn = torch.tensor([[7, 8, 9]] * 3)
    further = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 7, dtype=torch.long)], dim=1)
    settings = {"attention_mask": mask, "output_scores": True}
    expected = whole(model, further, pixel_values=pixels, **settings)
    assert_same(continued(model, further, first.past_key_values, **settings), expected)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_text_goes_on_from_the_cache_of_a_drawn_image(model, scale):
    ids = torch.tensor([[1, 20, BOI]])
    settings = {"generation_mode": "image", "guidance_scale": scale, "generator": seeded(0)}
    drawn = model.generate(ids, return_dict_in_generate=True, **settings)
    further = torch.cat([ids, drawn.sequences, torch.tensor([[7, 8]])], dim=1)
    assert EOI in drawn.sequences
    expected = whole(model, further, output_scores=True)
    assert_same(continued(model, further, drawn.past_key_values, output_scores=True), expected)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("count", [1, 2])
def test_an_image_is_drawn_behind_a_chat_with_an_image(model, scale, count):
    pixels = tiny_images(1)
    first = whole(model, torch.tensor([[1, BOI, EOI, 30]]), pixel_values=pixels)
    further = torch.cat([first.sequences, torch.tensor([[7, BOI]])], dim=1)
    settings = {"generation_mode": "image", "guidance_scale": scale, "top_k": 1, "num_return_sequences": count}
    drawn = model.generate(further, past_key_values=first.past_key_values, **settings)
    # the image is read as features, as in the cache
    expanded = model.model.expand_inputs(further, pixels)
    step = model(inputs_embeds=expanded.inputs_embeds).logits[0, -1].log_softmax(-1)
    if scale is not None:
        alone = model(torch.tensor([[BOI]])).logits[0, -1].log_softmax(-1)
        step = alone + scale * (step - alone)
    assert drawn.shape[0] == count
    assert int(drawn[0, 0]) == CODE + int(step[CODE:].argmax())


def test_forward_goes_on_in_ids_from_a_cache_with_images(model):
    pixels = tiny_images(2)
    rows, mask = left_padded([[1, BOI, EOI, 30, 31, 7, 8], [1, 20, BOI, EOI, 9, 3]]).values()
    expected = model(rows, attention_mask=mask, pixel_values=pixels).logits
    first = model(rows[:, :5], attention_mask=mask[:, :5], pixel_values=pixels, use_cache=True)
    torch.testing.assert_close(first.logits[0], expected[0, :5], atol=1e-4, rtol=1e-4)
    second = model(rows[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, expected[:, 5:], atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_given_empty_is_filled_for_the_next_turn(model):
    cache, pixels, ids = DynamicCache(), tiny_images(1), torch.tensor([[1, BOI, EOI, 30]])
    first = model.generate(ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    further = torch.cat([first, torch.tensor([[7, 8]])], dim=1)
    again = model.generate(further, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(again, model.generate(further, pixel_values=pixels, max_new_tokens=4, eos_token_id=None))


def test_ids_that_do_not_fit_a_cache_are_an_error(model):
    pixels, ids = tiny_images(1), torch.tensor([[1, BOI, EOI, 30]])
    first = whole(model, ids, pixel_values=pixels)
    with pytest.raises(ValueError, match="the cache holds all of the 8 ids"):
        model.generate(first.sequences[:, :-1], past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="1 rows, but there are 2 prompts"):
        model.generate(first.sequences.repeat(2, 1), past_key_values=first.past_key_values)
    first.past_key_values.crop(-6)
    with pytest.raises(ValueError, match="the cache was cut to .* positions, within an image"):
        model.generate(first.sequences, past_key_values=first.past_key_values)


def test_a_turn_is_taken_back_by_cutting_the_cache(model):
    pixels, ids = tiny_images(1), torch.tensor([[1, BOI, EOI, 30, 31]])
    first = whole(model, ids, pixel_values=pixels)
    first.past_key_values.crop(-5)  # the four new ids, and 31
    other = torch.tensor([[1, BOI, EOI, 30, 40, 41]])
    expected = whole(model, other, pixel_values=pixels, output_scores=True)
    assert_same(continued(model, other, first.past_key_values, output_scores=True), expected)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}])
def test_a_smaller_lavit_assists(model, settings):
    ids = torch.tensor([[1, 20, 30, 20, 30, 20]])
    out = model.generate(ids, assistant_model=tiny_model(1), max_new_tokens=8, generator=seeded(0), **settings)
    again = model.generate(ids, assistant_model=tiny_model(1), max_new_tokens=8, generator=seeded(0), **settings)
    assert torch.equal(out, again) and (out < BOI).all()
    if not settings:
        assert torch.equal(out, model.generate(ids, max_new_tokens=8))


SPECULATION = {
    "lavit": {"assistant_model": tiny_model(1)},
    "itself": {"assistant_model": tiny_model()},
    "llama": {"assistant_model": LlamaForCausalLM(tiny_text_config(hidden_size=16)).eval()},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("kind", SPECULATION)
def test_texts_about_images_are_written_with_an_assistant_as_without(model, kind):
    ids, pixels = torch.tensor([[1, BOI, EOI, 20, 30, BOI, EOI, 20, 30]]), tiny_images(2)
    settings = {"pixel_values": pixels, "max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True}
    settings |= {"output_scores": True, "output_hidden_states": True}
    expected = model.generate(ids, **settings)
    seen = Seen()
    out = model.generate(ids, logits_processor=[seen], **settings, **SPECULATION[kind])
    assert_same(out, expected)
    assert [row[:9] for row in seen.ids[0]] == ids.tolist()
    torch.testing.assert_close(out.hidden_states[0][-1], expected.hidden_states[0][-1], atol=1e-4, rtol=1e-4)
    # and the next turn
    further = torch.cat([out.sequences, torch.tensor([[7, 20, 30]])], dim=1)
    expected = whole(model, further, pixel_values=pixels, output_scores=True)
    assert_same(continued(model, further, out.past_key_values, output_scores=True, **SPECULATION[kind]), expected)


def test_an_assistant_reads_the_images_that_its_model_reads(model):
    """The model itself as its assistant: as both read images, though it as codes, some candidates are right."""
    forwards = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    settings = {"pixel_values": tiny_images(1), "max_new_tokens": 16, "eos_token_id": None}
    ids = torch.tensor([[1, BOI, EOI, 30]])
    sampled = [
        model.generate(ids, assistant_model=tiny_model(), do_sample=True, generator=seeded(0), **settings)
        for _ in range(2)
    ]
    hook.remove()
    assert torch.equal(*sampled) and sampled[0].shape == (1, 20)
    assert len(forwards) < 2 * 16


def test_max_length_counts_the_callers_ids(model):
    ids, pixels = torch.tensor([[1, 20, BOI, EOI, 30]]), tiny_images(1)
    settings = {"pixel_values": pixels, "eos_token_id": None}
    assert model.generate(ids, max_length=9, **settings).shape == (1, 9)
    assert model.generate(ids, max_length=9, do_sample=True, **settings).shape == (1, 9)
    assert model.generate(ids, max_length=9, num_beams=2, **settings).shape == (1, 9)
    with pytest.raises(ValueError, match="max_length 5 leaves no room: the prompt has 5 ids"):
        model.generate(ids, max_length=5, **settings)


class Seen(LogitsProcessor):
    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.tolist())
        return scores


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_processors_criteria_and_prefix_functions_see_the_callers_ids(model, settings):
    rows = [[1, 20, BOI, EOI, 30], [1, BOI, EOI, 40]]
    batch, processor, criteria, prefixes = left_padded(rows), Seen(), [], []

    def observe(input_ids, scores, **kwargs):
        criteria.append(input_ids.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def allowed(row, input_ids):
        prefixes.append((row, input_ids.tolist()))
        return list(range(3, 290))

    model.generate(
        **batch,
        pixel_values=tiny_images(2),
        max_new_tokens=3,
        logits_processor=[processor],
        stopping_criteria=[observe],
        prefix_allowed_tokens_fn=allowed,
        **settings,
    )
    prompts = batch["input_ids"].tolist()
    for step, ids in enumerate(processor.ids):
        repeats = len(ids) // 2
        assert [row[:5] for row in ids[::repeats]] == prompts and {len(row) for row in ids} == {5 + step}
    assert [row[:5] for row in criteria[0][:: len(criteria[0]) // 2]] == prompts
    assert all(ids[:5] == batch["input_ids"][row].tolist() for row, ids in prefixes)


def test_a_function_of_allowed_tokens_acts_on_its_own_row_when_others_have_ended(model):
    allowed = {0: [2], 1: [50, 51], 2: [60, 61]}  # row 0 ends at once
    out = model.generate(
        **left_padded([[1, 20], [1, 21, 22], [1, 23]]),
        prefix_allowed_tokens_fn=lambda row, ids: allowed[row],
        do_sample=True,
        generator=seeded(0),
        max_new_tokens=6,
    )
    assert out[0, 3] == 2
    for row in (1, 2):
        assert set(out[row, 3:].tolist()) <= set(allowed[row])


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
@pytest.mark.parametrize("do_sample", [True, False])
def test_hidden_states_and_attentions_of_every_step_are_returned(mode, do_sample):
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids, settings = torch.tensor([[1, BOI, EOI, 40]]), {}
    if mode != "text":
        settings = {"guidance_scale": 2.0, "generation_mode": mode}
    if mode != "image":
        settings["max_new_tokens"] = 4
    out = model.generate(
        ids,
        pixel_values=tiny_images(1),
        do_sample=do_sample,
        generator=seeded(0) if do_sample else None,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_scores=True,
        **settings,
    )
    assert len(out.hidden_states) == len(out.attentions) == len(out.scores) > 1
    prompt_ids = 5 if mode == "image" else 4  # [IMG] was put behind it
    assert {layer.shape for layer in out.hidden_states[0]} == {(1, prompt_ids, 32)}
    assert all(layer.shape == (1, 1, 32) for step in out.hidden_states[1:] for layer in step)
    assert len(out.hidden_states[0]) == 3 and len(out.attentions[1]) == 2


def test_stopping_criteria_get_the_tuple_of_scores(model):
    kinds = []

    def observe(input_ids, scores, **kwargs):
        kinds.append(scores if scores is None else (type(scores), len(scores)))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    ids = torch.tensor([[1, 20]])
    settings = {"do_sample": True, "max_new_tokens": 2, "stopping_criteria": [observe], "eos_token_id": None}
    model.generate(ids, **settings)
    model.generate(ids, return_dict_in_generate=True, output_scores=True, **settings)
    assert kinds == [None, None, (tuple, 1), (tuple, 2)]


def test_prompts_have_guidance_scales_of_their_own(model):
    prompts, scales = [[1, 20, BOI], [1, 30, 40, BOI]], [1.0, 3.0]
    settings = {"generation_mode": "image", "max_image_tokens": 6, "min_image_tokens": 6}
    generators = [seeded(0), seeded(1)]
    together = model.generate(**left_padded(prompts), guidance_scale=scales, generator=generators, **settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), guidance_scale=scales[row], generator=seeded(row), **settings)
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("scale", [-1.0, float("nan"), "3", [1.0, 2.0, 3.0]])
def test_guidance_scales_that_are_none_are_an_error(model, scale):
    with pytest.raises(ValueError, match="guidance"):
        model.generate(torch.tensor([[1, 20, BOI]]), generation_mode="image", guidance_scale=scale)


@pytest.mark.parametrize("generator", [3, "seed", [seeded(0), 4]])
def test_something_else_than_generators_is_an_error(model, generator):
    with pytest.raises(ValueError, match="must be a torch.Generator"):
        model.generate(torch.tensor([[1, 20, BOI]] * 2), generation_mode="image", generator=generator)


def test_sampled_beams_take_a_generator_for_each_prompt(model):
    rows, pixels = [[1, 20, BOI, EOI, 30], [1, 40, 41, BOI, EOI]], tiny_images(2)
    settings = {"num_beams": 3, "do_sample": True, "max_new_tokens": 6}
    together = model.generate(**left_padded(rows), pixel_values=pixels, generator=(seeded(0), seeded(1)), **settings)
    for row, ids in enumerate(rows):
        alone = model.generate(
            torch.tensor([ids]), pixel_values=pixels[row : row + 1], generator=seeded(row), **settings
        )
        assert together[row].tolist()[: alone.shape[1]] == alone[0].tolist()


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_sampled_beams_draw_images_with_a_generator_for_each_prompt(model, mode):
    rows, allowed = [[1, 20, BOI], [1, 40, 41, BOI]], {0: [CODE, CODE + 1, EOI], 1: [CODE + 2, CODE + 3, EOI]}
    settings = {"generation_mode": mode, "num_beams": 2, "do_sample": True, "min_image_tokens": 2}
    settings |= {"max_image_tokens": 5, "max_new_tokens": 6}
    for function in (None, lambda row, ids: allowed[row]):
        given = settings if function is None else settings | {"prefix_allowed_tokens_fn": function}
        generators = [seeded(0), seeded(1)]
        together = model.generate(**left_padded(rows), generator=generators, **given).tolist()
        for row, ids in enumerate(rows):
            if function is not None:
                given = settings | {"prefix_allowed_tokens_fn": lambda _, ids, row=row: allowed[row]}
            alone = model.generate(torch.tensor([ids]), generator=seeded(row), **given)[0].tolist()
            new = alone if mode == "image" else alone[len(ids) :]
            assert together[row][0 if mode == "image" else 4 :][: len(new)] == new


NAN = float("nan")


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_p", (1.5, 0.0, -0.1, NAN, "0.9")),
        ("typical_p", (1.5, 0.0, NAN)),
        ("min_p", (1.5, -0.1)),
        ("temperature", (0.0, -1.0, NAN)),
        ("top_k", (-1, 2.5)),
        ("repetition_penalty", (0.0, -1.0, NAN)),
        ("num_beams", (0, -1, 1.5)),
        ("num_return_sequences", (0, -1)),
        ("max_new_tokens", (0, -1)),
    ],
)
def test_settings_out_of_range_are_an_error_that_names_them(model, mode, name, values):
    for value in values:
        with pytest.raises(ValueError, match="penalty" if name == "repetition_penalty" else name):
            model.generate(torch.tensor([[1, 20, BOI]]), do_sample=True, generation_mode=mode, **{name: value})


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_text_ends_at_a_stop_string_however_it_is_written(model, do_sample):
    tokenizer, ids = tiny_tokenizer(), torch.tensor([[1, 20, BOI, EOI, 30]])
    settings = {"pixel_values": tiny_images(1), "max_new_tokens": 8, "do_sample": do_sample}
    settings["prefix_allowed_tokens_fn"] = lambda row, ids: list(range(262, 300))  # no bytes
    uncut = model.generate(ids, generator=seeded(0), **settings)
    stop = tokenizer.decode(uncut[0, 8]).strip()
    cut = model.generate(ids, generator=seeded(0), stop_strings=[stop], tokenizer=tokenizer, **settings)
    assert stop and 5 < cut.shape[1] <= 9 < uncut.shape[1]
    assert cut[0].tolist() == uncut[0, : cut.shape[1]].tolist()


def test_speculation_of_texts_is_refused_where_images_are_drawn(model):
    for name, value in (("assistant_model", tiny_model(1)), ("prompt_lookup_num_tokens", 2)):
        with pytest.raises(ValueError, match=f"{name} is for text, but generation_mode is 'image'"):
            model.generate(torch.tensor([[1, 20, BOI]]), generation_mode="image", **{name: value})


def test_lists_and_pixels_as_bytes_are_an_error(model):
    with pytest.raises(ValueError, match="must be tensors, got list"):
        model.generate([[1, 20]])
    with pytest.raises(ValueError, match="normalised floats, got torch.uint8"):
        model(torch.tensor([[BOI, EOI]]), pixel_values=torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_ids_and_masks_that_cannot_be_are_an_error(model):
    ids = torch.tensor([[1, 20, 30]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="go from 1 to 326, the vocabulary from 0 to 325"):
            call(torch.tensor([[1, 326]]))
        with pytest.raises(ValueError, match="a row for each prompt and a column for each id"):
            call(ids, attention_mask=torch.ones(2, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="a row for each prompt and a column for each id"):
            call(ids, attention_mask=torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN"):
        model(torch.tensor([[BOI, EOI]]), pixel_values=torch.full((1, 3, 16, 16), float("nan")))


def test_positions_of_unfilled_prompts_are_an_error(model):
    ids = torch.tensor([[1, BOI, EOI]])
    for mode in ("text", "image"):
        with pytest.raises(ValueError, match="position_ids"):
            positions = torch.arange(3)[None]
            model.generate(ids, pixel_values=tiny_images(1), position_ids=positions, generation_mode=mode)


def test_a_call_without_a_prompt_begins_with_the_id_that_begins_texts(model):
    out = model.generate(max_new_tokens=4, eos_token_id=None)
    assert torch.equal(out, model.generate(torch.tensor([[1]]), max_new_tokens=4, eos_token_id=None))


def test_layers_that_were_not_asked_for_are_none(model):
    ids = torch.tensor([[1, BOI, EOI, 30]])
    every = model(ids, pixel_values=tiny_images(1), output_hidden_states=True).hidden_states
    assert all(layer.shape == (1, 4, 32) for layer in every)


def test_the_visual_tokenizer_stays_in_eval_mode_whatever_train_says():
    model = tiny_model()
    for whole_model in (model, torch.nn.Sequential(model)):
        whole_model.train()
        assert model.training and model.model.language_model.training
        assert not any(module.training for module in model.model.visual_tokenizer.modules())
    assert all(module.training for module in model.model.visual_tokenizer.train().modules())


def test_no_weight_of_the_visual_tokenizer_is_trained_with_the_language_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for model in (tiny_model(), LavitForConditionalGeneration.from_pretrained(tmp_path)):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any(name.startswith("model.visual_tokenizer.") for name in trained)
        assert {"model.understanding.projection.weight", "lm_head.weight"} <= trained
        assert any(name.startswith("model.understanding.merger.") for name in trained)


@pytest.mark.slow
def test_compiling_the_language_model_alone_compiles_decoding(model):
    compiled, calls = tiny_model(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled.model.language_model.compile(backend=backend)
    out = compiled.generate(torch.tensor([[1, 20, BOI]]), generation_mode="image", do_sample=False)
    assert calls
    assert torch.equal(out, model.generate(torch.tensor([[1, 20, BOI]]), generation_mode="image", do_sample=False))


def test_image_features_are_a_model_output_with_the_encoders_layers_on_request(model):
    features = model.get_image_features(tiny_images(2), output_hidden_states=True)
    assert features.last_hidden_state.shape == (2, 16, 32) and len(features.hidden_states) == 3
    assert [len(one) for one in features.pooler_output] == features.lengths.tolist()
    assert isinstance(model.get_image_features(tiny_images(2), return_dict=False), tuple)
    tokens = model.model.visual_tokenizer(tiny_images(2), output_hidden_states=True)
    assert len(tokens.hidden_states) == 3
    plain = model.model.visual_tokenizer(tiny_images(2))
    assert torch.equal(plain.codes, tokens.codes)
    assert isinstance(model.model.visual_tokenizer(tiny_images(2), return_dict=False), tuple)


@torch.no_grad()
def test_the_cache_goes_by_the_name_that_transformers_has_now(model):
    first = model(torch.tensor([[1, 20]]), use_cache=True)
    ids = torch.tensor([[30]])
    for name in {CACHE_NAME, "past_key_values"}:
        logits = model(ids, **{name: copy.deepcopy(first.past_key_values)}).logits
        torch.testing.assert_close(logits, model(torch.tensor([[1, 20, 30]])).logits[:, -1:])
