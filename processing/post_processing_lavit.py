"""Generated ids back to texts and codes: what `LavitProcessor` inherits for the way out."""

import re
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers.processing_utils import ProcessorMixin

from modeling_lavit.vocabulary_lavit import LavitVocabulary


GENERATION_MODES = ("text", "image", "interleaved")
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:st|mr|mrs|ms|dr|jr|sr|mt|ft|vs|etc|approx|prof|gen|(?:[a-z]\.)*[a-z])$", re.IGNORECASE
)


class LavitPostProcessingMixin(ProcessorMixin):
    """Needs `tokenizer` and what follows."""

    image_token: str
    boi_token_id: int
    eoi_token_id: int
    visual_offset: int
    vocabulary: LavitVocabulary

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """As the tokenizer's, with marks for images: `[IMG:56 codes]` for codes, `<image>` for an empty slot.

        `[IMG:12...` is an image whose end has not come yet. It has no space, so that a `TextStreamer` of transformers
        that is given this processor instead of its tokenizer prints the mark of an image once it is complete. With
        `skip_special_tokens=True` images are left out.

        Args:
            token_ids: ids of one row, or of several; then the result is a list.
            kwargs: of the tokenizer's `decode`.
        """
        rows = _rows(token_ids) if _are_id_rows(token_ids) else None
        if skip_special_tokens or rows is None or not any(max(row, default=0) >= self.boi_token_id for row in rows):
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        texts = [self._decode_with_marks(row, **kwargs) for row in rows]
        return texts[0] if _is_one_row(token_ids) else texts

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """[`decode`] of several rows."""
        texts: list[Any] = [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]
        return texts

    def _decode_with_marks(self, ids: list[int], **kwargs) -> str:
        text, start = "", 0
        for is_image, run in groupby(ids, lambda i: i >= self.boi_token_id):
            run = list(run)
            start += len(run)
            text += self._marks_of(run, start == len(ids)) if is_image else self.tokenizer.decode(run, **kwargs)
        return text

    def _marks_of(self, ids: list[int], at_the_end: bool) -> str:
        """Marks of adjacent images; `ids` are codes, `[IMG]` and `[/IMG]`."""
        marks = ""
        while ids:
            opened = ids[0] == self.boi_token_id
            rest = ids[1:] if opened else ids
            count = next((n for n, i in enumerate(rest) if i < self.visual_offset), len(rest))
            closed = count < len(rest) and rest[count] == self.eoi_token_id
            if count:
                unfinished = at_the_end and count == len(rest)
                marks += f"[IMG:{count}..." if unfinished else f"[IMG:{count} codes]"
            elif opened and closed:
                marks += self.image_token
            else:
                marks += "[IMG]" if opened else "[/IMG]"
            ids = rest[count + closed :]
        return marks

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs,
    ) -> list:
        """What `generate` returned, one entry for each row.

        Args:
            generated_outputs: ids (batch, length); in image mode also whatever `model.decode_image_tokens` returned,
                which passes through.
            skip_special_tokens: of the text parts.
            generation_mode: `None` or `"text"`: a string. `"image"`: the codes, counted from 0 and cut at the first
                `[/IMG]`, 1-D int64. `"interleaved"`: a list of strings and codes in order.
            kwargs: of the tokenizer's `decode`.

        Raises:
            ValueError: an unknown mode.
        """
        if generation_mode is None or generation_mode == "text":
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {generation_mode!r}")
        if generation_mode == "image":
            if not _are_id_rows(generated_outputs):
                return generated_outputs
            return [self._codes_of(row) for row in _rows(generated_outputs)]
        return [self._segments(row, skip_special_tokens, **kwargs) for row in _rows(generated_outputs)]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Ids (batch, length) to one string for each row; visual ids have no text. `kwargs`: of the `decode` used."""
        return [self._decode_row(row, skip_special_tokens, **kwargs) for row in _rows(generated_outputs)]

    def _codes_of(self, ids: list[int]) -> torch.Tensor:
        ids = ids[: ids.index(self.eoi_token_id)] if self.eoi_token_id in ids else ids
        codes = [self.vocabulary.codes_of(i) for i in ids if self.vocabulary.is_code(i)]
        return torch.tensor(codes, dtype=torch.long)

    def _segments(self, ids: list[int], skip_special_tokens: bool, **kwargs) -> list[str | torch.Tensor]:
        segments, start = [], 0
        while start < len(ids):
            inside = ids[start] == self.boi_token_id
            closing = self.eoi_token_id if inside else self.boi_token_id
            end = ids.index(closing, start) if closing in ids[start:] else len(ids)
            if inside:
                segments.append(self._codes_of(ids[start:end]))
            else:
                segments.append(self._decode_row(ids[start:end], skip_special_tokens, **kwargs))
            start = end + 1 if inside else end
        return [segment for segment in segments if isinstance(segment, torch.Tensor) or segment]

    def post_process_caption(
        self, generated_outputs: Any, input_ids: Any = None, reference_compat: bool = False
    ) -> list[str]:
        """Captions from generated ids or texts: the first sentence of the first line, without its full stop.

        Args:
            generated_outputs: ids (batch, length), or the decoded strings.
            input_ids: the prompts, if `generated_outputs` start with them: they are taken off, id by id.
            reference_compat: cut at the first full stop even within "st. james church" or "3.5".

        Raises:
            ValueError: the ids do not start with `input_ids`, or belong to another number of prompts.
        """
        texts = self._decoded(generated_outputs, input_ids)
        if reference_compat:
            return [text.split(".")[0] for text in texts]
        return [_first_sentence(text.split("\n")[0]) for text in texts]

    def post_process_answer(
        self,
        generated_outputs: Any,
        input_ids: Any = None,
        reference_compat: bool = False,
        lemmatize: bool = False,
    ) -> list[str]:
        """Answers from generated ids or texts: what comes before a line break, a further question, or a full stop.

        Args:
            generated_outputs: ids (batch, length), or the decoded strings.
            input_ids: the prompts, if `generated_outputs` start with them: they are taken off, id by id.
            reference_compat: cut at the first comma and at every full stop, too.
            lemmatize: lower case, nouns and verbs in their base form, as VQA scores are computed by the reference.

        Raises:
            ValueError: the ids do not start with `input_ids`, or belong to another number of prompts.
            ImportError: `lemmatize` without the package `spacy`.
            OSError: `lemmatize` without spaCy's model `en_core_web_sm`.
        """
        answers = []
        for answer in self._decoded(generated_outputs, input_ids):
            if reference_compat:
                for end in ("\n", "question:", "Long answer:", ",", "."):
                    answer = answer.split(end)[0]
            else:
                answer = _first_sentence(re.split(r"\n|question:|long answer:", answer, flags=re.IGNORECASE)[0])
            answers.append(answer.strip())
        return _lemmatize(answers) if lemmatize else answers

    def _decode_row(self, ids: list[int], skip_special_tokens: bool = True, **kwargs) -> str:
        """Decodes as sentencepiece does: an invalid byte costs itself alone, where `decode` loses the run it is in."""
        has_bytes = self.tokenizer.convert_tokens_to_ids("<0x0A>") not in (None, self.tokenizer.unk_token_id)
        if kwargs or not skip_special_tokens or not has_bytes:
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        special = set(self.tokenizer.all_special_ids)
        tokens = self.tokenizer.convert_ids_to_tokens([i for i in ids if i < self.boi_token_id and i not in special])
        is_byte = re.compile("<0x[0-9A-F]{2}>").fullmatch
        parts = (bytes([int(t[3:5], 16)]) if is_byte(t) else t.replace("▁", " ").encode() for t in tokens)
        content = b"".join(parts)
        text = re.sub("[\udc80-\udcff]", "\ufffd", content.decode(errors="surrogateescape"))
        return text.removeprefix(" ")

    def _decoded(self, generated_outputs: Any, input_ids: Any) -> list[str]:
        if not _are_id_rows(generated_outputs):
            if input_ids is not None:
                raise ValueError("input_ids go with generated ids: take the prompts off texts before")
            texts = [generated_outputs] if isinstance(generated_outputs, str) else list(generated_outputs)
            return [text.strip() for text in texts]
        rows = _rows(generated_outputs)
        if input_ids is not None:
            prompts = _rows(input_ids)
            if not prompts or len(rows) % len(prompts):
                raise ValueError(f"{len(rows)} generated rows do not belong to {len(prompts)} prompts")
            repeats = len(rows) // len(prompts)
            rows = [self._without_prompt(row, prompts[i // repeats]) for i, row in enumerate(rows)]
        return [self._decode_row(row).strip() for row in rows]

    def _without_prompt(self, ids: list[int], prompt: list[int]) -> list[int]:
        """What follows the prompt, wherever the two are padded, and whether or not its slots are filled with codes."""
        ids, prompt = self._without_padding(ids, left=True), self._without_padding(prompt, left=True, right=True)
        position = 0
        for wanted in prompt:
            while position < len(ids) and ids[position] != wanted and ids[position] >= self.visual_offset:
                position += 1
            if position == len(ids) or ids[position] != wanted:
                raise ValueError("the generated ids do not start with input_ids: give new ids alone without input_ids")
            position += 1
        return ids[position:]

    def _without_padding(self, ids: list[int], left: bool = False, right: bool = False) -> list[int]:
        pad, start, end = self.tokenizer.pad_token_id, 0, len(ids)
        while left and start < end and ids[start] == pad:
            start += 1
        while right and start < end and ids[end - 1] == pad:
            end -= 1
        return ids[start:end]


def _are_id_rows(outputs: Any) -> bool:
    if isinstance(outputs, torch.Tensor):
        return outputs.ndim <= 2 and not outputs.is_floating_point()
    if isinstance(outputs, np.ndarray):
        return outputs.ndim <= 2 and np.issubdtype(outputs.dtype, np.integer)
    first = outputs[0] if isinstance(outputs, list | tuple) and len(outputs) else None
    return isinstance(first, int) or (first is not None and not isinstance(first, str) and _are_id_rows(first))


def _is_one_row(outputs: Any) -> bool:
    return outputs.ndim < 2 if isinstance(outputs, torch.Tensor | np.ndarray) else isinstance(outputs[0], int)


def _rows(outputs: Any) -> list[list[int]]:
    rows = outputs.tolist() if isinstance(outputs, torch.Tensor | np.ndarray) else outputs
    if isinstance(rows, int):
        return [[rows]]
    if len(rows) and isinstance(rows[0], int):
        return [list(rows)]
    return [row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else list(row) for row in rows]


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence: not one inside a number, after an initial or an abbreviation."""
    for stop in re.finditer(r"\.(?=\s|$)", text):
        if not ABBREVIATION.search(text[: stop.start()]) or stop.end() == len(text):
            return text[: stop.start()].strip()
    return text.strip()


def _lemmatize(answers: list[str]) -> list[str]:
    try:
        import spacy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "lemmatize=True needs spaCy: pip install spacy, then spacy download en_core_web_sm"
        ) from error
    analyse = spacy.load("en_core_web_sm")
    return [
        " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in analyse(answer.lower()))
        for answer in answers
    ]
