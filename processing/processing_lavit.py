"""Prompts of text and pictures to ids, and generated ids back to text and codes (LaVIT, arXiv 2309.04669)."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from modeling_lavit.saving_lavit import SavedWithCodeMixin

from .image_processing_lavit import LavitImageProcessorKwargs, flatten_images


GENERATION_MODES = ("text", "image", "interleaved")
SUPPORTED_TEXT_KWARGS = {
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_tensors",
    "verbose",
}
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:st|mr|mrs|ms|dr|jr|sr|mt|ft|vs|etc|approx|prof|gen|(?:[a-z]\.)*[a-z])$", re.IGNORECASE
)

# A base model has learnt "Question: ... Answer:", not roles. With generation_mode="image" the prompt is the messages'
# own text and pictures.
DEFAULT_CHAT_TEMPLATE = """\
{%- set state = namespace(asked=false) -%}
{%- for message in messages -%}
    {%- set blocks = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
    {%- set text = blocks | selectattr("type", "equalto", "text") | map(attribute="text") | join(" ") | trim -%}
    {%- if generation_mode == "image" -%}
        {%- for block in blocks -%}
            {{- "<image>" if block.type == "image" else block.text -}}
        {%- endfor -%}
    {%- elif message.role == "assistant" -%}
        {{- " Answer: " + text if state.asked else text -}}
        {{- "" if loop.last else "\\n" -}}
        {%- set state.asked = false -%}
    {%- else -%}
        {{- "\\n" if state.asked -}}
        {%- for block in blocks if block.type == "image" -%}
            {{- "<image>" -}}
        {%- endfor -%}
        {%- if message.role == "system" -%}
            {{- text + "\\n" -}}
        {%- elif text -%}
            {{- "Question: " + text -}}
        {%- endif -%}
        {%- set state.asked = message.role != "system" and text != "" -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and state.asked and generation_mode != "image" -%}
    {{- " Answer:" -}}
{%- endif -%}
"""


class LavitProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: LavitImageProcessorKwargs
    generation_mode: str
    reference_compat: bool


class LavitProcessor(SavedWithCodeMixin, ProcessorMixin):
    """One processor for reading and drawing.

    ```python
    processor(images=picture)                                                   # captioning
    processor(images=picture, text="<image>Question: what is it? Answer:")      # answering
    processor(text="a red apple", generation_mode="image")                      # drawing: the prompt ends with [IMG]
    processor(images=picture, text="<image> in watercolour", generation_mode="image")
    processor(text="<image> in watercolour", visual_tokens=[codes], generation_mode="image")
    ```

    `<image>` marks where a picture goes. It is no token: a picture given as pixels becomes the empty slot
    `[IMG][/IMG]`, which the model fills; one given as codes becomes `[IMG] ids [/IMG]`. Spaces next to a mark are
    dropped, and each piece of text between marks is tokenized by itself, without BOS.

    Args:
        image_processor: a [`LavitImageProcessor`].
        tokenizer: has `[IMG]` as `boi_token` and `[/IMG]` as `eoi_token`, right above its text ids
            (`extra_special_tokens={"boi_token": "[IMG]", "eoi_token": "[/IMG]"}`). The id of code `k` is
            `eoi_token_id + 1 + k`.
        chat_template: Jinja; by default a question-and-answer prompt.
        codebook_size: number of codes; codes above it are refused where it is known.
    """

    valid_processor_kwargs = LavitProcessorKwargs
    text_kwargs: ClassVar = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    images_kwargs: ClassVar = {"return_tensors": "pt"}
    generation_mode = "text"
    reference_compat = False
    image_token = "<image>"

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None, codebook_size: int | None = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        self.codebook_size = codebook_size
        self.boi_token_id = getattr(tokenizer, "boi_token_id", None)
        self.eoi_token_id = getattr(tokenizer, "eoi_token_id", None)
        if self.boi_token_id is None or self.eoi_token_id != self.boi_token_id + 1:
            raise ValueError(
                "the tokenizer needs [IMG] and [/IMG] with adjacent ids above its text: load it with "
                'extra_special_tokens={"boi_token": "[IMG]", "eoi_token": "[/IMG]"} '
                f"(boi_token_id is {self.boi_token_id}, eoi_token_id is {self.eoi_token_id})"
            )
        self.visual_offset = self.eoi_token_id + 1
        self.image_token_ids = [self.boi_token_id, self.eoi_token_id]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        visual_tokens: Any = None,
        **kwargs: Unpack[LavitProcessorKwargs],
    ) -> BatchFeature:
        """Builds the inputs of `forward` and `generate`.

        Args:
            images: pictures as [`LavitImageProcessor`] takes them: one, a flat list (handed to the marks in order,
                over the whole batch) or one list for each prompt. Without text every picture (every inner list) is
                a prompt.
            text: prompts with one `<image>` for each picture.
            visual_tokens: codes, counted from 0, in place of pixels: a 1-D integer sequence, tensor or array for one
                picture, a flat list of them, one list for each prompt, or `LavitVisualTokens`. In a text without
                any mark they go in front, each once.
            generation_mode: `"text"`, `"interleaved"`, or `"image"`, which ends every prompt with `[IMG]`.
            reference_compat: what the reference does: pictures lose their alpha instead of being put on white, and
                codes in an image prompt stand without `[IMG]` and `[/IMG]`.
            kwargs: `padding`, `padding_side` (left), `max_length`, `pad_to_multiple_of`, `return_tensors` ("pt") of
                the text; all of the image processor's.

        Returns:
            `input_ids` and `attention_mask` (batch, length); `pixel_values` (pictures of the batch in order, 3,
            height, width) if `images` are given.

        Raises:
            ValueError: marks and pictures disagree, a prompt is empty or longer than the context, codes out of range,
                pictures that cannot be read, unknown mode.
        """
        merged = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)
        mode, text_kwargs, images_kwargs = merged["generation_mode"], merged["text_kwargs"], merged["images_kwargs"]
        self._check_inputs(images, text, videos, audio, visual_tokens, mode, merged)

        pixel_values = {}
        if visual_tokens is not None:
            prompts, pictures = self._match(_as_lists(visual_tokens), text, marks_optional=True)
            pictures = [[self._code_ids(codes, i) for codes in group] for i, group in enumerate(pictures)]
            if not (merged["reference_compat"] and mode == "image"):
                pictures = [[[self.boi_token_id, *ids, self.eoi_token_id] for ids in group] for group in pictures]
        elif images is not None:
            images = _grouped(images)
            if not flatten_images(images):
                raise ValueError("images is empty: leave it out where a call has no pictures")
            prompts, pictures = self._match(images, text, marks_optional=False)
            if merged["reference_compat"]:
                images_kwargs["reference_compat"] = True
            pixel_values = self.image_processor([image for group in pictures for image in group], **images_kwargs)
            pictures = [[self.image_token_ids] * len(group) for group in pictures]
        else:
            prompts = [text] if isinstance(text, str) else list(text)
            _, pictures = self._match([[] for _ in prompts], prompts, marks_optional=False)

        input_ids = self._encode(prompts, pictures, mode, text_kwargs)
        padded = self.tokenizer.pad(
            {"input_ids": input_ids},
            verbose=False,
            **{key: value for key, value in text_kwargs.items() if key not in ("add_special_tokens", "verbose")},
        )
        if merged.get("return_mm_token_type_ids"):
            padded["mm_token_type_ids"] = [[int(i >= self.boi_token_id) for i in row] for row in padded["input_ids"]]
        return BatchFeature({**padded, **pixel_values}, tensor_type=text_kwargs["return_tensors"])

    def _check_inputs(self, images, text, videos, audio, visual_tokens, mode: str, merged: dict):
        if mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {mode!r}")
        if videos is not None or audio is not None:
            raise ValueError("LavitProcessor takes text and pictures, neither videos nor audio")
        if images is None and text is None and visual_tokens is None:
            raise ValueError("nothing to process: give text, images or visual_tokens")
        if images is not None and visual_tokens is not None:
            raise ValueError("give either images or visual_tokens: one call cannot mix pixels and codes")
        if text is not None and not isinstance(text, str):
            if not isinstance(text, list | tuple) or not all(isinstance(prompt, str) for prompt in text):
                raise ValueError(
                    f"text must be a string or a list of strings, got {type(text).__name__}: {text!r:.80}"
                )
            if len(text) == 0:
                raise ValueError("text is an empty list")
        unsupported = {name for name, value in merged["text_kwargs"].items() if value} - SUPPORTED_TEXT_KWARGS
        if merged.get("return_text_replacement_offsets"):
            unsupported.add("return_text_replacement_offsets")
        if unsupported:
            raise ValueError(f"LavitProcessor does not support {sorted(unsupported)}: shorten prompts before the call")

    def _match(
        self, pictures: list, text: str | list[str] | None, marks_optional: bool
    ) -> tuple[list[str], list[list]]:
        """Pairs pictures (flat list of `_Picture`s, or one list for each prompt) with the prompts' marks.

        Returns:
            The prompts, with a mark for every picture, and one list of pictures for each prompt.
        """
        nested = len(pictures) > 0 and all(isinstance(group, list) for group in pictures)
        if text is None:
            groups = pictures if nested else [[picture] for picture in pictures]
            return [self.image_token * len(group) for group in groups], groups

        prompts = [text] if isinstance(text, str) else list(text)
        marks = [prompt.count(self.image_token) for prompt in prompts]
        if nested:
            if len(pictures) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but pictures for {len(pictures)}")
            groups = pictures
        elif marks_optional and not any(marks) and len(prompts) > 1:
            if len(pictures) != len(prompts):
                raise ValueError(
                    f"{len(prompts)} prompts without {self.image_token} and {len(pictures)} pictures: "
                    "give one list of pictures for each prompt"
                )
            groups = [[picture] for picture in pictures]
        elif not any(marks) or len(prompts) == 1:
            groups = [pictures] + [[] for _ in prompts[1:]]
        else:
            starts = np.cumsum([0, *marks])
            groups = [pictures[start : start + count] for start, count in zip(starts, marks, strict=False)]
            groups[-1] = groups[-1] + pictures[starts[-1] :]
        for i, group in enumerate(groups):
            if marks_optional and marks[i] == 0:
                prompts[i] = self.image_token * len(group) + prompts[i]
            elif marks[i] != len(group):
                raise ValueError(
                    f"prompt {i} has {marks[i]} {self.image_token} mark(s), but gets {len(group)} picture(s): "
                    "every mark takes one picture, in order"
                )
        return prompts, groups

    def _code_ids(self, codes: list[int], prompt: int) -> list[int]:
        highest = self.codebook_size - 1 if self.codebook_size else None
        if not codes:
            raise ValueError(f"visual_tokens of prompt {prompt}: a picture has no codes")
        if min(codes) < 0 or (highest is not None and max(codes) > highest):
            raise ValueError(
                f"visual_tokens of prompt {prompt} go from {min(codes)} to {max(codes)}; they are codes, "
                f"counted from 0{'' if highest is None else f' to {highest}'}, not ids of the language model"
            )
        return [self.visual_offset + code for code in codes]

    def _encode(
        self, prompts: list[str], pictures: list[list[list[int]]], mode: str, text_kwargs: dict
    ) -> list[list[int]]:
        """Ids of every prompt, not padded; `pictures` holds the ids that take the place of each mark."""
        rows, prefix = [], [self.tokenizer.bos_token_id] if text_kwargs.get("add_special_tokens") else []
        limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        for i, (prompt, replacements) in enumerate(zip(prompts, pictures, strict=True)):
            pieces = re.split(rf" *{re.escape(self.image_token)} *", prompt)
            pieces_ids = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            if max(map(max, filter(None, pieces_ids)), default=0) >= self.boi_token_id:
                raise ValueError(
                    f"the text of prompt {i} holds [IMG], [/IMG] or a token added to the tokenizer, whose ids (from "
                    f"{self.boi_token_id} on) mean pictures: mark pictures by {self.image_token}, and add no tokens"
                )
            ids = prefix + pieces_ids[0]
            for replacement, piece_ids in zip(replacements, pieces_ids[1:], strict=True):
                ids = ids + replacement + piece_ids
            if not replacements and not prompt.strip():
                raise ValueError(f"prompt {i} is empty: it needs text or a picture")
            if mode == "image":
                ids = [*ids, self.boi_token_id]
            if len(ids) > limit:
                raise ValueError(f"prompt {i} has {len(ids)} tokens, more than the context of {limit}: shorten it")
            rows.append(ids)
        return rows

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in every processor of transformers, with pictures in content blocks (`image`, `url`, `path` or `base64`).

        The default template writes `<image>Question: ... Answer:`. With `generation_mode="image"` (a keyword, or an
        entry of `processor_kwargs`) the prompt is the messages' own text and pictures, and ends with `[IMG]`.
        """
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        mode = kwargs.pop("generation_mode", processor_kwargs.get("generation_mode", self.generation_mode))
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError("sanitize_control_tokens is not supported; [IMG] and [/IMG] in a text are always refused")
        processor_kwargs["generation_mode"] = mode
        if "generation_mode" in self._resolve_chat_template(chat_template):
            kwargs["generation_mode"] = mode
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

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
        return torch.tensor([i - self.visual_offset for i in ids if i >= self.visual_offset], dtype=torch.long)

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
            input_ids: the prompts, if `generated_outputs` start with them: their text is taken off.
            reference_compat: cut at the first full stop even within "st. james church" or "3.5".
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
            input_ids: the prompts, if `generated_outputs` start with them: their text is taken off.
            reference_compat: cut at the first comma and at every full stop, too.
            lemmatize: lower case, nouns and verbs in their base form, as VQA scores are computed by the reference.

        Raises:
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
        def texts_of(outputs: Any) -> list[str]:
            if isinstance(outputs, str):
                return [outputs]
            if not _are_id_rows(outputs):
                return list(outputs)
            return [self._decode_row(row) for row in _rows(outputs)]

        texts = texts_of(generated_outputs)
        if input_ids is not None:
            prompts = texts_of(input_ids)
            repeats = len(texts) // len(prompts)
            texts = [text.removeprefix(prompts[i // repeats]) for i, text in enumerate(texts)]
        return [text.strip() for text in texts]


def _grouped(images: Any) -> list:
    """A flat list of pictures, or one list for each prompt."""
    if isinstance(images, list | tuple) and len(images) and all(isinstance(group, list | tuple) for group in images):
        return [flatten_images(group) for group in images]
    return flatten_images(images)


def _as_lists(visual_tokens: Any) -> list:
    """A flat list of pictures' codes (tuples of int), or one list of them for each prompt."""
    if hasattr(visual_tokens, "lengths"):  # LavitVisualTokens
        visual_tokens = visual_tokens.split()

    def convert(item: Any) -> Any:
        if isinstance(item, torch.Tensor | np.ndarray):
            item = item.tolist()
        if not isinstance(item, Sequence) or isinstance(item, str):
            shown = f"{type(item).__name__}: {item!r:.80}"
            raise ValueError(f"visual_tokens are sequences of integer codes, got {shown}")
        if all(isinstance(code, int | np.integer) and not isinstance(code, bool) for code in item):
            return tuple(int(code) for code in item)
        return [convert(inner) for inner in item]

    converted = convert(visual_tokens)
    if isinstance(converted, tuple):
        return [converted]
    if any(isinstance(item, list) for item in converted):  # one list for each prompt, some of them empty
        converted = [[] if item == () else item for item in converted]
        if not all(
            isinstance(group, list) and all(isinstance(codes, tuple) for codes in group) for group in converted
        ):
            raise ValueError(
                "visual_tokens are one picture's codes, a list of these, or one list of these for each prompt"
            )
    return converted


def _are_id_rows(outputs: Any) -> bool:
    if isinstance(outputs, torch.Tensor):
        return outputs.ndim <= 2 and not outputs.is_floating_point()
    if isinstance(outputs, np.ndarray):
        return outputs.ndim <= 2 and np.issubdtype(outputs.dtype, np.integer)
    first = outputs[0] if isinstance(outputs, list | tuple) and len(outputs) else None
    return isinstance(first, int) or (first is not None and not isinstance(first, str) and _are_id_rows(first))


def _rows(outputs: Any) -> list[list[int]]:
    rows = outputs.tolist() if isinstance(outputs, torch.Tensor | np.ndarray) else outputs
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
        import spacy
    except ImportError as error:
        raise ImportError(
            "lemmatize=True needs spaCy: pip install spacy, then spacy download en_core_web_sm"
        ) from error
    analyse = spacy.load("en_core_web_sm")
    return [
        " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in analyse(answer.lower()))
        for answer in answers
    ]
