"""The modes of generate() that write images: limits, guidance, unconditional streams."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerateOutput

from .decoding_lavit import LavitDraw
from .filling_lavit import LavitFilledPrompt, LavitPrompt, begin_images, fill_prompt
from .generation_settings_lavit import guidance_of_rows
from .logits_lavit import LavitGrammarLogitsProcessor, LavitRangeLogitsProcessor, image_state
from .running_lavit import LavitRunMixin
from .slots_lavit import unpad


class LavitImageGenerationMixin(LavitRunMixin):
    """Adds the modes image and interleaved."""

    def _generate_images(
        self,
        prompt: LavitPrompt,
        config: GenerationConfig,
        drawn: LavitDraw,
        call: dict[str, Any],
        *,
        generation_mode: str,
        guidance_scale: float | Sequence[float] | torch.Tensor,
        limits: tuple[int, int],
        draft_length: int,
    ) -> torch.Tensor | GenerateOutput:
        if prompt.input_ids is None or "inputs_embeds" in call:
            raise ValueError(f"generation_mode {generation_mode!r} needs input_ids, without inputs_embeds")
        image_mode, beams = generation_mode == "image", self._beams(config)
        if image_mode:
            prompt = begin_images(prompt, self.config.vocabulary, config.pad_token_id)
        filled = fill_prompt(self, prompt, config.pad_token_id, discrete=True, brackets=not drawn.reference_compat)
        prompts = len(filled.caller_ids)
        repeats = self._chosen(config, "num_return_sequences") or 1
        scales = guidance_of_rows(guidance_scale, prompts, repeats)
        negative_ids = call.pop("negative_prompt_ids", None)
        negative_mask = call.pop("negative_prompt_attention_mask", None)
        if negative_ids is not None and not (scales is not None and image_mode and beams == 1):
            raise ValueError("negative_prompt_ids need generation_mode 'image', a guidance_scale and no beams")
        with_images = bool(self.config.vocabulary.is_code(filled.input_ids[:, filled.cached :]).any())
        longest_ids = filled.longest
        if scales is not None and beams == 1:
            filled.add_streams(self._unconditional_rows(filled, negative_ids, negative_mask), config.pad_token_id)
        self._hand_over(filled, config, call, drawn)
        del call["inputs_embeds"]
        self._limit_images(filled, image_mode, config, limits, drawn, call, longest_ids, with_images)

        loop = None
        if beams == 1:
            loop = drawn.loop(
                self.config.vocabulary,
                config.pad_token_id,
                prompts * repeats,
                guidance_scale=scales,
                restart_unconditional=not image_mode,
                drafter=self._known_images() if draft_length else None,
                draft_length=draft_length,
                keeps_rows=prompt.cache is not None,
            )
        elif scales is not None and not drawn.reference_compat:
            raise ValueError("guidance_scale and num_beams: the unconditional stream cannot follow beams, choose one")
        elif scales is not None:
            # quirk 9: in transformers' own guidance the unconditional cache stays as it is when beams are reordered
            config.guidance_scale = float(scales[0])
            begin = filled.input_ids.new_full((prompts * beams, 1), self.config.vocabulary.boi_token_id)
            call["negative_prompt_ids"] = begin
        output = self._run(config, call, drawn, loop)
        return filled.give_back(output, with_prompt=not image_mode)

    def _limit_images(
        self,
        filled: LavitFilledPrompt,
        image_mode: bool,
        config: GenerationConfig,
        limits: tuple[int, int],
        drawn: LavitDraw,
        call: dict[str, Any],
        longest: int,
        with_images: bool,
    ) -> None:
        """Sets how much is written, and of which ids."""
        vocabulary, width = self.config.vocabulary, filled.input_ids.shape[1]
        if drawn.reference_compat:
            # quirk 4: with visual ids in the prompts their length is the limit
            config.min_new_tokens, config.max_new_tokens = limits[0], longest - 1 if with_images else limits[1]
            allowed = LavitRangeLogitsProcessor((0, 3), (vocabulary.boi_token_id, vocabulary.size))
            call["logits_processor"].append(allowed)
        else:
            if image_mode:
                config.min_new_tokens, config.max_new_tokens = 0, limits[1] + 1
            else:
                config.max_new_tokens = self._interleaved_length(config, filled)
            self._check_context(longest, config.max_new_tokens)
            call["logit_range"] = (vocabulary.eoi_token_id if image_mode else 0, vocabulary.size)
            call["logits_processor"].append(
                LavitGrammarLogitsProcessor(vocabulary, *limits, width + config.max_new_tokens)
            )
        config.max_length = None
        if image_mode:
            config.eos_token_id = vocabulary.eoi_token_id

    def _interleaved_length(self, config: GenerationConfig, filled: LavitFilledPrompt) -> int:
        if config.max_new_tokens is not None:
            return config.max_new_tokens
        if config.max_length is not None:
            return config.max_length - filled.input_ids.shape[1]
        context = self.config.text_config.max_position_embeddings
        return self.generation_config.max_new_tokens or context - filled.longest

    def _unconditional_rows(
        self,
        filled: LavitFilledPrompt,
        negative_ids: torch.Tensor | None,
        negative_mask: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """What the unconditional streams begin with: the image under way from its `[IMG]` on, or a negative prompt.

        Outside an image they are not looked at.
        """
        rows = unpad(filled.input_ids, filled.attention_mask)
        if negative_ids is not None:
            if len(negative_ids) != len(rows):
                raise ValueError(f"{len(negative_ids)} negative prompts were given for {len(rows)} prompts")
            return unpad(self._on_device(negative_ids), self._on_device(negative_mask))
        starts = []
        for row in rows:
            inside, opened = image_state(row.unsqueeze(0), self.config.vocabulary)
            starts.append(row[int(opened) :] if bool(inside) else row[-1:])
        return starts
