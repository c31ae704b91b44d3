"""generate(): text, images, and both in one stream (arXiv 2309.04669, section 3.2, with its code's defaults)."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateOutput

from .compat_lavit import CACHE_NAME, pop_cache
from .decoding_lavit import Generators, LavitDraw
from .filling_lavit import LavitPrompt, fill_prompt
from .generation_settings_lavit import IMAGE_SETTINGS, PIPELINE_SETTINGS
from .image_generation_lavit import LavitImageGenerationMixin
from .logits_lavit import LavitRangeLogitsProcessor
from .outputs_lavit import LavitTokenOutputMixin
from .slots_lavit import pad, unpad


class LavitGenerationMixin(LavitImageGenerationMixin, LavitTokenOutputMixin):
    """Adds the three generation modes to `GenerationMixin`; everything that transformers offers for text stays."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        generation_mode: str = "text",
        generation_preset: str | None = None,
        pixel_values: torch.Tensor | None = None,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
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
    ) -> torch.Tensor | GenerateOutput:
        """Writes text, an image's visual tokens, or both.

        Args:
            inputs: (B, L) prompt ids, also accepted as `input_ids`. Padding on any side needs an `attention_mask`.
            generation_mode:
                `"text"`: never writes visual ids; images of the prompt are read as continuous features.
                `"image"`: writes one image's codes; an `[IMG]` is appended to prompts that do not end within an image.
                `"interleaved"`: text and whole images, until EOS; `max_new_tokens` defaults to the rest of the
                context. The last two read images of the prompt as discrete codes, which is how they were trained.
            generation_preset: named settings, `"caption"` or `"answer"` (or what the model's generation config adds in
                `generation_presets`); `"image"` is the default of the modes that draw. Arguments given here win.
            pixel_values: (images, 3, H, W), one for every slot `[IMG][/IMG]` of the prompts.
            guidance_scale: classifier-free guidance inside images, one batched forward for both streams; one for all
                rows or one for each prompt or row. None takes the preset's, which is none unless the model says
                otherwise; 0 and 1 mean none, too.
            generator: a `torch.Generator`, or a list of one per returned row, on any device. One generator for several
                rows draws a seed for each. Without it every call differs. The global generators are left untouched.
            min_image_tokens, max_image_tokens: codes of an image, 20 and 200 unless the model has other defaults.
                Both are clamped to the number of patches, and in image mode to `max_new_tokens - 1` if that is given.
            draft_length: mode image, for a model that was given draft codes (see `set_draft_codes`): how many codes
                at most are looked up there and verified in one forward (arXiv 2311.08252); 0 for none. What is written
                stays the same. Used for a single row, without beams and with a dynamic cache.
            reference_compat: reproduces the quirks of the reference implementation: ids 0, 1, 2 and `[IMG]` may occur
                in images, images of drawing prompts have no `[IMG]` and `[/IMG]` around them and make the limit on
                new tokens the length of the longest prompt, the whole head is computed, rows are drawn jointly, and in
                beam search the unconditional stream is not reordered. For comparisons only.
            selection, keep_ratio, gumbel_noise: which patches of the images are kept, see
                `LavitVisualTokenizer.select`.
            streamer: gets the prompt first, then the new ids of every step.
            past_key_values (or cache): what an earlier call returned or filled, whatever the mode and with images in
                the prompt, too: the ids go on from it. They are all ids so far (or the new ones alone, with an
                `attention_mask` of all); `pixel_values` are those of all slots or of the new ones. An
                image-mode call leaves its conditional stream there.
            kwargs: everything else of `GenerationMixin.generate`: sampling settings, `num_return_sequences` (distinct
                draws for each prompt), `cache_implementation="static"`, `return_dict_in_generate`, …

        Returns:
            Mode text and interleaved: (rows, L + new) ids, the prompts as they were given and behind them the new ids.
            Mode image: (rows, new) new ids alone, codes up to and including `[/IMG]`. Finished rows are right-padded
            with the pad id. Rows are prompts times `num_return_sequences`. `max_length`, processors, stopping
            criteria, streamer and hidden states count ids as they were given, too: a slot is two.

        Raises:
            ValueError: an unknown mode or preset; numbers of slots and images that differ; a prompt that leaves no
                room in the context; contradictory limits; a wrong number of generators; settings of another mode.
        """
        self._check_mode(
            generation_mode,
            {
                "guidance_scale": guidance_scale,
                "min_image_tokens": min_image_tokens,
                "max_image_tokens": max_image_tokens,
                "draft_length": draft_length,
            },
            reference_compat,
            kwargs,
        )
        drawing = generation_mode != "text"
        preset = self._preset(generation_preset or ("image" if drawing else None))
        defaults = {name: preset.pop(name, None) for name in IMAGE_SETTINGS + PIPELINE_SETTINGS}
        config = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
        scales = (guidance_scale, config.guidance_scale, defaults["guidance_scale"], 1.0)
        chosen_scale = next(scale for scale in scales if scale is not None)
        unset = {name: value for name, value in preset.items() if getattr(config, name) is None}
        call = config.update(**(unset | kwargs))
        config.guidance_scale = 1.0
        config.pad_token_id = self._pad_token_id(config)
        # which ids are images follows from the ids
        call.pop("mm_token_type_ids", None)
        call["logits_processor"] = LogitsProcessorList(logits_processor or [])
        call["stopping_criteria"] = StoppingCriteriaList(stopping_criteria or [])
        prompt = LavitPrompt(
            input_ids=self._on_device(call.pop("input_ids", inputs)),
            attention_mask=self._on_device(call.pop("attention_mask", None)),
            pixel_values=self._on_device(pixel_values),
            selection={"selection": selection, "keep_ratio": keep_ratio, "gumbel_noise": gumbel_noise},
            cache=pop_cache(call),
        )
        drawn = LavitDraw(generator, streamer, reference_compat)
        self._check_counts_and_shares(config)
        write = self._generate_text
        if drawing:
            limits = self._image_limits(min_image_tokens, max_image_tokens, defaults, reference_compat)
            if generation_mode == "image" and config.max_new_tokens is not None:
                if config.max_new_tokens < 2:
                    raise ValueError(
                        f"an image takes a code and [/IMG] at least: max_new_tokens is {config.max_new_tokens}"
                    )
                # pipelines set this general limit; [/IMG] counts in it
                least, most = limits
                limits = min(least, config.max_new_tokens - 1), min(most, config.max_new_tokens - 1)
            draft_length = self._draft_length(
                draft_length, defaults["draft_length"], generation_mode, config, reference_compat
            )
            write = partial(
                self._generate_images,
                generation_mode=generation_mode,
                guidance_scale=chosen_scale,
                limits=limits,
                draft_length=draft_length,
            )
        if drawn.is_list and self._beams(config) > 1 and self._chosen(config, "do_sample"):
            return self._generate_each(write, prompt, config, drawn, call)
        return write(prompt, config, drawn, call)

    def _generate_text(
        self, prompt: LavitPrompt, config: GenerationConfig, drawn: LavitDraw, call: dict[str, Any]
    ) -> torch.Tensor | GenerateOutput:
        vocabulary = self.config.vocabulary
        if drawn.reference_compat or "assistant_model" in call:
            # an assistant's own forward knows no logit_range
            call["logits_processor"].append(LavitRangeLogitsProcessor((0, vocabulary.boi_token_id)))
        else:
            call["logit_range"] = (0, vocabulary.boi_token_id)
        speculative = "assistant_model" in call or self._chosen(config, "prompt_lookup_num_tokens") is not None
        filled = None
        if "inputs_embeds" in call:
            if prompt.pixel_values is not None:
                raise ValueError("pixel_values need input_ids with slots, without inputs_embeds")
            given = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask, CACHE_NAME: prompt.cache}
            call |= {name: value for name, value in given.items() if value is not None}
            prompts = len(call["inputs_embeds"])
        else:
            if prompt.input_ids is None:
                prompt.input_ids = self._begin_text(config)
            filled = fill_prompt(self, prompt, config.pad_token_id, discrete=False)
            if "assistant_model" in call and filled.inputs_embeds is not None:
                # an assistant is given ids: it reads images as codes
                filled.input_ids = fill_prompt(self, prompt, config.pad_token_id, discrete=True).input_ids
            prompts = len(filled.caller_ids)
            self._hand_over(filled, config, call, drawn)
            if filled.inputs_embeds is None:
                del call["inputs_embeds"]
            elif drawn.reference_compat:
                # the reference gives embeddings alone: penalties on repetition do not see the prompt
                del call["input_ids"]
        rows = prompts * (self._chosen(config, "num_return_sequences") or 1)
        stock = speculative or "custom_generate" in call or not self._chosen(config, "do_sample")
        stock = stock or self._beams(config) > 1
        loop = None
        if not stock:
            loop = drawn.loop(vocabulary, config.pad_token_id, rows, keeps_rows=prompt.cache is not None)
        output = self._run(config, call, drawn, loop)
        if filled is None:
            return output
        return filled.give_back(output, with_prompt=True, num_prompt_ids=None if "input_ids" in call else 0)

    def _begin_text(self, config: GenerationConfig) -> torch.Tensor:
        """The prompt of a call without one, as in transformers: the id that begins texts."""
        bos_token_id = self._chosen(config, "bos_token_id")
        if bos_token_id is None:
            raise ValueError("generate needs input_ids, or a bos_token_id to begin with")
        return torch.tensor([[bos_token_id]], device=self.device)

    def _generate_each(
        self, write: Callable, prompt: LavitPrompt, config: GenerationConfig, drawn: LavitDraw, call: dict[str, Any]
    ) -> torch.Tensor:
        """Sampled beams with a generator for each prompt: a beam search a prompt, which draws from its own."""
        if prompt.input_ids is None or prompt.cache is not None or config.return_dict_in_generate:
            raise ValueError("sampled beams with a list of generators need input_ids, and return ids alone")
        generators = drawn.generator if isinstance(drawn.generator, list | tuple) else []
        if len(generators) != len(prompt.input_ids):
            raise ValueError(
                f"{len(generators)} generators were given for {len(prompt.input_ids)} prompts: sampled beams "
                "take one, or one for each prompt"
            )
        allowed, parts = call.pop("prefix_allowed_tokens_fn", None), []
        for row, one in enumerate(prompt.split(self.config.vocabulary)):
            own = LavitDraw(generators[row], drawn.streamer, drawn.reference_compat)
            its_call = {name: copy.copy(value) if isinstance(value, list) else value for name, value in call.items()}
            if allowed is not None:
                its_call["prefix_allowed_tokens_fn"] = lambda _, ids, row=row: allowed(row, ids)
            parts.append(write(one, copy.deepcopy(config), own, its_call))
        rows = [row for part in parts for row in part]
        return pad(rows, config.pad_token_id, "right")[0]

    def tokenize_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **selection,
    ) -> list[list[int]]:
        """Prompts as plain lists of ids, images as code ids: what `generate_batch` and other servers take.

        Args:
            input_ids, attention_mask: (B, L), padded or not.
            pixel_values: (images, 3, H, W), one per slot.
            selection: see `LavitVisualTokenizer.select`.
        """
        move = self._on_device
        prompt = LavitPrompt(move(input_ids), move(attention_mask), move(pixel_values), selection)
        filled = fill_prompt(self, prompt, 0, discrete=True)
        return [row.tolist() for row in unpad(filled.input_ids, filled.attention_mask)]

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
        allowed_ids = (0, vocabulary.boi_token_id)
        if generation_mode == "image":
            allowed_ids = (vocabulary.eoi_token_id, vocabulary.size)
            config.eos_token_id = vocabulary.eoi_token_id
            config.max_new_tokens = self._image_limits(None, max_image_tokens, self._preset("image"))[1]
        config.allowed_ids = allowed_ids  # pyright: ignore[reportAttributeAccessIssue]
        return super().generate_batch(inputs, generation_config=config, **kwargs)
