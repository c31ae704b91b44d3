"""generate(): text, images, and both in one stream (arXiv 2309.04669, section 3.2, with its code's defaults)."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateOutput

from .decoding_lavit import Generators, LavitDecodingLoop, LavitDraw
from .drafts_lavit import LavitDraftMixin
from .logits_lavit import LavitGrammarLogitsProcessor, LavitRangeLogitsProcessor, image_state
from .modeling_lavit_visual_tokenizer import LavitVisualTokens
from .slots_lavit import check_slots, fill_slots, find_slots, pad, unpad


GENERATION_MODES = ("text", "image", "interleaved")

# A model overrides or adds entries with `model.generation_config.generation_presets = {"image": {...}, ...}`.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "caption": {"do_sample": False, "num_beams": 2, "min_new_tokens": 8, "max_new_tokens": 36, "length_penalty": 1.0},
    "answer": {
        "do_sample": False,
        "num_beams": 5,
        "min_new_tokens": 2,
        "max_new_tokens": 10,
        "length_penalty": 0.0,
        "early_stopping": True,
    },
    "image": {
        "do_sample": True,
        "num_beams": 1,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "guidance_scale": None,
        "min_image_tokens": 20,
        "max_image_tokens": 200,
        "draft_length": 8,
    },
}
IMAGE_SETTINGS = ("guidance_scale", "min_image_tokens", "max_image_tokens", "draft_length")
# of a preset, for LavitPipeline alone
PIPELINE_SETTINGS = ("multimodal_guidance_scale",)


@dataclass
class LavitPrompt:
    """Prompts as they were given: `input_ids` and `attention_mask` (B, L), `pixel_values` one picture per slot."""

    input_ids: torch.LongTensor | None
    attention_mask: torch.LongTensor | None
    pixel_values: torch.Tensor | None
    selection: dict[str, Any]


class LavitGenerationMixin(LavitDraftMixin, GenerationMixin):
    """Adds the three generation modes to `GenerationMixin`; everything that transformers offers for text stays.

    `uses_plain_steps`: whether a plain Llama is stepped by `llama_step`; False steps through its modules.
    """

    uses_plain_steps = True

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        generation_mode: str = "text",
        generation_preset: str | None = None,
        pixel_values: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        draft_length: int | None = None,
        reference_compat: bool = False,
        selection: str | None = None,
        keep_ratio: float | None = None,
        gumbel_noise: torch.Tensor | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs,
    ) -> torch.LongTensor | GenerateOutput:
        """Writes text, an image's visual tokens, or both.

        Args:
            inputs: (B, L) prompt ids, also accepted as `input_ids`. Padding on any side needs an `attention_mask`.
            generation_mode:
                `"text"`: never writes visual ids; pictures of the prompt are read as continuous features.
                `"image"`: writes one image's codes; an `[IMG]` is appended to prompts that do not end within an image.
                `"interleaved"`: text and whole images, until EOS; `max_new_tokens` defaults to the rest of the
                context. The last two read pictures of the prompt as discrete codes, which is how they were trained.
            generation_preset: named settings, `"caption"` or `"answer"` (or what the model's generation config adds in
                `generation_presets`); `"image"` is the default of the modes that draw. Arguments given here win.
            pixel_values: (pictures, 3, H, W), one for every slot `[IMG][/IMG]` of the prompts.
            guidance_scale: classifier-free guidance inside images, one batched forward for both streams. None takes
                the preset's, which is none unless the model says otherwise; None or 1 is a single stream.
            generator: a `torch.Generator`, or a list of one per returned row, on any device. One generator for several
                rows draws a seed for each. Without it every call differs. The global generators are left untouched.
            min_image_tokens, max_image_tokens: codes of an image, 20 and 200 unless the model has better defaults.
                Both are clamped to the number of patches, more of which no image has, and in image mode to
                `max_new_tokens` less one if that is given.
            draft_length: mode image, of a model that knows pictures (see `set_draft_codes`): how many codes, at most,
                are looked up there and verified by one forward; 0 for none. What is written stays the same, in fewer
                forwards. Only a lone row does so, without beams and with a dynamic cache.
            reference_compat: reproduces the quirks of the reference implementation: ids 0, 1, 2 and `[IMG]` may occur
                in images, pictures of drawing prompts have no `[IMG]` and `[/IMG]` around them and make the limit on
                new tokens the length of the longest prompt, the whole head is computed, rows are drawn jointly, and in
                beam search the unconditional stream is not reordered. For comparisons only.
            selection, keep_ratio, gumbel_noise: which patches of the pictures are kept, see
                `LavitVisualTokenizer.select`.
            streamer: gets the prompt first, then the new ids of every step.
            kwargs: everything else of `GenerationMixin.generate`: sampling settings, `num_return_sequences` (distinct
                draws for each prompt), `cache_implementation="static"`, `return_dict_in_generate`, …

        Returns:
            Mode text and interleaved: (rows, L + new) ids, the prompts as they were given and behind them the new ids.
            Mode image: (rows, new) new ids alone, codes up to and including `[/IMG]`. Finished rows are right-padded
            with the pad id. Rows are prompts times `num_return_sequences`.

        Raises:
            ValueError: unknown mode or preset; numbers of slots and pictures that differ; a prompt that leaves no room
                in the context; limits that contradict each other; a wrong number of generators; settings of another
                mode.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {generation_mode!r}")
        drawing = generation_mode != "text"
        given = (guidance_scale, min_image_tokens, max_image_tokens, draft_length)
        if not drawing and any(value is not None for value in given):
            raise ValueError(f"{', '.join(IMAGE_SETTINGS)} apply to images, but generation_mode is 'text'")
        if generation_mode == "interleaved" and reference_compat:
            raise ValueError("the reference has no interleaved mode to be compatible with")
        if generation_mode == "image" and "max_length" in kwargs:
            raise ValueError("in image mode max_image_tokens limits the length, not max_length")
        preset = self._preset(generation_preset or ("image" if drawing else None))
        defaults = {name: preset.pop(name, None) for name in IMAGE_SETTINGS + PIPELINE_SETTINGS}
        config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
        scales = (guidance_scale, config.guidance_scale, defaults["guidance_scale"], 1.0)
        guidance_scale = next(scale for scale in scales if scale is not None)
        unset = {name: value for name, value in preset.items() if getattr(config, name) is None}
        call = config.update(**(unset | kwargs))
        config.guidance_scale = 1.0
        config.pad_token_id = self._pad_token_id(config)
        call["logits_processor"] = LogitsProcessorList(logits_processor or [])
        call["stopping_criteria"] = stopping_criteria
        # which ids are pictures follows from the ids
        call.pop("mm_token_type_ids", None)
        prompt = LavitPrompt(
            input_ids=self._on_device(call.pop("input_ids", inputs)),
            attention_mask=self._on_device(call.pop("attention_mask", None)),
            pixel_values=self._on_device(pixel_values),
            selection={"selection": selection, "keep_ratio": keep_ratio, "gumbel_noise": gumbel_noise},
        )
        drawn = LavitDraw(generator, streamer, reference_compat)
        if not drawing:
            return self._generate_text(prompt, config, drawn, call)
        if prompt.input_ids is None or "inputs_embeds" in call or "past_key_values" in call:
            raise ValueError(f"generation_mode {generation_mode!r} needs input_ids, without inputs_embeds or a cache")
        limits = self._image_limits(min_image_tokens, max_image_tokens, defaults, reference_compat)
        if generation_mode == "image" and config.max_new_tokens is not None:
            # pipelines set this general limit; [/IMG] counts in it
            limits = tuple(min(limit, config.max_new_tokens - 1) for limit in limits)
        draft_length = self._draft_length(
            draft_length, defaults["draft_length"], generation_mode, config, reference_compat
        )
        return self._generate_images(
            prompt, generation_mode, config, guidance_scale, limits, drawn, call, draft_length
        )

    def _preset(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return {}
        of_model = getattr(self.generation_config, "generation_presets", None) or {}
        if name not in GENERATION_PRESETS and name not in of_model:
            names = sorted(GENERATION_PRESETS.keys() | of_model.keys())
            raise ValueError(f"generation_preset must be one of {names}, got {name!r}")
        return GENERATION_PRESETS.get(name, {}) | of_model.get(name, {})

    def _image_limits(
        self, least: int | None, most: int | None, defaults: dict[str, Any], reference_compat: bool = False
    ) -> tuple[int, int]:
        if reference_compat:
            limits = ((least, "min_image_tokens"), (most, "max_image_tokens"))
            return tuple(defaults[name] if given is None else given for given, name in limits)
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_image_tokens {least} is above max_image_tokens {most}")
        if (least is not None and least < 0) or (most is not None and most < 1):
            raise ValueError(f"image token limits must be positive, got min {least} and max {most}")
        # a default gives way to the limit that was asked for
        most_wanted = most if most is not None else max(defaults["max_image_tokens"], least or 0)
        least_wanted = least if least is not None else min(defaults["min_image_tokens"], most_wanted)
        num_patches = self.config.visual_config.num_patches
        return min(least_wanted, num_patches), min(most_wanted, num_patches)

    def _check_context(self, prompt_length: int, new_tokens: int) -> None:
        context = self.config.text_config.max_position_embeddings
        if prompt_length + new_tokens > context:
            raise ValueError(
                f"the longest prompt has {prompt_length} ids, pictures included, and {new_tokens} more are to be "
                f"written, but the context of the language model is {context}: shorten the prompt or write fewer"
            )

    def _pad_token_id(self, config: GenerationConfig) -> int:
        eos = self._chosen(config, "eos_token_id")
        candidates = (self._chosen(config, "pad_token_id"), eos[0] if isinstance(eos, list) else eos, 0)
        return next(candidate for candidate in candidates if candidate is not None)

    def _chosen(self, config: GenerationConfig, name: str) -> Any:
        """A setting as `GenerationMixin.generate` will see it: the call's, or else the model's."""
        own = getattr(config, name)
        return own if own is not None else getattr(self.generation_config, name)

    def _on_device(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        # an offloaded model is on meta: its hooks move the inputs
        return tensor if tensor is None or self.device.type == "meta" else tensor.to(self.device)

    def _generate_text(
        self, prompt: LavitPrompt, config: GenerationConfig, drawn: LavitDraw, call: dict[str, Any]
    ) -> torch.LongTensor | GenerateOutput:
        vocabulary = self.config.vocabulary
        if drawn.reference_compat or "assistant_model" in call:
            # an assistant's own forward knows no logit_range
            call["logits_processor"].append(LavitRangeLogitsProcessor((0, vocabulary.boi_token_id)))
        else:
            call["logit_range"] = (0, vocabulary.boi_token_id)

        ready = "inputs_embeds" in call or "past_key_values" in call
        input_ids, mask, prompt_length = prompt.input_ids, prompt.attention_mask, None
        if ready and prompt.pixel_values is not None:
            raise ValueError("pixel_values need input_ids with slots, without inputs_embeds or a cache")
        if input_ids is None and "inputs_embeds" not in call:
            raise ValueError("generate needs input_ids")
        speculative = "assistant_model" in call or self._chosen(config, "prompt_lookup_num_tokens") is not None
        if speculative and prompt.pixel_values is not None:
            # transformers' assisted decoding leaves its first candidates out where a prompt is given as embeddings
            raise ValueError("assistant_model and prompt_lookup_num_tokens do not go with pixel_values")
        if not ready:
            if prompt.pixel_values is not None:
                expanded = self.model.expand_inputs(
                    input_ids, prompt.pixel_values, mask, padding_side="left", **prompt.selection
                )
                input_ids, mask = expanded.input_ids, expanded.attention_mask
                call["inputs_embeds"] = expanded.inputs_embeds
            else:
                rows = _unpad_prompts(input_ids, mask)
                check_slots(find_slots(rows, vocabulary), 0)
                input_ids, mask = pad(rows, config.pad_token_id, "left")
            prompt_length = input_ids.shape[1]
            self._check_context(prompt_length, 1)
            if drawn.reference_compat and prompt.pixel_values is not None:
                # the reference gives embeddings alone: penalties on repetition do not see the prompt
                input_ids, prompt_length = None, 0

        if input_ids is not None:
            call["input_ids"] = input_ids
        if mask is not None:
            call["attention_mask"] = mask
        rows = (input_ids if input_ids is not None else call["inputs_embeds"]).shape[0]
        rows *= self._chosen(config, "num_return_sequences") or 1
        stock = speculative or "custom_generate" in call or not self._chosen(config, "do_sample")
        stock = stock or (self._chosen(config, "num_beams") or 1) > 1
        output = self._run(config, call, drawn, None if stock else drawn.loop(vocabulary, config.pad_token_id, rows))
        if prompt_length is None:
            return output
        return _with_sequences(output, lambda ids: _behind(prompt.input_ids, ids[:, prompt_length:]))

    def _run(
        self, config: GenerationConfig, call: dict[str, Any], drawn: LavitDraw, loop: LavitDecodingLoop | None
    ) -> torch.LongTensor | GenerateOutput:
        """Has transformers prepare inputs, cache and processors, and decode too unless a `loop` is given."""
        if loop is not None:
            return super().generate(generation_config=config, custom_generate=loop, **call)
        sampling = self._chosen(config, "do_sample")
        seeded = drawn.global_generators(self.device) if sampling else nullcontext()
        with seeded:
            return super().generate(generation_config=config, streamer=drawn.streamer, **call)

    def _generate_images(
        self,
        prompt: LavitPrompt,
        generation_mode: str,
        config: GenerationConfig,
        guidance_scale: float,
        limits: tuple[int, int],
        drawn: LavitDraw,
        call: dict[str, Any],
        draft_length: int,
    ) -> torch.LongTensor | GenerateOutput:
        vocabulary = self.config.vocabulary
        image_mode, guided = generation_mode == "image", guidance_scale != 1
        rows = self._discrete_rows(prompt, keep_brackets=not drawn.reference_compat)
        if image_mode:
            rows = [self._begin_image(row) for row in rows]
        num_prompts, num_ids = len(rows), max(len(row) for row in rows)
        beams = self._chosen(config, "num_beams") or 1
        negative_ids = call.pop("negative_prompt_ids", None)
        negative_mask = call.pop("negative_prompt_attention_mask", None)
        if negative_ids is not None and not (guided and image_mode and beams == 1):
            raise ValueError("negative_prompt_ids need generation_mode 'image', a guidance_scale and no beams")
        if guided and beams == 1:
            rows = rows + self._unconditional_rows(rows, negative_ids, negative_mask)
        call["input_ids"], call["attention_mask"] = pad(rows, config.pad_token_id, "left")
        longest = call["input_ids"].shape[1]

        if drawn.reference_compat:
            # quirk 4: with visual ids in the prompts their length is the limit
            with_pictures = any((row >= vocabulary.visual_offset).any() for row in rows[:num_prompts])
            config.min_new_tokens, config.max_new_tokens = limits[0], num_ids - 1 if with_pictures else limits[1]
            allowed = LavitRangeLogitsProcessor((0, 3), (vocabulary.boi_token_id, vocabulary.size))
            call["logits_processor"].append(allowed)
            self._check_context(longest, 1)
        else:
            if image_mode:
                config.min_new_tokens, config.max_new_tokens = 0, limits[1] + 1
            else:
                config.max_new_tokens = self._interleaved_length(config, longest)
            self._check_context(longest, config.max_new_tokens)
            call["logit_range"] = (vocabulary.eoi_token_id if image_mode else 0, vocabulary.size)
            call["logits_processor"].append(
                LavitGrammarLogitsProcessor(vocabulary, *limits, longest + config.max_new_tokens)
            )
        config.max_length = None
        if image_mode:
            config.eos_token_id = vocabulary.eoi_token_id

        loop = None
        if beams == 1:
            loop = drawn.loop(
                vocabulary,
                config.pad_token_id,
                num_prompts * (self._chosen(config, "num_return_sequences") or 1),
                guidance_scale=guidance_scale if guided else None,
                restart_unconditional=not image_mode,
                known_pictures=self._known_pictures() if draft_length else None,
                draft_length=draft_length,
            )
        elif guided and not drawn.reference_compat:
            raise ValueError("guidance_scale and num_beams: the unconditional stream cannot follow beams, choose one")
        elif guided:
            # quirk 9: in transformers' own guidance the unconditional cache stays as it is when beams are reordered
            config.guidance_scale = guidance_scale
            call["negative_prompt_ids"] = rows[0].new_full((num_prompts * beams, 1), vocabulary.boi_token_id)
        output = self._run(config, call, drawn, loop)
        if image_mode:
            return _with_sequences(output, lambda ids: ids[:, longest:])
        return _with_sequences(output, lambda ids: _behind(prompt.input_ids, ids[:, longest:]))

    def _begin_image(self, row: torch.LongTensor) -> torch.LongTensor:
        inside, _ = image_state(row.unsqueeze(0), self.config.vocabulary)
        return row if inside else torch.cat([row, row.new_tensor([self.config.vocabulary.boi_token_id])])

    def _interleaved_length(self, config: GenerationConfig, prompt_length: int) -> int:
        if config.max_new_tokens is not None:
            return config.max_new_tokens
        self._check_context(prompt_length, 1)
        if config.max_length is not None:
            return config.max_length - prompt_length
        context = self.config.text_config.max_position_embeddings
        return self.generation_config.max_new_tokens or context - prompt_length

    def _discrete_rows(self, prompt: LavitPrompt, keep_brackets: bool = True) -> list[torch.LongTensor]:
        """The prompts without padding, their slots filled with the pictures' code ids."""
        rows = _unpad_prompts(prompt.input_ids, prompt.attention_mask)
        slots = find_slots(rows, self.config.vocabulary)
        check_slots(slots, 0 if prompt.pixel_values is None else prompt.pixel_values.shape[0])
        if prompt.pixel_values is None:
            return rows
        tokens = self.get_image_tokens(prompt.pixel_values, **prompt.selection)
        fills = [codes.to(rows[0].device) + self.config.vocabulary.visual_offset for codes in tokens.split()]
        return fill_slots(rows, slots, fills, keep_brackets=keep_brackets)

    def _unconditional_rows(
        self,
        rows: list[torch.LongTensor],
        negative_ids: torch.LongTensor | None,
        negative_mask: torch.LongTensor | None,
    ) -> list[torch.LongTensor]:
        """What the unconditional streams begin with: the image under way from its `[IMG]` on, or a negative prompt.

        Outside an image they are not looked at.
        """
        if negative_ids is not None:
            if len(negative_ids) != len(rows):
                raise ValueError(f"{len(negative_ids)} negative prompts were given for {len(rows)} prompts")
            return unpad(self._on_device(negative_ids), self._on_device(negative_mask))
        starts = []
        for row in rows:
            inside, opened = image_state(row.unsqueeze(0), self.config.vocabulary)
            starts.append(row[int(opened) :] if bool(inside) else row[-1:])
        return starts

    def tokenize_prompt(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **selection,
    ) -> list[list[int]]:
        """Prompts as plain lists of ids, pictures as code ids: what `generate_batch` and other servers take.

        Args:
            input_ids, attention_mask: (B, L), padded or not.
            pixel_values: (pictures, 3, H, W), one per slot.
            selection: see `LavitVisualTokenizer.select`.
        """
        tensors = (self._on_device(tensor) for tensor in (input_ids, attention_mask, pixel_values))
        return [row.tolist() for row in self._discrete_rows(LavitPrompt(*tensors, selection))]

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: str = "text",
        max_image_tokens: int | None = None,
        **kwargs,
    ):
        """Continuous batching on tokenised prompts, see `GenerationMixin.generate_batch` and [`tokenize_prompt`].

        `generation_mode` is `"text"` or `"image"`. In image mode the prompts end with `[IMG]` and codes follow, up to
        `[/IMG]` or `max_image_tokens` ids. Neither guidance nor a least number of codes is available here.
        """
        if generation_mode not in ("text", "image"):
            raise ValueError(f"generation_mode of generate_batch must be 'text' or 'image', got {generation_mode!r}")
        vocabulary = self.config.vocabulary
        config = copy.deepcopy(generation_config if generation_config is not None else self.generation_config)
        config.allowed_ids = (0, vocabulary.boi_token_id)
        if generation_mode == "image":
            config.allowed_ids = (vocabulary.eoi_token_id, vocabulary.size)
            config.eos_token_id = vocabulary.eoi_token_id
            config.max_new_tokens = self._image_limits(None, max_image_tokens, self._preset("image"))[1]
        return super().generate_batch(inputs, generation_config=config, **kwargs)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # continuous batching takes no processors but those of its config
        if hasattr(generation_config, "allowed_ids"):
            processors.insert(0, LavitRangeLogitsProcessor(generation_config.allowed_ids))
        return processors

    def split_segments(self, ids: torch.LongTensor | list[int]) -> list[tuple[str, torch.LongTensor]]:
        """One row of ids to its parts in order: `("text", ids)` and `("image", codes)`, codes from 0 on.

        `[IMG]` and `[/IMG]` are left out, an image without codes (a slot) too. Code ids belong to an image also where
        no `[IMG]` stands before them, as in what `generate(generation_mode="image")` returns.
        """
        vocabulary = self.config.vocabulary
        segments: list[tuple[str, list[int]]] = []
        boundary = True
        for token in torch.as_tensor(ids).tolist():
            if token in (vocabulary.boi_token_id, vocabulary.eoi_token_id):
                boundary = True
                continue
            is_code = vocabulary.visual_offset <= token < vocabulary.size
            kind, value = ("image", token - vocabulary.visual_offset) if is_code else ("text", token)
            if boundary or segments[-1][0] != kind:
                segments.append((kind, []))
            segments[-1][1].append(value)
            boundary = False
        return [(kind, torch.tensor(values, dtype=torch.long)) for kind, values in segments]

    def set_pixel_decoder(self, pixel_decoder: Callable | None) -> None:
        """Attaches what turns codes into pictures for [`decode_image_tokens`]; nothing is loaded, None detaches.

        Args:
            pixel_decoder: a `LavitPipeline`, or a callable that takes `visual_tokens=LavitVisualTokens` and returns
                the pictures, or an object with them in `.images`. It is no part of the model: not saved, not moved.
        """
        self.__dict__["_pixel_decoder"] = pixel_decoder

    @torch.no_grad()
    def decode_image_tokens(self, ids: torch.LongTensor) -> list:
        """What `generate(generation_mode="image")` returned, (rows, L) ids, as a picture for every row.

        Everything that is no code is dropped, and so are padding and what follows `[/IMG]`. Without a pixel decoder
        ([`set_pixel_decoder`]) the codes are returned: a list of 1-D tensors.
        """
        vocabulary = self.config.vocabulary
        is_end = ids == vocabulary.eoi_token_id
        is_code = (ids >= vocabulary.visual_offset) & (ids < vocabulary.size) & (is_end.cumsum(1) == 0)
        codes = [row[kept] - vocabulary.visual_offset for row, kept in zip(ids, is_code, strict=True)]
        pixel_decoder = self.__dict__.get("_pixel_decoder")
        if pixel_decoder is None:
            return codes
        tokens = LavitVisualTokens(codes=torch.cat(codes), lengths=is_code.sum(1))
        pictures = pixel_decoder(visual_tokens=tokens)
        return list(getattr(pictures, "images", pictures))


def _unpad_prompts(input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None) -> list[torch.LongTensor]:
    rows = unpad(input_ids, attention_mask)
    empty = [index for index, row in enumerate(rows) if not len(row)]
    if empty:
        raise ValueError(f"prompts {empty} are empty: a prompt needs at least one id")
    return rows


def _behind(prompt: torch.LongTensor, new_ids: torch.LongTensor) -> torch.LongTensor:
    """Puts new ids behind the prompts that they answer; several rows of new ids may belong to one prompt."""
    repeats = new_ids.shape[0] // prompt.shape[0]
    return torch.cat([prompt.to(new_ids.device).repeat_interleave(repeats, dim=0), new_ids], dim=1)


def _with_sequences(output, change: Callable[[torch.LongTensor], torch.LongTensor]):
    if isinstance(output, torch.Tensor):
        return change(output)
    output.sequences = change(output.sequences)
    return output
