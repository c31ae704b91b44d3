"""The text side of a small model: a Llama tokenizer trained on its own sentences, and the sentences of its tasks."""

import json
import random
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizer

from modeling_lavit.training.data.samples import ANSWER_PROMPT
from modeling_lavit.training.train_language_model import VISUAL_TOKENS


NAME_AND_STYLE = "{name} in {style} style"
DRAWING_PROMPTS = ("{name}", "a {name}", NAME_AND_STYLE, "a {name} in {style} style", "a {style} {name}")
RESTYLING_PROMPTS = ("in {style} style", "the same in {style} style")
QUESTIONS = {
    "style": ("which style is this?", "what style is it?"),
    "name": ("what is it?", "what is this?"),
}
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]


def train_text_tokenizer(sentences: Iterable[str], vocab_size: int, model_max_length: int) -> LlamaTokenizer:
    """A byte-fallback BPE tokenizer with `[IMG]` and `[/IMG]` right above its text ids.

    Args:
        sentences: what the merges are learnt from.
        vocab_size: most text ids; fewer come out where the sentences need fewer.
        model_max_length: the context of the model it is for, in ids.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        sentences, BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + bytes_, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=False,
        pad_token="</s>",
        padding_side="left",
        model_max_length=model_max_length,
        extra_special_tokens={key: AddedToken(token, special=True) for key, token in VISUAL_TOKENS.items()},
    )


def sentences(names: list[str], styles: list[str]) -> list[str]:
    """Every sentence that the tasks use, for the tokenizer."""
    of_questions = [ANSWER_PROMPT.format(question) for questions in QUESTIONS.values() for question in questions]
    return [
        *names,
        *styles,
        *(of_questions * len(styles)),
        *(p.format(name=name, style=style) for p in DRAWING_PROMPTS for name in names for style in styles),
        *(p.format(style=style) for p in RESTYLING_PROMPTS for style in styles),
    ]


def drawing_prompt(draw: random.Random, name: str, style: str) -> str:
    return draw.choice(DRAWING_PROMPTS).format(name=name, style=style)


def restyling_prompt(draw: random.Random, style: str) -> str:
    return draw.choice(RESTYLING_PROMPTS).format(style=style)


def question_prompt(draw: random.Random, kind: str) -> str:
    return ANSWER_PROMPT.format(draw.choice(QUESTIONS[kind]))
