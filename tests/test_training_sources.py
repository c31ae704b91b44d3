"""Stages on other data than the emoji, and from pretrained parts, through the real entry point."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from safetensors.torch import load_file
from tiny import (
    TEXT_VOCAB_SIZE,
    tiny_detokenizer,
    tiny_model,
    tiny_processor,
    tiny_scheduler,
    tiny_unet,
    tiny_vae,
    tiny_visual_config,
)
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lavit import (
    LavitDetokenizer,
    LavitForConditionalGeneration,
    LavitProcessor,
    LavitVisualTokenizer,
)
from modeling_lavit.modeling_lavit import IGNORED_LABEL
from modeling_lavit.training.packing import pack, pack_rows
from modeling_lavit.training.run import main
from modeling_lavit.training.samples import Sequences


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
EMOJI = Path(__file__).parent / "fixtures" / "emoji"
FEW_STEPS = [
    "training_arguments.max_steps=2",
    "training_arguments.per_device_train_batch_size=4",
    "training_arguments.logging_steps=1",
    "training_arguments.save_steps=10",
    "training_arguments.bf16=false",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Parquet of 12 pictures with texts, one of which is no picture."""
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()][:12]
    data = Dataset.from_dict(
        {
            "image": [{"bytes": (EMOJI / row["file_name"]).read_bytes(), "path": None} for row in rows],
            "text": [f"a {row['name']}" for row in rows],
            "question": ["what is it?"] * len(rows),
            "answer": [row["name"] for row in rows],
            "messages": [
                [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": row["name"]}]
                for row in rows
            ],
        }
    ).cast_column("image", Image(decode=False))
    path = tmp_path_factory.mktemp("source") / "rows.parquet"
    data.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A tiny LaVIT checkpoint and its parts, in the folders in which stages look for them."""
    folder = tmp_path_factory.mktemp("parts")
    model = tiny_model()
    model.save_pretrained(folder / "lavit")
    tiny_processor().save_pretrained(folder / "lavit")
    model.model.visual_tokenizer.save_pretrained(folder / "stage1" / "visual_tokenizer")
    return folder


def parquet(path: Path, streaming: bool = False) -> str:
    return f"data={{source: parquet, data_files: {path}, streaming: {str(streaming).lower()}}}"


def train(stage: str, recipe: str, output: Path, *overrides: str) -> Path:
    main([stage, str(RECIPES / recipe), f"training_arguments.output_dir={output}", *FEW_STEPS, *overrides])
    return output / "final"


def read_log(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


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
    [("null", False, "question_column: question, answer_column: answer"), ("160", True, "messages_column: messages")],
)
def test_a_lavit_checkpoint_goes_on_with_any_source(parts, source, tmp_path, packing, streaming, turns):
    final = train(
        "language-model",
        "finetune.yaml",
        tmp_path / "run",
        f"start={parts / 'lavit'}",
        parquet(source, streaming),
        f"objective.packing={packing}",
        "images_per_sample=2",
        f"text_data={{source: parquet, data_files: {source}}}",
        f"instruction_data={{source: parquet, data_files: {source}, {turns}}}",
        "mixture={caption: 0.3, draw: 0.3, text: 0.2, instruct: 0.2}",
        "lora=null",
    )
    before, after = (LavitForConditionalGeneration.from_pretrained(path) for path in (parts / "lavit", final))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    for name, tensor in before.model.visual_tokenizer.state_dict().items():
        assert torch.equal(after.model.visual_tokenizer.state_dict()[name], tensor), name
    LavitProcessor.from_pretrained(final)


def test_packed_training_has_the_losses_of_padded_training(parts, source, tmp_path):
    for name, packing in (("padded", "null"), ("packed", "200")):
        train(
            "language-model",
            "finetune.yaml",
            tmp_path / name,
            f"start={parts / 'lavit'}",
            parquet(source),
            f"objective.packing={packing}",
            "lora=null",
        )
    padded, packed = (read_log(tmp_path / name) for name in ("padded", "packed"))
    for one, other in zip(padded, packed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_low_rank_adapters_are_written_by_themselves_and_merged(parts, source, tmp_path):
    final = train(
        "language-model",
        "finetune.yaml",
        tmp_path / "run",
        f"start={parts / 'lavit'}",
        parquet(source),
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
    ids = Sequences(tiny_processor(), prompt_dropout=0.0).text("see [IMG][/IMG] or </s>")
    assert max(ids) < TEXT_VOCAB_SIZE and tiny_processor().tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("tied", [False, True])
def test_a_pretrained_language_model_learns_visual_tokens(parts, source, tmp_path, tied):
    llama = save_llama(tmp_path / "llama", tie_word_embeddings=tied)
    arguments = [
        "start=null",
        f"tokenizer={parts / 'stage1'}",
        f"language_model={tmp_path / 'llama'}",
        "lora=null",
        parquet(source),
        "training_arguments.save_steps=1",
        "training_arguments.warmup_steps=0",
    ]
    finals = [
        train(
            "language-model", "finetune.yaml", tmp_path / name, *arguments, f"training_arguments.learning_rate={rate}"
        )
        for name, rate in (("still", 0.0), ("moved", 0.01))
    ]
    still, moved = (LavitForConditionalGeneration.from_pretrained(final) for final in finals)
    assert still.config.tie_word_embeddings == tied
    assert (still.lm_head.weight is still.get_input_embeddings().weight) == tied
    rows, still_rows = (x.get_input_embeddings().weight for x in (llama, still))
    assert torch.equal(still_rows[: len(rows)], rows)
    assert len(still_rows) == still.config.vocabulary.size
    offset = still.config.vocabulary.visual_offset
    assert (still.lm_head.weight[offset:] != moved.lm_head.weight[offset:]).any(1).all()


def test_adapters_alone_are_refused_for_new_visual_ids(parts, source, tmp_path):
    save_llama(tmp_path / "llama")
    arguments = [
        "start=null",
        f"tokenizer={parts / 'stage1'}",
        f"language_model={tmp_path / 'llama'}",
        parquet(source),
    ]
    with pytest.raises(ValueError, match="modules_to_save"):
        train("language-model", "finetune.yaml", tmp_path / "run", *arguments)


@pytest.mark.parametrize("variant", ["lowres", "highres"])
def test_pixel_decoders_start_from_stable_diffusion_folders(parts, source, tmp_path, variant):
    """SD 1.5 (`lowres`) and SDXL (`highres`), and pictures larger than the tokenizer's."""
    dims = {"lowres": {"variant": "lowres", "prompt_embed_dims": (24,)}, "highres": {}}[variant]
    detokenizer = tiny_detokenizer(**dims)
    model = LavitVisualTokenizer.from_pretrained(parts / "stage1" / "visual_tokenizer")
    detokenizer.codebook.load_state_dict(model.quantizer.codebook.state_dict())
    model.save_pretrained(tmp_path / "stage1" / "visual_tokenizer")
    detokenizer.save_pretrained(tmp_path / "stage1" / "detokenizer")
    unet = tiny_unet(variant)
    for name, component in (("unet", unet), ("vae", tiny_vae()), ("scheduler", tiny_scheduler())):
        component.save_pretrained(tmp_path / "stable-diffusion" / name)
    final = train(
        "pixel-decoder",
        "paper_pixel_decoder.yaml",
        tmp_path / "run",
        parquet(source),
        f"tokenizer={tmp_path / 'stage1'}",
        f"start={tmp_path / 'stable-diffusion'}",
        "resolution=32",
        "objective.condition_dropout=0.5",
    )
    trained = LavitDetokenizer.from_pretrained(final / "detokenizer")
    assert not torch.equal(trained.prompt_projections[0].weight, detokenizer.prompt_projections[0].weight)
    assert torch.equal(trained.layers[0].mlp.fc1.weight, detokenizer.layers[0].mlp.fc1.weight)
    after = load_file(final / "unet" / "diffusion_pytorch_model.safetensors")
    assert after.keys() == unet.state_dict().keys()
    assert any(not torch.equal(after[key], tensor) for key, tensor in unet.state_dict().items())


def test_a_unet_of_another_width_is_refused(parts, source, tmp_path):
    tiny_detokenizer(prompt_embed_dims=(8, 8)).save_pretrained(tmp_path / "stage1" / "detokenizer")
    LavitVisualTokenizer.from_pretrained(parts / "stage1" / "visual_tokenizer").save_pretrained(
        tmp_path / "stage1" / "visual_tokenizer"
    )
    for name, component in (("unet", tiny_unet()), ("vae", tiny_vae()), ("scheduler", tiny_scheduler())):
        component.save_pretrained(tmp_path / "stable-diffusion" / name)
    with pytest.raises(ValueError, match="cross_attention_dim"):
        train(
            "pixel-decoder",
            "paper_pixel_decoder.yaml",
            tmp_path / "run",
            parquet(source),
            f"tokenizer={tmp_path / 'stage1'}",
            f"start={tmp_path / 'stable-diffusion'}",
        )


@pytest.mark.parametrize("switches", [[], ["objective.quantize_from=null"], ["objective.freeze_selector_from=0"]])
def test_the_papers_tokenizer_trains_on_any_pictures(parts, source, tmp_path, switches):
    sizes = tiny_visual_config().to_diff_dict()
    shared = {key: sizes[key] for key in ("hidden_size", "intermediate_size", "codebook_size", "codebook_dim")}
    model = {**shared, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    model |= {"merger_num_hidden_layers": 1, "merger_num_attention_heads": 2, "attention_epsilon": 0.0}
    decoder = {**shared, "num_hidden_layers": 1, "num_attention_heads": 2, "num_queries": 16, "feature_size": 32}
    decoder |= {"variant": "lowres", "prompt_embed_dims": [24]}
    final = train(
        "tokenizer",
        "paper_tokenizer.yaml",
        tmp_path / "run",
        parquet(source, streaming=True),
        f"encoder={parts / 'stage1' / 'visual_tokenizer'}",
        f"model={json.dumps(model)}",
        f"detokenizer={json.dumps(decoder)}",
        "training_arguments.warmup_steps=0",
        *switches,
    )
    trained = LavitVisualTokenizer.from_pretrained(final / "visual_tokenizer")
    given = LavitVisualTokenizer.from_pretrained(parts / "stage1" / "visual_tokenizer")
    for name, tensor in given.encoder.state_dict().items():
        assert torch.equal(trained.encoder.state_dict()[name], tensor), name
    records = read_log(tmp_path / "run")
    assert ("perplexity" in records[-1]) == ("objective.quantize_from=null" not in switches)


def test_terms_that_need_names_are_refused_for_pictures_without(parts, source, tmp_path):
    with pytest.raises(ValueError, match=r"objective\.weights\.pixels"):
        train(
            "tokenizer",
            "paper_tokenizer.yaml",
            tmp_path / "run",
            parquet(source),
            f"encoder={parts / 'stage1' / 'visual_tokenizer'}",
            f"model={json.dumps(tiny_visual_config().to_diff_dict())}",
            "objective.weights.pixels=1.0",
        )


def test_a_task_without_data_is_refused(parts, source, tmp_path):
    for mixture, message in (("{text: 1.0}", "text_data"), ("{restyle: 1.0}", "restyle"), ("{draw: 0.0}", "above 0")):
        with pytest.raises(ValueError, match=message):
            train(
                "language-model",
                "finetune.yaml",
                tmp_path / "run",
                f"start={parts / 'lavit'}",
                parquet(source),
                f"mixture={mixture}",
            )
