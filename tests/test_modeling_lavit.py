"""LavitModel and LavitForConditionalGeneration: filling slots, losses, loading and saving."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import (
    BOI,
    CODE,
    END,
    EOI,
    TEXT_VOCAB_SIZE,
    left_padded,
    right_padded,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_text_config,
)
from transformers import AutoModel, AutoModelForImageTextToText, LlamaForCausalLM, StaticCache

from modeling_lavit import LavitForConditionalGeneration, LavitModel, LavitVisualTokenizer
from modeling_lavit.layers_lavit import FewRowsLinear


LIFT = {r"^model\.language_model\.": "model."}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


def test_a_slot_is_filled_with_the_projected_features_of_its_image(model):
    pixels = tiny_images(2)
    first, second = model.get_image_features(pixels).pooler_output
    embed = model.get_input_embeddings()
    by_hand = torch.cat(
        [
            embed(torch.tensor([5, BOI])),
            first,
            embed(torch.tensor([EOI, 6, BOI])),
            second,
            embed(torch.tensor([EOI, 9])),
        ]
    )
    ids = torch.tensor([[5, BOI, EOI, 6, BOI, EOI, 9]])
    filled = model(inputs_embeds=by_hand[None], output_hidden_states=True)
    # a row for each id: the last feature of an image speaks for its [IMG]
    first_end, second_end = 1 + len(first), 4 + len(first) + len(second)
    rows = [0, first_end, first_end + 1, first_end + 2, second_end, second_end + 1, second_end + 2]
    given = model(ids, pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(given.logits, filled.logits[:, rows])
    for layer, filled_layer in zip(given.hidden_states, filled.hidden_states, strict=True):
        torch.testing.assert_close(layer, filled_layer[:, rows])
    expanded = model.model.expand_inputs(ids, pixels)
    assert expanded.speaks.tolist() == [rows]
    torch.testing.assert_close(expanded.inputs_embeds, by_hand[None])
    short = model(ids, pixel_values=pixels, logits_to_keep=2).logits
    torch.testing.assert_close(short, given.logits[:, -2:])


def test_reading_uses_its_own_merger_and_no_quantization(model):
    pixels = tiny_images(2)
    encoded = model.model.visual_tokenizer.encode(pixels, merger=model.model.understanding.merger)
    expected = model.model.understanding.projection(encoded.features)
    torch.testing.assert_close(torch.cat(model.get_image_features(pixels).pooler_output), expected)
    own = model.model.visual_tokenizer.encode(pixels).features
    assert not torch.allclose(own, encoded.features)


def test_a_shared_merger_has_no_second_copy_of_its_weights():
    shared = tiny_model(share_understanding_merger=True)
    assert not any(name.startswith("model.understanding.merger") for name in shared.state_dict())
    pixels = tiny_images(2)
    expected = shared.model.understanding.projection(shared.model.visual_tokenizer.encode(pixels).features)
    torch.testing.assert_close(torch.cat(shared.get_image_features(pixels).pooler_output), expected)


def test_a_batch_of_uneven_images_gives_the_logits_of_each_prompt_alone(model):
    pixels = tiny_images(3)
    rows = [[1, 20, BOI, EOI, 30], [1, BOI, EOI, BOI, EOI]]
    alone = [
        model(torch.tensor([rows[0]]), pixel_values=pixels[:1]).logits[0],
        model(torch.tensor([rows[1]]), pixel_values=pixels[1:]).logits[0],
    ]
    rows.append([1, 40])
    alone.append(model(torch.tensor(rows[2:])).logits[0])
    left = model(**left_padded(rows), pixel_values=pixels).logits
    right = model(**right_padded(rows), pixel_values=pixels).logits
    assert left.shape == right.shape == (3, 5, END)
    for row, expected in enumerate(alone):
        torch.testing.assert_close(right[row, : len(expected)], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(left[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)


def test_prompts_are_padded_again_on_the_side_they_were_padded_on(model):
    rows = [[1, 20, 21, 22, BOI, EOI], [1, BOI, EOI]]
    for padded, column in ((left_padded, 0), (right_padded, -1)):
        mask = model.model.expand_inputs(pixel_values=tiny_images(2, seed=3), **padded(rows)).attention_mask
        assert mask[:, column].min() == 0
        assert mask[:, -1 - column].min() == 1


def test_the_loss_is_the_cross_entropy_over_labelled_ids_of_both_modalities(model):
    pixels = tiny_images(2)
    # a caption of an image that is read, and an image's codes after a caption
    reading, writing = [1, BOI, EOI, 40, 41, 42, 2], [1, BOI, EOI, 50, BOI, CODE + 3, CODE + 5, EOI, 2]
    batch = right_padded([reading, writing])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 1:3] = -100
    outputs = model(**batch, pixel_values=pixels, labels=labels)
    assert any(target >= CODE for target in writing)
    # what every loss of others computes of the logits and the labels
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, loss)
    # over the filled prompts it is the same
    expanded = model.model.expand_inputs(**batch, pixel_values=pixels, labels=labels)
    filled = model(
        inputs_embeds=expanded.inputs_embeds, attention_mask=expanded.attention_mask, labels=expanded.labels
    )
    torch.testing.assert_close(outputs.loss, filled.loss)


def test_the_loss_does_not_depend_on_the_side_of_the_padding(model):
    rows = [[1, BOI, EOI, 40, 41], [1, 3, 4, BOI, EOI, 50, 60, 61]]
    values = []
    for padded in (left_padded, right_padded):
        batch = padded(rows)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        values.append(model(**batch, pixel_values=tiny_images(2), labels=labels).loss)
    torch.testing.assert_close(values[0], values[1])


def test_a_training_step_reaches_the_language_model_and_the_projection():
    trained = tiny_model().train()
    ids = torch.tensor([[1, BOI, EOI, 40, 41]])
    before = trained(ids, pixel_values=tiny_images(1), labels=ids).loss
    before.backward()
    for part in (trained.model.understanding.projection.weight, trained.lm_head.weight):
        assert part.grad.abs().sum() > 0
    torch.optim.SGD(trained.parameters(), lr=0.01).step()
    assert trained(ids, pixel_values=tiny_images(1), labels=ids).loss < before


def test_activation_checkpointing_leaves_the_gradients_as_they_are():
    grads = []
    for checkpointing in (False, True):
        trained = tiny_model().train()
        if checkpointing:
            trained.activation_checkpointing_enable()
            assert trained.is_activation_checkpointing
        ids = torch.tensor([[1, BOI, EOI, 40, 41]])
        trained(ids, pixel_values=tiny_images(1), labels=ids).loss.backward()
        grads.append(trained.model.language_model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("slots, images", [(1, 2), (2, 1), (0, 1)])
def test_slots_and_images_that_disagree_are_an_error_with_both_numbers(model, slots, images):
    ids = torch.tensor([[1] + [BOI, EOI] * slots + [5]])
    with pytest.raises(ValueError, match=f"{slots} image slots.*{images} images"):
        model(ids, pixel_values=tiny_images(images))


def test_an_empty_slot_without_images_is_an_error(model):
    with pytest.raises(ValueError, match="1 image slots.*0 images"):
        model(torch.tensor([[1, BOI, EOI]]))


def test_pixels_with_positions_of_the_short_prompt_are_an_error(model):
    ids = torch.tensor([[1, BOI, EOI]])
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, pixel_values=tiny_images(1), position_ids=torch.arange(3)[None])


def test_the_choice_of_patches_is_passed_to_the_visual_tokenizer(model):
    ids = torch.tensor([[1, BOI, EOI]])
    for ratio, kept in ((0.25, 4), (1.0, 16)):
        cache = model(ids, pixel_values=tiny_images(1), keep_ratio=ratio, use_cache=True).past_key_values
        assert cache.get_seq_length() == 3 + kept
    noise = torch.zeros(1, 16, 2)
    noise[:, :3, 0], noise[:, 3:, 1] = 1e4, 1e4
    cache = model(ids, pixel_values=tiny_images(1), gumbel_noise=noise, use_cache=True).past_key_values
    assert cache.get_seq_length() == 3 + 3


def test_a_range_of_logits_equals_the_full_head_there_and_is_minus_infinity_elsewhere(model):
    ids = torch.tensor([[1, 20, 30]])
    full = model(ids).logits
    part = model(ids, logit_range=(EOI, CODE + 10)).logits
    torch.testing.assert_close(part[..., EOI : CODE + 10], full[..., EOI : CODE + 10])
    assert part.shape == full.shape
    assert part[..., :EOI].isneginf().all() and part[..., CODE + 10 :].isneginf().all()


def test_a_head_that_is_no_plain_linear_layer_is_masked_instead_of_cut():
    class ScaledLinear(torch.nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    scaled = tiny_model()
    ids = torch.tensor([[1, 20, 30]])
    full = scaled(ids).logits
    head = ScaledLinear(32, scaled.config.text_config.vocab_size, bias=False)
    head.weight = scaled.lm_head.weight
    scaled.lm_head = head
    part = scaled(ids, logit_range=(0, BOI)).logits
    torch.testing.assert_close(part[..., :BOI], 2 * full[..., :BOI])
    assert part[..., BOI:].isneginf().all()


def test_what_was_saved_loads_and_saves_to_the_same_weights(model, folder, tmp_path):
    loaded = LavitForConditionalGeneration.from_pretrained(folder)
    ids = torch.tensor([[1, BOI, EOI, 40]])
    expected = model(ids, pixel_values=tiny_images(1)).logits
    torch.testing.assert_close(loaded(ids, pixel_values=tiny_images(1)).logits, expected)
    loaded.save_pretrained(tmp_path)
    again, first = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_the_auto_classes_find_the_model(folder):
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is LavitForConditionalGeneration
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(base) is LavitModel
    assert info["missing_keys"] == set()


def test_a_model_built_on_meta_gets_every_buffer_back_on_loading(model, folder):
    with torch.device("meta"):
        on_meta = LavitForConditionalGeneration(model.config)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    loaded = LavitForConditionalGeneration.from_pretrained(folder)
    expected = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_runs(folder, dtype):
    loaded = LavitForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    logits = loaded(torch.tensor([[1, BOI, EOI, 40]]), pixel_values=tiny_images(1)).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"model.visual_tokenizer": "cpu", "": "cpu"}])
def test_a_device_map_gives_the_same_logits(model, folder, device_map):
    loaded = LavitForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    ids = torch.tensor([[1, BOI, EOI, 40]])
    expected = model(ids, pixel_values=tiny_images(1)).logits
    torch.testing.assert_close(loaded(ids, pixel_values=tiny_images(1)).logits, expected)


def test_attention_implementations_agree_and_can_be_exchanged(model, folder):
    ids = torch.tensor([[1, BOI, EOI, 40]])
    expected = model(ids, pixel_values=tiny_images(1)).logits
    loaded = LavitForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    assert loaded.model.language_model.config._attn_implementation == "eager"
    eager = loaded(ids, pixel_values=tiny_images(1)).logits
    torch.testing.assert_close(eager, expected, atol=1e-4, rtol=1e-4)
    loaded.set_attn_implementation("sdpa")
    assert loaded.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids, pixel_values=tiny_images(1)).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_lifts_out_as_a_stock_llama(tmp_path, tied):
    whole = tiny_model(tie_word_embeddings=tied)
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == tied
    whole.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    again = LavitForConditionalGeneration.from_pretrained(tmp_path)
    llama, info = LlamaForCausalLM.from_pretrained(tmp_path, key_mapping=LIFT, output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.tensor([[1, 5, 30, BOI, CODE + 3]])
    torch.testing.assert_close(again(ids).logits, whole(ids).logits)
    torch.testing.assert_close(llama(ids).logits, whole(ids).logits)


def test_a_checkpoint_with_missing_weights_is_an_error_that_names_them(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.understanding.projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for loader in (LavitForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="model.understanding.projection.weight"):
            loader.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_an_error_unless_asked_for(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 80
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"mlp.*\(64, 32\), not \(80, 32\)"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.model.language_model.layers[0].mlp.up_proj.weight.shape == (80, 32)


def test_a_folder_that_is_no_checkpoint_is_an_os_error(tmp_path, folder):
    with pytest.raises(OSError, match="no-such-folder"):
        LavitForConditionalGeneration.from_pretrained(tmp_path / "no-such-folder")
    with pytest.raises(OSError, match="model.safetensors"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(OSError, match="model.safetensors"):
        LavitForConditionalGeneration.from_pretrained(tmp_path)


def test_a_part_of_the_model_loads_from_the_whole_only_with_its_key_mapping(model, folder):
    with pytest.raises(ValueError, match="key_mapping"):
        LavitVisualTokenizer.from_pretrained(folder)
    part = LavitVisualTokenizer.from_pretrained(folder, key_mapping={r"^model\.visual_tokenizer\.": ""})
    pixels = tiny_images(2)
    assert torch.equal(part.tokenize(pixels).codes, model.get_image_tokens(pixels).codes)


def test_resizing_refuses_to_drop_visual_ids_and_can_add_ids():
    resized = tiny_model()
    with pytest.raises(ValueError, match="would drop visual tokens"):
        resized.resize_token_embeddings(TEXT_VOCAB_SIZE + 2)
    row = resized.lm_head.weight[CODE + 3].detach().clone()
    resized.resize_token_embeddings(resized.config.vocabulary.size + 8)
    assert resized(torch.tensor([[1, 2]])).logits.shape[-1] == resized.config.vocabulary.size + 8
    torch.testing.assert_close(resized.lm_head.weight[CODE + 3], row)


def test_a_text_vocabulary_that_is_too_small_for_the_codes_is_an_error():
    with pytest.raises(ValueError, match="need 326"):
        tiny_config(text_config=tiny_text_config(vocab_size=TEXT_VOCAB_SIZE))


def test_a_decode_step_compiles_without_graph_breaks(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    ids = torch.tensor([[1, 20, 30]])
    model(ids, past_key_values=cache, use_cache=True)
    step = {
        "position_ids": torch.tensor([[3]]),
        "past_key_values": cache,
        "use_cache": True,
        "logit_range": (EOI, CODE + 24),
    }
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)(torch.tensor([[BOI]]), **step)
        expected = model(torch.tensor([[1, 20, 30, BOI]])).logits[:, -1:]
    reached = compiled.logits[..., EOI : CODE + 24]
    torch.testing.assert_close(F.softmax(reached, -1), F.softmax(expected[..., EOI : CODE + 24], -1))


def test_an_attention_that_the_visual_tokenizer_has_not_is_the_language_models_alone(model, folder):
    ids = torch.tensor([[1, BOI, EOI, 40]])
    loaded = LavitForConditionalGeneration.from_pretrained(folder, attn_implementation="flex_attention")
    switched = tiny_model()
    switched.set_attn_implementation("flex_attention")
    for flexible in (loaded, switched):
        visual_tokenizer = flexible.model.visual_tokenizer
        assert flexible.model.language_model.config._attn_implementation == "flex_attention"
        assert visual_tokenizer.config._attn_implementation == "sdpa"
        assert visual_tokenizer.encoder.config._attn_implementation == "sdpa"
    with torch.no_grad():
        logits = loaded(ids, pixel_values=tiny_images(1)).logits
    torch.testing.assert_close(logits, model(ids, pixel_values=tiny_images(1)).logits, atol=1e-4, rtol=1e-4)


def test_the_config_names_the_ids_that_trainers_and_engines_ask_for(tmp_path):
    config = tiny_config()
    assert (config.vocab_size, config.image_token_id, config.eos_token_id) == (END, BOI, 2)
    config.pad_token_id = 2
    config.vocab_size = END + 2
    assert config.text_config.vocab_size == END + 2 and config.vision_config is config.visual_config
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).pad_token_id == 2


def test_the_vocabulary_maps_both_ways_and_refuses_what_is_no_code():
    vocabulary = tiny_config().vocabulary
    codes = torch.arange(24)
    assert vocabulary.ids_of(3) == CODE + 3 and vocabulary.codes_of(CODE + 3) == 3
    assert torch.equal(vocabulary.codes_of(vocabulary.ids_of(codes)), codes)
    assert vocabulary.is_code(torch.tensor([BOI, CODE, END - 1, END])).tolist() == [False, True, True, False]
    for wrong in (lambda: vocabulary.ids_of(24), lambda: vocabulary.codes_of(torch.tensor([CODE, EOI]))):
        with pytest.raises(ValueError, match="go from"):
            wrong()


@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (2, 4), (9, 1)])
def test_few_rows_are_multiplied_as_by_any_linear_layer(shape, monkeypatch):
    monkeypatch.setattr(FewRowsLinear, "ROWS", range(2, 9))  # of every processor
    torch.manual_seed(0)
    few = FewRowsLinear(1024, 2048)
    plain = torch.nn.Linear(1024, 2048)
    plain.load_state_dict(few.state_dict())
    inputs = torch.randn(*shape, 1024)
    with torch.no_grad():
        output = few(inputs)
        torch.testing.assert_close(output, plain(inputs))
    trained = few(inputs)
    assert torch.equal(trained, plain(inputs)) and trained.requires_grad
    assert output.is_contiguous()
