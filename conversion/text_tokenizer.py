"""A sentencepiece model file as a `tokenizer.json` with the same ids: sentencepiece is not needed, here or later."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .source import read_json


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE_MODEL = 2
SPACE = "▁"


@dataclass
class SentencePieceModel:
    """What a model file says.

    Args:
        pieces: (text, score, type) of every id.
        model_type: 1 unigram, 2 BPE, 3 words, 4 characters.
        byte_fallback: whether unknown characters become bytes.
        add_dummy_prefix, remove_extra_whitespaces: of the normalizer.
        charsmap: of the normalizer, compiled; empty where it changes no character.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""


def parse_sentencepiece(content: bytes) -> SentencePieceModel:
    """Reads the protocol buffer `ModelProto` of sentencepiece.

    Raises:
        ValueError: it is none.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                model.pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
                model.model_type = trainer.get(3, 1)
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                model.charsmap = normalizer.get(2, b"")
                model.add_dummy_prefix = bool(normalizer.get(3, 1))
                model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"not a sentencepiece model, or a damaged one ({error!r})") from error
    if not model.pieces:
        raise ValueError("not a sentencepiece model: it has no pieces")
    return model


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer: numbers as int, everything else as bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(content):
        tag = varint()
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type}")
        length = varint() if wire_type == 2 else 8 if wire_type == 1 else 4
        if position + length > len(content):
            raise ValueError("it ends within a field")
        yield number, content[position : position + length]
        position += length


def merges_of(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Pairs in the order in which sentencepiece merges them.

    sentencepiece takes the best scored piece that two neighbours make, the leftmost where several make the same one;
    `tokenizers` takes the first pair of a list. The two agree if, wherever two ways to make one piece can overlap
    (`x+y == y+z` for the neighbours `x y z`), the pair that comes first in the text comes first in the list. That is
    so exactly where the piece begins as it ends. In a run of one and the same thing longer parts stand on the left.
    """
    known = {text for text, _, kind in model.pieces if kind == NORMAL}
    scored = [(score, index, text) for index, (text, score, kind) in enumerate(model.pieces) if kind == NORMAL]
    merges = []
    for _, _, text in sorted(scored, key=lambda entry: (-entry[0], entry[1])):
        length = len(text)
        cuts = [cut for cut in range(1, length) if text[:cut] in known and text[cut:] in known]

        def is_left(cut: int, text: str = text, length: int = length) -> bool:
            # (text[:cut], text[cut:]) can overlap the pair cut at length - cut, and stands to its left then
            return text[cut:] == text[: length - cut]

        def rank(cut: int, length: int = length) -> tuple:
            first = is_left(cut) and (not is_left(length - cut) or cut > length - cut)
            return (0 if first else 1, cut)

        merges += [(text[:cut], text[cut:]) for cut in sorted(cuts, key=rank)]
    return merges


def build_tokenizer(model: SentencePieceModel, legacy: bool, add_bos_token: bool) -> Tokenizer:
    """The fast tokenizer with the ids of transformers' slow Llama tokenizer.

    Args:
        model: see [`parse_sentencepiece`].
        legacy: whether every piece of text between special tokens begins with a space of its own (`True`, how Llama 1
            was used), or the first one alone.
        add_bos_token: whether `add_special_tokens=True` puts BOS in front.

    Raises:
        ValueError: it is no BPE model, or has pieces that Llama's tokenizers do not have.
    """
    if model.model_type != BPE_MODEL:
        raise ValueError(f"the sentencepiece model is of type {model.model_type}; LaVIT's is BPE ({BPE_MODEL})")
    unusual = {text for text, _, kind in model.pieces if kind not in (NORMAL, UNKNOWN, CONTROL, BYTE)}
    if unusual:
        raise ValueError(f"the sentencepiece model has user-defined or unused pieces: {sorted(unusual)[:5]}")
    texts = [text for text, _, _ in model.pieces]
    unknown = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            {text: index for index, text in enumerate(texts)},
            merges_of(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    elif model.add_dummy_prefix:
        # the pre-tokenizer puts the space in front of the first text alone, but not in front of another space
        steps.append(normalizers.Replace(Regex(rf"\A(?=[ {SPACE}])"), SPACE))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if add_bos_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", texts.index("<s>"))]
        )
    return tokenizer


def convert_text_tokenizer(folder: Path, model_max_length: int) -> tuple[PreTrainedTokenizerFast, int]:
    """The language model's tokenizer, with `[IMG]` and `[/IMG]` right above its text, and the number of text ids.

    Args:
        folder: with `tokenizer.model` (or a ready `tokenizer.json`), and `tokenizer_config.json` where it says
            `legacy` (by default true, as for Llama 1) and `add_bos_token` (true).
        model_max_length: context of the language model, in ids.

    Raises:
        OSError: no tokenizer.
        ValueError: a damaged one, or one that is not Llama's kind.
    """
    options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    model_file, ready_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if model_file.is_file():
        try:
            model = parse_sentencepiece(model_file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{model_file}: {error}") from error
        legacy, add_bos_token = options.get("legacy", True), options.get("add_bos_token", True)
        tokenizer = build_tokenizer(model, legacy is not False, add_bos_token is not False)
    elif ready_file.is_file():
        read_json(ready_file)
        tokenizer = Tokenizer.from_file(str(ready_file))
    else:
        raise FileNotFoundError(f"{model_file} is missing: download it again")
    text_vocab_size = tokenizer.get_vocab_size()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        # what the reference pads with
        pad_token="</s>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "boi_token": AddedToken("[IMG]", normalized=False, special=True),
            "eoi_token": AddedToken("[/IMG]", normalized=False, special=True),
        },
    )
    return fast, text_vocab_size
