"""The paper's three stages through their real entry point, on any source, from pretrained parts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from parts import detokenizer_sizes, read_log, sizes, write_parts
from safetensors.torch import load_file
from tiny import (
    TEXT_VOCAB_SIZE,
    tiny_config,
    tiny_detokenizer,
    tiny_model,
    tiny_processor,
    tiny_scheduler,
    tiny_unet,
    tiny_vae,
)
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lavit import (
    LavitDetokenizer,
    LavitForConditionalGeneration,
    LavitProcessor,
    LavitVisualTokenizer,
)
from modeling_lavit.modeling_lavit import IGNORED_LABEL
from modeling_lavit.training.data.packing import pack, pack_rows
from modeling_lavit.training.data.samples import Sequences
from modeling_lavit.training.recipe_file import load_recipe
from modeling_lavit.training.run import RECIPES, STAGES, main


ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "load_best_model_at_end": False,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def rows(parts: Path, **more) -> str:
    return json.dumps({"path": "parquet", "data_files": str(parts / "rows.parquet"), **more})


def train(recipe: str, output: Path, *overrides: str) -> Path:
    arguments = [f"training_arguments.{key}={json.dumps(value)}" for key, value in ARGUMENTS.items()]
    arguments += [f"training_arguments.output_dir={output}", "early_stopping_patience=null"]
    main([recipe, *arguments, *overrides])
    return output / "final"


@pytest.mark.parametrize("lengths", [[5, 3, 3, 2, 7], [8], [9, 1]])
def test_packing_puts_every_document_in_one_row(lengths):
    rows = pack_rows(lengths, 8)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 8 for row in rows if len(row) > 1)


def test_packed_documents_are_predicted_as_alone():
    model = tiny_model().eval()
    lengths = torch.tensor([7, 4, 9, 2])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(0, model.config.text_vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        dense = model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        packed, positions, packed_labels, packed_mask = pack(embeds, mask, labels, 12, IGNORED_LABEL)
        states = model.model.language_model(
            inputs_embeds=packed, attention_mask=packed_mask, position_ids=positions
        ).last_hidden_state
    assert len(packed) == 2
    targets = packed_labels[:, 1:]
    one = torch.cat([dense[i, : n - 1] for i, n in enumerate(lengths)])
    wanted = torch.cat([ids[i, 1:n] for i, n in enumerate(lengths)])
    other, found = states[:, :-1][targets != IGNORED_LABEL], targets[targets != IGNORED_LABEL]
    # rows may hold the documents in another order
    order, packed_order = (torch.argsort(x @ torch.arange(1.0, 1 + x.shape[1])) for x in (one, other))
    torch.testing.assert_close(other[packed_order], one[order], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[packed_order], wanted[order])


@pytest.mark.parametrize(
    ("packing", "streaming", "turns"),
    [
        ("null", False, {"question_column": "question", "answer_column": "answer"}),
        ("160", True, {"messages_column": "messages"}),
    ],
)
def test_a_lavit_checkpoint_goes_on_with_any_source(parts, tmp_path, packing, streaming, turns):
    final = train(
        "finetune",
        tmp_path / "run",
        f"start={parts / 'lavit'}",
        f"data={rows(parts, streaming=streaming)}",
        f"objective.packing={packing}",
        "images_per_sample=2",
        f"text_data={rows(parts)}",
        f"instruction_data={rows(parts, **turns)}",
        "mixture={caption: 0.3, draw: 0.3, text: 0.2, instruct: 0.2}",
        "lora=null",
    )
    before, after = (LavitForConditionalGeneration.from_pretrained(path) for path in (parts / "lavit", final))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    for name, tensor in before.model.visual_tokenizer.state_dict().items():
        assert torch.equal(after.model.visual_tokenizer.state_dict()[name], tensor), name
    LavitProcessor.from_pretrained(final)


def test_packed_training_has_the_losses_of_padded_training(parts, tmp_path):
    for name, packing in (("padded", "null"), ("packed", "200")):
        train(
            "finetune",
            tmp_path / name,
            f"start={parts / 'lavit'}",
            f"data={rows(parts)}",
            f"objective.packing={packing}",
            "lora=null",
        )
    padded, packed = (read_log(tmp_path / name) for name in ("padded", "packed"))
    for one, other in zip(padded, packed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_low_rank_adapters_are_written_by_themselves_and_merged(parts, tmp_path):
    final = train(
        "finetune",
        tmp_path / "run",
        f"start={parts / 'lavit'}",
        f"data={rows(parts)}",
        "lora.modules_to_save=null",
        "train_understanding=false",
        "training_arguments.learning_rate=0.1",
        "training_arguments.warmup_steps=0",
    )
    adapter = load_file(final / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in key and "language_model" in key for key in adapter)
    before = LavitForConditionalGeneration.from_pretrained(parts / "lavit").state_dict()
    after = LavitForConditionalGeneration.from_pretrained(final).state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("language_model.layers" in key and key.endswith("_proj.weight") for key in changed)


def save_llama(folder: Path, **overrides) -> LlamaForCausalLM:
    """Writes and returns a tiny Llama without visual ids, and its tokenizer."""
    values = tiny_model().config.text_config.to_dict() | {"vocab_size": TEXT_VOCAB_SIZE} | overrides
    llama = LlamaForCausalLM(LlamaConfig(**values))
    llama.save_pretrained(folder)
    tiny_processor().tokenizer.save_pretrained(folder)
    return llama


def test_texts_cannot_write_visual_ids():
    ids = Sequences(tiny_processor(), tiny_config().vocabulary, prompt_dropout=0.0).text("see [IMG][/IMG] or </s>")
    assert max(ids) < TEXT_VOCAB_SIZE and tiny_processor().tokenizer.eos_token_id not in ids


def test_codes_of_another_tokenizer_are_refused():
    sequences = Sequences(tiny_processor(), tiny_config().vocabulary, prompt_dropout=0.0)
    assert sequences.codes(torch.tensor([0, 23])) == [TEXT_VOCAB_SIZE + 2, TEXT_VOCAB_SIZE + 25]
    with pytest.raises(ValueError, match="of another tokenizer than the model.s: codes go from 0 to 23"):
        sequences.codes(torch.tensor([3, 24]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_pretrained_language_model_learns_visual_tokens(parts, tmp_path, tied):
    llama = save_llama(tmp_path / "llama", tie_word_embeddings=tied)
    arguments = [
        "start=null",
        f"tokenizer={parts / 'lowres'}",
        f"language_model={tmp_path / 'llama'}",
        "lora=null",
        f"data={rows(parts)}",
        "training_arguments.save_strategy=steps",
        "training_arguments.save_steps=1",
        "training_arguments.warmup_steps=0",
    ]
    finals = [
        train("finetune", tmp_path / name, *arguments, f"training_arguments.learning_rate={rate}")
        for name, rate in (("still", 0.0), ("moved", 0.01))
    ]
    still, moved = (LavitForConditionalGeneration.from_pretrained(final) for final in finals)
    assert still.config.tie_word_embeddings == tied
    assert (still.lm_head.weight is still.get_input_embeddings().weight) == tied
    known, still_rows = (x.get_input_embeddings().weight for x in (llama, still))
    assert torch.equal(still_rows[: len(known)], known)
    assert len(still_rows) == still.config.vocabulary.size
    offset = still.config.vocabulary.visual_offset
    assert (still.lm_head.weight[offset:] != moved.lm_head.weight[offset:]).any(1).all()


def test_adapters_alone_are_refused_for_new_visual_ids(parts, tmp_path):
    save_llama(tmp_path / "llama")
    arguments = [
        "start=null",
        f"tokenizer={parts / 'lowres'}",
        f"language_model={tmp_path / 'llama'}",
        f"data={rows(parts)}",
        "lora.modules_to_save=null",
    ]
    with pytest.raises(ValueError, match="modules_to_save"):
        train("finetune", tmp_path / "run", *arguments)


@pytest.mark.parametrize("variant", ["lowres", "highres"])
def test_pixel_decoders_start_from_stable_diffusion_folders(parts, tmp_path, variant):
    """SD 1.5 (`lowres`) and SDXL (`highres`), and images larger than the tokenizer's."""
    dims = {"lowres": {"variant": "lowres", "prompt_embed_dims": (24,)}, "highres": {}}[variant]
    detokenizer = tiny_detokenizer(**dims)
    model = LavitVisualTokenizer.from_pretrained(parts / "lowres" / "visual_tokenizer")
    detokenizer.codebook.load_state_dict(model.quantizer.codebook.state_dict())
    model.save_pretrained(tmp_path / "stage1" / "visual_tokenizer")
    detokenizer.save_pretrained(tmp_path / "stage1" / "detokenizer")
    unet = tiny_unet(variant)
    for name, component in (("unet", unet), ("vae", tiny_vae()), ("scheduler", tiny_scheduler())):
        component.save_pretrained(tmp_path / "stable-diffusion" / name)
    final = train(
        "paper_pixel_decoder",
        tmp_path / "run",
        f"data={rows(parts)}",
        f"tokenizer={tmp_path / 'stage1'}",
        f"start={tmp_path / 'stable-diffusion'}",
        "language_model=null",
        "resolution=32",
        "objective.condition_dropout=0.5",
    )
    trained = LavitDetokenizer.from_pretrained(final / "detokenizer")
    assert not torch.equal(trained.prompt_projections[0].weight, detokenizer.prompt_projections[0].weight)
    assert torch.equal(trained.layers[0].mlp.fc1.weight, detokenizer.layers[0].mlp.fc1.weight)
    after = load_file(final / "unet" / "diffusion_pytorch_model.safetensors")
    assert after.keys() == unet.state_dict().keys()
    assert any(not torch.equal(after[key], tensor) for key, tensor in unet.state_dict().items())


