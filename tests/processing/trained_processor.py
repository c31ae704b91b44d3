"""A `LavitProcessor` around a trained tokenizer, and what tests of it read off its ids."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from modeling_lavit import LavitImageProcessor, LavitProcessor


FIXTURES = Path(__file__).parents[1] / "fixtures" / "preprocess"
REFERENCE = Path(__file__).parents[1] / "fixtures" / "prompts"
CODEBOOK_SIZE = 24


@cache
def trained_tokenizer() -> LlamaTokenizer:
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


def trained_processor(**options) -> LavitProcessor:
    """16x16 pixels, 24 codes."""
    image_processor = LavitImageProcessor(size={"height": 16, "width": 16})
    return LavitProcessor(image_processor, trained_tokenizer(), codebook_size=CODEBOOK_SIZE, **options)


@cache
def reference_processor() -> tuple[LavitProcessor, dict]:
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
