"""Decoding steps without modules, and batches that finished rows leave."""

import pytest
import torch
from tiny import PROMPTS, draw_images, left_padded, seeded, tiny_model, tiny_text_config, without_padding
from transformers import LogitsProcessor
from transformers.models.llama.modeling_llama import LlamaModel

from modeling_lavit.steps_lavit import can_step_plainly, llama_step


@pytest.fixture
def forwards(monkeypatch):
    """Counts forwards through the modules of the language model."""
    counted = []
    forward = LlamaModel.forward

    def count(self, *args, **kwargs):
        counted.append(None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", count)
    return counted


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rms_norm_eps": 1e-2},
    ],
)
def test_a_plain_step_is_the_forward_of_the_modules(config, count):
    llama = tiny_model(text_config=tiny_text_config(**config)).model.language_model
    torch.manual_seed(0)
    for name, weight in llama.named_parameters():
        if name.endswith("bias") or "norm" in name:
            weight.add_(torch.randn_like(weight) / 4)
    ids, mask = torch.randint(0, 100, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = llama(ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, -count:]
    begun = llama(ids[:, :-count], attention_mask=mask[:, :-count], position_ids=positions[:, :-count], use_cache=True)
    cache = begun.past_key_values
    stepped = llama_step(llama, ids[:, -count:], positions[:, -count:], mask, cache)
    torch.testing.assert_close(stepped, expected, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("mode", ["image", "interleaved", "text"])
def test_generate_steps_plainly_and_writes_what_the_modules_write(talkative, forwards, monkeypatch, mode):
    rows = PROMPTS if mode == "image" else [row[:-1] for row in PROMPTS]
    settings = {"generation_mode": mode, "do_sample": True}
    if mode != "image":
        settings["max_new_tokens"] = 30
    if mode != "text":
        settings |= {"guidance_scale": 2.0, "min_image_tokens": 3}

    def write():
        forwards.clear()
        return talkative.generate(**left_padded(rows), generator=[seeded(i) for i in range(3)], **settings)

    plain = write()
    assert len(forwards) == 1
    monkeypatch.setattr(talkative, "uses_plain_steps", False)
    assert torch.equal(write(), plain)
    assert len(forwards) > 5


def test_models_that_are_more_than_a_plain_llama_are_not_stepped_plainly():
    model = tiny_model()
    arguments = dict.fromkeys(("attention_mask", "past_key_values", "position_ids"))
    assert can_step_plainly(model, arguments)
    assert not can_step_plainly(model, arguments | {"output_attentions": True})
    llama = model.model.language_model
    hook = llama.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not can_step_plainly(model, arguments)
    hook.remove()
    kept = llama.layers[0].mlp.up_proj
    llama.layers[0].mlp.up_proj = type("Adapted", (torch.nn.Linear,), {})(kept.in_features, kept.out_features)
    assert not can_step_plainly(model, arguments)
    llama.layers[0].mlp.up_proj = kept
    assert can_step_plainly(model, arguments)
    assert not can_step_plainly(model.train(), arguments)


class Rows(LogitsProcessor):
    """Notes how many rows every step computes."""

    def __init__(self):
        self.counts = []

    def __call__(self, input_ids, scores):
        self.counts.append(len(scores))
        return scores


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("knows", [False, True])
def test_finished_rows_leave_the_batch_and_the_others_do_not_notice(monkeypatch, plain, scale, knows):
    model = tiny_model()
    monkeypatch.setattr(model, "uses_plain_steps", plain)
    settings = {"guidance_scale": scale, "min_image_tokens": 1}
    if knows:  # the last row that is left looks ahead
        model.set_draft_codes([torch.arange(24), torch.arange(24).flip(0)])
    prompts, together, rows = PROMPTS * 3, [seeded(i) for i in range(9)], Rows()
    images = draw_images(model, prompts, generator=together, logits_processor=[rows], **settings)
    lengths = [len(without_padding(image)) for image in images]
    assert len(set(lengths)) > 1
    if not knows:
        assert rows.counts == [sum(length > step for length in lengths) for step in range(max(lengths))]
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
