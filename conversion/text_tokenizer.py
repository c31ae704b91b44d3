"""A sentencepiece model file as a `tokenizer.json` with the same ids: sentencepiece is needed here, and not later."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .source import read_json


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE_MODEL = 2
SPACE = "▁"


def parse_sentencepiece(content: bytes):
    """A model file as sentencepiece's own `ModelProto`.

    Raises:
        ImportError: the packages sentencepiece and protobuf are not installed.
        ValueError: it is no such file.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ImportError(
            "the text tokenizer of official checkpoints is read by sentencepiece: pip install 'lavit-hf[convert]'"
        ) from error
    try:
        model = ModelProto.FromString(content)
    except DecodeError as error:
        raise ValueError(f"not a sentencepiece model, or a damaged one ({error})") from error
    if not model.pieces:
        raise ValueError("not a sentencepiece model: it has no pieces")
    return model


def merges_of(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Pairs in the order in which sentencepiece merges them, from its normal pieces and their scores.

    sentencepiece takes the best scored piece that two neighbours make, the leftmost where several make the same one;
    `tokenizers` takes the first pair of a list. The two agree if, wherever two ways to make one piece can overlap
    (`x+y == y+z` for the neighbours `x y z`), the pair that comes first in the text comes first in the list. That is
    so exactly where the piece begins as it ends. In a run of one and the same thing longer parts stand on the left.
    """
    known = {text for text, _ in pieces}
    merges = []
    for text, _ in sorted(pieces, key=lambda piece: -piece[1]):
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


def build_tokenizer(model, legacy: bool, add_bos_token: bool) -> Tokenizer:
    """The fast tokenizer with the ids of transformers' slow Llama tokenizer.

    Args:
        model: see [`parse_sentencepiece`].
        legacy: whether every piece of text between special tokens begins with a space of its own (`True`, how Llama 1
            was used), or the first one alone.
        add_bos_token: whether `add_special_tokens=True` puts BOS in front.

    Raises:
        ValueError: it is no BPE model, or has pieces that Llama's tokenizers do not have.
    """
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != BPE_MODEL:
        raise ValueError(f"the sentencepiece model is of type {trainer.model_type}; LaVIT's is BPE ({BPE_MODEL})")
    unusual = {piece.piece for piece in model.pieces if piece.type not in (NORMAL, UNKNOWN, CONTROL, BYTE)}
    if unusual:
        raise ValueError(f"the sentencepiece model has user-defined or unused pieces: {sorted(unusual)[:5]}")
    texts = [piece.piece for piece in model.pieces]
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    unknown = [piece.piece for piece in model.pieces if piece.type == UNKNOWN]
    if len(unknown) != 1 or len(set(texts)) != len(texts) or "<s>" not in texts:
        raise ValueError("the sentencepiece model must have one unknown piece, <s>, and no piece twice")
    tokenizer = Tokenizer(
        BPE(
            {text: index for index, text in enumerate(texts)},
            merges_of([(piece.piece, piece.score) for piece in model.pieces if piece.type == NORMAL]),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    elif normalizer.add_dummy_prefix:
        # the pre-tokenizer puts the space in front of the first text alone, but not in front of another space
        steps.append(normalizers.Replace(Regex(rf"\A(?=[ {SPACE}])"), SPACE))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
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
        try:
            tokenizer = Tokenizer.from_file(str(ready_file))
        except Exception as error:  # what tokenizers raises has no class of its own
            raise ValueError(f"{ready_file} is no tokenizer, or a damaged one: {error}") from error
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
