"""Prompts of text and images to ids, and generated ids back to text and codes (LaVIT, arXiv 2309.04669)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from modeling_lavit.saving_lavit import SavedWithCodeMixin
from modeling_lavit.vocabulary_lavit import LavitVocabulary

from .chat_template_lavit import DEFAULT_CHAT_TEMPLATE, TYPED, LavitChatMixin
from .image_processing_lavit import LavitImageProcessorKwargs, flatten_images, is_several
from .post_processing_lavit import GENERATION_MODES, LavitPostProcessingMixin


PADDING_KWARGS = ("max_length", "pad_to_multiple_of", "padding", "padding_side", "return_attention_mask")
SUPPORTED_TEXT_KWARGS = {
    *PADDING_KWARGS,
    "add_special_tokens",
    "return_mm_token_type_ids",
    "return_offsets_mapping",
    "return_tensors",
    "return_text_replacement_offsets",
    "split_special_tokens",
    "truncation",
    "verbose",
}


class LavitProcessorKwargs(ProcessingKwargs, total=False):
    # versions of transformers below 5.21.1 read it
    _defaults = {}  # noqa: RUF012  # pyright: ignore[reportGeneralTypeIssues]

    images_kwargs: LavitImageProcessorKwargs


class LavitProcessor(LavitChatMixin, LavitPostProcessingMixin, SavedWithCodeMixin, ProcessorMixin):
    """One processor for reading and drawing.

    ```python
    processor(images=image)                                                     # captioning
    processor(images=image, text="<image>Question: what is it? Answer:")        # answering
    processor(text="a red apple", generation_mode="image")                      # drawing: the prompt ends with [IMG]
    processor(images=image, text="<image> in watercolour", generation_mode="image")
    processor(text="<image> in watercolour", visual_tokens=[codes], generation_mode="image")
    ```

    `<image>` marks where an image goes. It is no token: an image given as pixels becomes the empty slot `[IMG][/IMG]`,
    which the model fills; one given as codes becomes `[IMG] ids [/IMG]`. Spaces next to a mark are dropped, and each
    piece of text between marks is tokenized by itself, without BOS. All other text is text: `</s>` typed in it is four
    characters (unless `split_special_tokens=False` asks for the tokenizer's control tokens). `[IMG]` and `[/IMG]` in
    a text are refused.

    `image_token_id` is the id of `[IMG]`: each image of a prompt, filled or not, begins with one.

    Args:
        image_processor: a [`LavitImageProcessor`].
        tokenizer: has `[IMG]` as `boi_token` and `[/IMG]` as `eoi_token`, right above its text ids
            (`extra_special_tokens={"boi_token": "[IMG]", "eoi_token": "[/IMG]"}`). The id of code `k` is
            `eoi_token_id + 1 + k`.
        chat_template: Jinja; by default a question-and-answer prompt.
        codebook_size: number of codes; where it is known, codes outside it are refused.

    Raises:
        ValueError: the tokenizer has no `[IMG]` and `[/IMG]` with adjacent ids.
    """

    valid_processor_kwargs = LavitProcessorKwargs
    text_kwargs: ClassVar[dict[str, Any]] = {
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
        "split_special_tokens": True,
    }
    images_kwargs: ClassVar[dict[str, Any]] = {"return_tensors": "pt"}
    generation_mode = "text"
    reference_compat = False
    image_token = "<image>"

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None, codebook_size: int | None = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        self.codebook_size = codebook_size
        boi_token_id, eoi_token_id = (getattr(tokenizer, name, None) for name in ("boi_token_id", "eoi_token_id"))
        if boi_token_id is None or eoi_token_id is None or eoi_token_id != boi_token_id + 1:
            raise ValueError(
                "the tokenizer needs [IMG] and [/IMG] with adjacent ids above its text: load it with "
                'extra_special_tokens={"boi_token": "[IMG]", "eoi_token": "[/IMG]"} '
                f"(boi_token_id is {boi_token_id}, eoi_token_id is {eoi_token_id})"
            )
        self.boi_token_id, self.eoi_token_id = boi_token_id, eoi_token_id
        self.visual_offset = self.vocabulary.visual_offset
        self.image_token_id = self.boi_token_id
        self.image_token_ids: list[int] = [self.boi_token_id, self.eoi_token_id]

    @property
    def vocabulary(self) -> LavitVocabulary:
        return LavitVocabulary(self.boi_token_id, self.codebook_size)

    @property
    def model_input_names(self) -> list[str]:
        """`input_ids` first: what `Trainer` measures with `group_by_length`."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        visual_tokens: Any = None,
        **kwargs: Unpack[LavitProcessorKwargs],
    ) -> BatchFeature:
        """Builds the inputs of `forward` and `generate`.

        Args:
            images: images as [`LavitImageProcessor`] takes them: one, a flat list (handed to the marks in order,
                over the whole batch) or one list for each prompt (`None` where it has none). Without text every image
                (every inner list) is a prompt.
            text: prompts with one `<image>` for each image: a string, or several in a list, tuple, array, column or
                iterator.
            visual_tokens: codes, counted from 0, in place of pixels: a 1-D integer sequence, tensor or array for one
                image, a flat list of them, one list for each prompt, or `LavitVisualTokens`. In a text without
                any mark they go in front, each once.
            generation_mode: `"text"` (the default), `"interleaved"`, or `"image"`, which ends every prompt with
                `[IMG]`.
            reference_compat: what the reference does: images lose their alpha instead of being put on white, and
                codes in an image prompt stand without `[IMG]` and `[/IMG]`.
            kwargs: `padding`, `padding_side` (left), `max_length`, `truncation` (of text, never of an image),
                `pad_to_multiple_of`, `return_tensors` ("pt"), `add_special_tokens` (BOS), `split_special_tokens`,
                `return_mm_token_type_ids`, `return_offsets_mapping` of the text; all of the image processor's.

        Returns:
            `input_ids` and `attention_mask` (batch, length); `pixel_values` (images of the batch in order, 3,
            height, width) if `images` are given; `offset_mapping` (batch, length, 2), characters of the prompt as
            given, and `mm_token_type_ids` (batch, length), 1 for ids of images, on request.

        Raises:
            ValueError: marks and images do not match, a prompt is empty or longer than the context, codes are out of
                range, an image cannot be read, the mode is unknown, or an argument is not supported.
        """
        given: dict[str, Any] = {**kwargs}
        mode = given.pop("generation_mode", None) or self.generation_mode
        reference_compat = given.pop("reference_compat", None) or self.reference_compat
        if any(given.pop(name, None) is not None for name in ("videos", "audio")):
            raise ValueError("LavitProcessor takes text and images, neither videos nor audio")
        split_special_tokens = given.pop("split_special_tokens", self.text_kwargs["split_special_tokens"])
        # it wants the class
        merged = self._merge_kwargs(self.valid_processor_kwargs, **given)  # pyright: ignore[reportArgumentType]
        # again the class's own: versions of transformers below 5.21.1 do not read them
        text_kwargs = {**self.text_kwargs, **merged["text_kwargs"], "split_special_tokens": split_special_tokens}
        images_kwargs = {**self.images_kwargs, **merged["images_kwargs"]}
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            text_kwargs[name] = given.get(name) or text_kwargs.get(name)
        _check_call(images, text, visual_tokens, mode, text_kwargs)
        text = None if text is None else _as_prompts(text)

        pixel_values = {}
        if visual_tokens is not None:
            prompts, groups = self._match(_as_lists(visual_tokens), text, marks_optional=True)
            groups = [[self._code_ids(codes, i) for codes in group] for i, group in enumerate(groups)]
            if not (reference_compat and mode == "image"):
                groups = [[[self.boi_token_id, *ids, self.eoi_token_id] for ids in group] for group in groups]
        elif images is not None:
            images = _grouped(images)
            if not flatten_images(images):
                raise ValueError("images is empty: leave it out where a call has no images")
            prompts, groups = self._match(images, text, marks_optional=False)
            if reference_compat:
                images_kwargs["reference_compat"] = True
            pixel_values = self.image_processor([image for group in groups for image in group], **images_kwargs)
            groups = [[self.image_token_ids] * len(group) for group in groups]
        else:
            prompts, groups = self._match([[] for _ in text or ()], text, marks_optional=False)

        encoded = [
            self._encode(prompt, group, i, mode, text_kwargs)
            for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]
        return BatchFeature(
            {**self._padded(encoded, prompts, text_kwargs), **pixel_values}, tensor_type=text_kwargs["return_tensors"]
        )

    def to_dict(self) -> dict[str, Any]:
        """What is saved; where its code lies (`auto_map`) is written by whoever saves it."""
        return {name: value for name, value in super().to_dict().items() if name != "auto_map"}

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """For engines that plan their prompts: each image is a slot of two ids, and one entry of `pixel_values`."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(num_image_tokens=[2] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    def _match(self, images: list, prompts: list[str] | None, marks_optional: bool) -> tuple[list[str], list[list]]:
        """Pairs images (a flat list, or one list for each prompt) with the prompts' marks.

        Returns:
            The prompts, with a mark for every image, and one list of images for each prompt.
        """
        nested = len(images) > 0 and all(isinstance(group, list) for group in images)
        if prompts is None:
            groups = images if nested else [[image] for image in images]
            return [self.image_token * len(group) for group in groups], groups

        prompts = list(prompts)
        marks = [prompt.count(self.image_token) for prompt in prompts]
        if nested:
            if len(images) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but images for {len(images)}")
            groups = images
        elif marks_optional and not any(marks) and len(prompts) > 1:
            if len(images) != len(prompts):
                raise ValueError(
                    f"{len(prompts)} prompts without {self.image_token} and {len(images)} images: "
                    "give one list of images for each prompt"
                )
            groups = [[image] for image in images]
        elif not any(marks) or len(prompts) == 1:
            groups = [images] + [[] for _ in prompts[1:]]
        else:
            starts = np.cumsum([0, *marks])
            groups = [images[start : start + count] for start, count in zip(starts, marks, strict=False)]
            groups[-1] = groups[-1] + images[starts[-1] :]
        for i, group in enumerate(groups):
            if marks_optional and marks[i] == 0:
                prompts[i] = self.image_token * len(group) + prompts[i]
            elif marks[i] != len(group):
                raise ValueError(
                    f"prompt {i} has {marks[i]} {self.image_token} mark(s), but gets {len(group)} image(s): "
                    "every mark takes one image, in order"
                )
        return prompts, groups

    def _code_ids(self, codes: list[int], prompt: int) -> list[int]:
        highest = self.codebook_size - 1 if self.codebook_size else None
        if not codes:
            raise ValueError(f"visual_tokens of prompt {prompt}: an image has no codes")
        if min(codes) < 0 or (highest is not None and max(codes) > highest):
            raise ValueError(
                f"visual_tokens of prompt {prompt} go from {min(codes)} to {max(codes)}; they are codes, "
                f"counted from 0{'' if highest is None else f' to {highest}'}, not ids of the language model"
            )
        return [self.vocabulary.ids_of(code) for code in codes]

    def _encode(
        self, prompt: str, images: list[list[int]], number: int, mode: str, text_kwargs: dict
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a prompt, not padded, and where in it each of them begins and ends (where that is asked for).

        Args:
            images: the ids that take the place of each mark.
            number: of the prompt, for messages.
        """
        self._check_prompt(prompt, number)
        mark = re.compile(rf" *{re.escape(self.image_token)} *")
        pieces = [piece.replace(TYPED, "") for piece in mark.split(prompt)]
        with_offsets = bool(text_kwargs.get("return_offsets_mapping"))
        tokenized = self.tokenizer(
            pieces,
            add_special_tokens=False,
            split_special_tokens=text_kwargs["split_special_tokens"],
            return_offsets_mapping=with_offsets,
            verbose=False,
        )
        ids, spans, start = [], [], 0
        found = [*mark.finditer(prompt), None]
        for i, (match, piece_ids) in enumerate(zip(found, tokenized["input_ids"], strict=True)):
            ids += piece_ids
            if with_offsets:
                end = match.start() if match else len(prompt)
                places = [k for k in range(start, end) if prompt[k] != TYPED] + [end]
                spans += [(places[first], places[last]) for first, last in tokenized["offset_mapping"][i]]
            if match:
                ids += images[i]
                start = match.end()
                spans += [match.span()] + [(start, start)] * (len(images[i]) - 1)
        if max(map(max, filter(None, tokenized["input_ids"])), default=0) >= self.boi_token_id:
            raise ValueError(
                f"the text of prompt {number} holds a token that was added to the tokenizer, whose ids (from "
                f"{self.boi_token_id} on) mean images: add no tokens"
            )
        prefix = [self.tokenizer.bos_token_id] if text_kwargs.get("add_special_tokens") else []
        suffix = [self.boi_token_id] if mode == "image" else []
        first, last = self._kept(ids, len(prefix) + len(suffix), number, text_kwargs)
        spans = [(0, 0)] * len(prefix) + spans[first:last] + [(len(prompt), len(prompt))] * len(suffix)
        return prefix + ids[first:last] + suffix, spans

    def _check_prompt(self, prompt: str, number: int) -> None:
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: it needs text or an image")
        for token in (self.tokenizer.boi_token, self.tokenizer.eoi_token):
            if token in prompt:
                raise ValueError(f"the text of prompt {number} holds {token}: mark images by {self.image_token}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt {number} is no valid text: it has half of a surrogate pair at character {error.start}"
            ) from error

    def _kept(self, ids: list[int], others: int, number: int, text_kwargs: dict) -> tuple[int, int]:
        """Where the ids that stay begin and end: all, or by truncation what fits beside `others` (a number)."""
        limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        length, excess = len(ids) + others, len(ids) + others - limit
        if excess <= 0:
            return 0, len(ids)
        if text_kwargs.get("truncation") in (None, False, "do_not_truncate"):
            raise ValueError(f"prompt {number} has {length} tokens, more than the context of {limit}: shorten it")
        first, last = (excess, len(ids)) if self.tokenizer.truncation_side == "left" else (0, len(ids) - excess)
        if first >= last or any(i >= self.boi_token_id for i in ids[:first] + ids[last:]):
            raise ValueError(
                f"prompt {number} has {length} tokens: truncation to {limit} would cut its images, which cannot be "
                "cut, or leave nothing of it"
            )
        return first, last

    def _padded(self, encoded: list[tuple[list[int], list]], prompts: list[str], text_kwargs: dict) -> dict[str, list]:
        """`input_ids`, `attention_mask` and what else is asked for, padded."""
        padded = self.tokenizer.pad(
            {"input_ids": [ids for ids, _ in encoded]},
            verbose=False,
            **{name: text_kwargs[name] for name in PADDING_KWARGS if name in text_kwargs},
        )
        if text_kwargs.get("return_offsets_mapping"):
            padded["offset_mapping"] = []
            for (ids, spans), row, prompt in zip(encoded, padded["input_ids"], prompts, strict=True):
                missing, end = len(row) - len(ids), len(prompt)
                on_the_left = text_kwargs["padding_side"] == "left"
                spans = [(0, 0)] * missing + spans if on_the_left else spans + [(end, end)] * missing
                padded["offset_mapping"].append(spans)
        if text_kwargs.get("return_mm_token_type_ids"):
            padded["mm_token_type_ids"] = [[int(i >= self.boi_token_id) for i in row] for row in padded["input_ids"]]
        return padded


