"""Settings of generate(): modes, presets with the reference's defaults, limits, and what cannot be."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel


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
# what a preset may hold for LavitPipeline alone
IMAGE_SETTINGS = ("guidance_scale", "min_image_tokens", "max_image_tokens", "draft_length")
# of a preset, for LavitPipeline alone
PIPELINE_SETTINGS = ("multimodal_guidance_scale",)


class LavitGenerationSettingsMixin(PreTrainedModel if TYPE_CHECKING else object):
    """Finds out what a call, its preset and the model's generation config say together."""

    def _check_mode(self, mode: str, image_settings: dict[str, Any], reference_compat: bool, kwargs: dict) -> None:
        if mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {GENERATION_MODES}, got {mode!r}")
        if mode == "text" and any(value is not None for value in image_settings.values()):
            raise ValueError(f"{', '.join(IMAGE_SETTINGS)} apply to images, but generation_mode is 'text'")
        if mode == "interleaved" and reference_compat:
            raise ValueError("the reference has no interleaved mode to be compatible with")
        speculation = ("assistant_model", "prompt_lookup_num_tokens")
        if mode != "text" and (given := [name for name in speculation if kwargs.get(name) is not None]):
            raise ValueError(f"{given[0]} is for text, but generation_mode is {mode!r}: images have draft_length")
        if mode == "image" and kwargs.get("max_length") is not None:
            raise ValueError("in image mode max_image_tokens limits the length, not max_length")

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
            low = defaults["min_image_tokens"] if least is None else least
            return low, defaults["max_image_tokens"] if most is None else most
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
                f"the longest prompt takes {prompt_length} positions, images included, and {new_tokens} more are to "
                f"be written, but the context of the language model is {context}: shorten the prompt or write fewer"
            )

    def _pad_token_id(self, config: GenerationConfig) -> int:
        eos = self._chosen(config, "eos_token_id")
        candidates = (self._chosen(config, "pad_token_id"), eos[0] if isinstance(eos, list) else eos, 0)
        return next(candidate for candidate in candidates if candidate is not None)

    def _chosen(self, config: GenerationConfig, name: str) -> Any:
        """A setting as `GenerationMixin.generate` will see it: the call's, or else the model's."""
        own = getattr(config, name)
        return own if own is not None else getattr(self.generation_config, name)

    def _check_counts_and_shares(self, config: GenerationConfig) -> None:
        """Raises ValueError for settings that transformers leaves out, or counts with, where they make no sense; the
        others are refused by its own processors."""
        for name in ("num_beams", "num_return_sequences"):
            value = self._chosen(config, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        for name in ("top_p", "typical_p"):
            value = self._chosen(config, name)
            if value is not None and (not isinstance(value, Real) or not 0 < float(value) <= 1):
                raise ValueError(f"{name} must be a share above 0 and up to 1, which means all, got {value!r}")

    def _beams(self, config: GenerationConfig) -> int:
        return self._chosen(config, "num_beams") or 1


def guidance_of_rows(scale: float | Sequence[float] | torch.Tensor, prompts: int, repeats: int) -> torch.Tensor | None:
    """A scale for every row, 1 where there is none; None where no row has one."""
    try:
        scales = torch.as_tensor(scale, dtype=torch.float32).flatten().cpu()
    except (TypeError, ValueError):
        scales = torch.tensor([torch.nan])
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError(f"guidance_scale must be a number from 0 on (0 and 1 mean none), got {scale!r}")
    if len(scales) == 1:
        scales = scales.expand(prompts * repeats)
    elif len(scales) == prompts:
        scales = scales.repeat_interleave(repeats)
    elif len(scales) != prompts * repeats:
        raise ValueError(f"{len(scales)} guidance scales were given for {prompts} prompts of {repeats} rows each")
    scales = scales.masked_fill(scales == 0, 1.0)
    return scales if bool((scales != 1).any()) else None
