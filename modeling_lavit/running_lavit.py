"""What generate() of transformers is given and asked, whatever the mode: filled prompts, settings, a decoding loop."""

from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StopStringCriteria
from transformers.generation.utils import GenerateOutput

from .compat_lavit import CACHE_NAME
from .decoding_lavit import LavitDecodingLoop, LavitDraw
from .drafts_lavit import LavitDraftMixin
from .filling_lavit import LavitFilledPrompt
from .generation_settings_lavit import LavitGenerationSettingsMixin
from .logits_lavit import LavitRangeLogitsProcessor


MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)

# positions from which on a prompt is computed once for all its beams or draws; that is a forward more, which a shorter
# prompt is not worth
SHARED_LENGTH = 32


class LavitRunMixin(LavitGenerationSettingsMixin, LavitDraftMixin, GenerationMixin):
    """Runs `GenerationMixin.generate` on prompts whose slots are filled."""

    def _on_device(self, tensor: MaybeTensor) -> MaybeTensor:
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"ids, masks and pixels must be tensors, got {type(tensor).__name__}: "
                'ask the processor for return_tensors="pt"'
            )
        # an offloaded model is on meta: its hooks move the inputs
        return tensor if tensor is None or self.device.type == "meta" else tensor.to(self.device)

    def _hand_over(
        self, filled: LavitFilledPrompt, config: GenerationConfig, call: dict[str, Any], drawn: LavitDraw
    ) -> None:
        """Gives a filled prompt to `GenerationMixin.generate`, and everyone who counts ids the caller's."""
        self._check_context(filled.longest, 1)
        if call.get("position_ids") is not None and not filled.is_as_given:
            raise ValueError(
                "images lengthen the prompts: position_ids of the prompts as they are given do not fit. Leave them out"
            )
        call |= {
            "input_ids": filled.input_ids,
            "attention_mask": filled.attention_mask,
            "inputs_embeds": filled.inputs_embeds,
        }
        rows_of_prompt = self._chosen(config, "num_return_sequences") or 1
        decoded = max(rows_of_prompt, self._beams(config))
        if filled.cache is not None:
            filled.take_cache(filled.cache, decoded)
            call[CACHE_NAME] = filled.cache
        elif decoded > 1 and self._shares_prompts(filled, config, call, drawn):
            call[CACHE_NAME] = filled.compute_once(self, decoded)
        max_length = self._chosen(config, "max_length")
        if config.max_new_tokens is None and max_length is not None:
            if max_length <= filled.caller_ids.shape[1]:
                raise ValueError(
                    f"max_length {max_length} leaves no room: the prompt has {filled.caller_ids.shape[1]} ids"
                )
            config.max_length = max_length + filled.added
        if config.min_length:
            config.min_length += filled.added
        filled.wrap(call, drawn, 1 if self._beams(config) > 1 else rows_of_prompt)

    def _shares_prompts(
        self, filled: LavitFilledPrompt, config: GenerationConfig, call: dict[str, Any], drawn: LavitDraw
    ) -> bool:
        """Whether several rows of a prompt go on from one computation of it: a short one is not worth a forward more,
        and what is asked for beside ids is of all positions."""
        unusual = ("assistant_model", "custom_generate", "position_ids")
        settings = ("cache_implementation", "output_attentions", "output_hidden_states", "prefill_chunk_size")
        settings += ("prompt_lookup_num_tokens", "return_dict_in_generate")
        return (
            filled.input_ids.shape[1] >= SHARED_LENGTH
            and self._chosen(config, "use_cache") is not False
            and not drawn.reference_compat
            and not any(call.get(name) is not None for name in unusual)
            and not any(self._chosen(config, name) for name in settings)
        )

    def _run(
        self, config: GenerationConfig, call: dict[str, Any], drawn: LavitDraw, loop: LavitDecodingLoop | None
    ) -> torch.Tensor | GenerateOutput:
        """Has transformers prepare inputs, cache and processors, and decode too unless a `loop` is given."""
        if loop is not None:
            tokenizer = call.pop("tokenizer", None)
            if config.stop_strings is not None and tokenizer is not None:
                # transformers hands a tokenizer to its own decoding methods alone
                call["stopping_criteria"].append(StopStringCriteria(tokenizer, config.stop_strings))
                config.stop_strings = None
            return super().generate(generation_config=config, custom_generate=loop, **call)  # pyright: ignore[reportAttributeAccessIssue]
        sampling = self._chosen(config, "do_sample")
        seeded = drawn.global_generators(self.device) if sampling else nullcontext()
        with seeded:
            return super().generate(generation_config=config, streamer=drawn.streamer, **call)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """As in transformers, whose assisted decoding leaves two things to the model: its first candidates stand
        behind a prompt that may be embeddings, and a cache that was given holds the beginning."""
        if is_first_iteration:
            if inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1] > 0:
                candidates = self.get_input_embeddings()(input_ids[:, inputs_embeds.shape[1] :])
                inputs_embeds = torch.cat([inputs_embeds, candidates.to(inputs_embeds)], dim=1)
            cache = kwargs.get(CACHE_NAME)
            cached = cache.get_seq_length() if cache is not None else 0
            if next_sequence_length is None and 0 < cached < input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - cached
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs):
        # an assistant has embeddings of its own
        kwargs["model_kwargs"] = {name: value for name, value in model_kwargs.items() if name != "inputs_embeds"}
        return super()._get_candidate_generator(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        # transformers wants a protocol here that its own models do not fill, as in `generate`
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # continuous batching takes no processors but those of its config
        allowed_ids = getattr(generation_config, "allowed_ids", None)
        if allowed_ids is not None:
            processors.insert(0, LavitRangeLogitsProcessor(allowed_ids))
        return processors