def test_a_unet_of_another_width_is_refused(parts, tmp_path):
    tiny_detokenizer(prompt_embed_dims=(8, 8)).save_pretrained(tmp_path / "stage1" / "detokenizer")
    LavitVisualTokenizer.from_pretrained(parts / "lowres" / "visual_tokenizer").save_pretrained(
        tmp_path / "stage1" / "visual_tokenizer"
    )
    for name, component in (("unet", tiny_unet()), ("vae", tiny_vae()), ("scheduler", tiny_scheduler())):
        component.save_pretrained(tmp_path / "stable-diffusion" / name)
    with pytest.raises(ValueError, match="cross_attention_dim"):
        train(
            "paper_pixel_decoder",
            tmp_path / "run",
            f"data={rows(parts)}",
            f"tokenizer={tmp_path / 'stage1'}",
            f"start={tmp_path / 'stable-diffusion'}",
        )


@pytest.mark.parametrize("switches", [[], ["objective.quantize_from=null"], ["objective.freeze_selector_from=0"]])
def test_the_papers_tokenizer_trains_on_any_images(parts, tmp_path, switches):
    final = train(
        "paper_tokenizer",
        tmp_path / "run",
        f"data={rows(parts, streaming=True)}",
        f"encoder={parts / 'lowres' / 'visual_tokenizer'}",
        f"model={sizes()}",
        f"detokenizer={detokenizer_sizes('lowres')}",
        "training_arguments.warmup_steps=0",
        *switches,
    )
    trained = LavitVisualTokenizer.from_pretrained(final / "visual_tokenizer")
    given = LavitVisualTokenizer.from_pretrained(parts / "lowres" / "visual_tokenizer")
    for name, tensor in given.encoder.state_dict().items():
        assert torch.equal(trained.encoder.state_dict()[name], tensor), name
    records = read_log(tmp_path / "run")
    assert ("perplexity" in records[-1]) == ("objective.quantize_from=null" not in switches)