def _check_call(images, text, visual_tokens, mode: str, text_kwargs: dict) -> None:
    if mode not in GENERATION_MODES:
        raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {mode!r}")
    if images is None and text is None and visual_tokens is None:
        raise ValueError("nothing to process: give text, images or visual_tokens")
    if images is not None and visual_tokens is not None:
        raise ValueError("give either images or visual_tokens: one call cannot mix pixels and codes")
    unsupported = {name for name, value in text_kwargs.items() if value} - SUPPORTED_TEXT_KWARGS
    if text_kwargs.get("return_text_replacement_offsets") and not text_kwargs.get("return_offsets_mapping"):
        # offsets are those of the prompt as given; beside them nothing has to be known about replacements
        unsupported.add("return_text_replacement_offsets")
    if unsupported:
        raise ValueError(f"LavitProcessor does not support {sorted(unsupported)}")


def _as_prompts(text: Any) -> list[str]:
    prompts = [text] if isinstance(text, str) else text
    prompts = list(prompts) if hasattr(prompts, "__iter__") and not isinstance(prompts, bytes | Mapping) else [text]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}: {text!r:.80}")
    if not prompts:
        raise ValueError("text is an empty list")
    return prompts


def _grouped(images: Any) -> list:
    """A flat list of images, or one list for each prompt, empty where it has none or `None`."""
    groups = list(images) if is_several(images) else [images]
    if any(is_several(group) for group in groups) and all(group is None or is_several(group) for group in groups):
        return [[] if group is None else flatten_images(group) for group in groups]
    return flatten_images(groups)


def _as_lists(visual_tokens: Any) -> list:
    """A flat list of images' codes (tuples of int), or one list of them for each prompt."""
    if hasattr(visual_tokens, "lengths"):  # LavitVisualTokens
        visual_tokens = visual_tokens.split()

    def convert(item: Any) -> Any:
        if hasattr(item, "tolist"):
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
                "visual_tokens are one image's codes, a list of these, or one list of these for each prompt"
            )
    return converted