def test_a_stage_trains_the_visual_tokenizer_it_is_there_for(parts):
    """Stage 1 trains it (its frozen encoder apart), stages 2 and 3 leave it as it is."""
    recipes = {
        "tokenizer": f"encoder={parts / 'lowres'}",
        "language-model": f"start={parts / 'lavit'}",
        "pixel-decoder": f"tokenizer={parts / 'lowres'}",
    }
    more = {
        "tokenizer": [f"model={sizes()}", f"detokenizer={detokenizer_sizes('lowres')}"],
        "language-model": ["lora=null"],
        "pixel-decoder": [f"start={parts / 'diffusion_lowres'}", "language_model=null"],
    }
    shipped = {"tokenizer": "paper_tokenizer", "language-model": "finetune", "pixel-decoder": "paper_pixel_decoder"}
    for name, stage in STAGES.items():
        overrides = [recipes[name], f"data={rows(parts)}", *more[name]]
        overrides += ["early_stopping_patience=null", "training_arguments.load_best_model_at_end=false"]
        recipe = load_recipe(RECIPES / f"{shipped[name]}.yaml", overrides, stage.recipe_class)
        model = stage.build(recipe).model.train()
        tokenizer = next(module for module in model.modules() if isinstance(module, LavitVisualTokenizer))
        assert tokenizer.merger.training == (name == "tokenizer")
        assert not any(module.training for module in tokenizer.encoder.modules())


def test_a_task_without_data_is_refused(parts, tmp_path):
    tasks = {"{text: 1.0}": "text_data", "{instruct: 1.0}": "instruction_data", "{draw: 0, caption: 0}": "above 0"}
    for mixture, message in tasks.items():
        with pytest.raises(ValueError, match=message):
            start, data = f"start={parts / 'lavit'}", f"data={rows(parts)}"
            train("finetune", tmp_path / "run", start, data, f"mixture={mixture}")


def test_codes_that_were_computed_before_train_the_same_losses(parts, tmp_path):
    """Images with their codes in the source, and the same without."""
    table = pq.read_table(parts / "rows.parquet")
    model, processor = LavitForConditionalGeneration.from_pretrained(parts / "lavit"), tiny_processor()
    pixels = processor.image_processor([row["bytes"] for row in table["image"].to_pylist()], return_tensors="pt")
    codes = [row.tolist() for row in model.get_image_tokens(pixels.pixel_values).split()]
    pq.write_table(table.append_column("codes", pa.array(codes)), tmp_path / "codes.parquet")
    known = {"path": "parquet", "data_files": str(tmp_path / "codes.parquet"), "codes_column": "codes"}
    for name, data in (("computed", rows(parts)), ("known", json.dumps(known))):
        train("finetune", tmp_path / name, f"start={parts / 'lavit'}", f"data={data}", "lora=null")
    computed, given = (read_log(tmp_path / name) for name in ("computed", "known"))
    for one, other in zip(computed, given, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
