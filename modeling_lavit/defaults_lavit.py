"""What [`LavitPipeline`] uses where a call does not say: it lives in the configs of the components, and follows
them into every pipeline that they are put into."""

from dataclasses import dataclass
from typing import Any

from .configuration_lavit import LavitDetokenizerConfig


# (height, width) of the official high-resolution decoder
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "2:3": (1216, 832),
    "3:4": (1152, 896),
}
# of the official checkpoints; a model says otherwise in `generation_config.generation_presets["image"]`
GUIDANCE_SCALE = 4.0
MULTIMODAL_GUIDANCE_SCALE = 5.0
MAX_IMAGE_TOKENS = 200


@dataclass(frozen=True)
class LavitDefaults:
    """Settings of a pipeline's calls.

    Args:
        guidance_scale, multimodal_guidance_scale: of the language model, for prompts of text alone and for those with
            images.
        max_image_tokens: most visual tokens of an image.
        num_inference_steps, decoder_guidance_scale: of the denoising.
        aspect_ratios: name -> (height, width) in pixels.
    """

    guidance_scale: float
    multimodal_guidance_scale: float
    max_image_tokens: int
    num_inference_steps: int
    decoder_guidance_scale: float
    aspect_ratios: dict[str, tuple[int, int]]


def image_preset(model) -> dict[str, Any]:
    """How the model draws, as its generation config says: `generation_presets["image"]`; nothing without a model."""
    presets = getattr(model.generation_config, "generation_presets", None) if model else None
    return (presets or {}).get("image", {})


def read_defaults(model, detokenizer, default_size: tuple[int, int] | None) -> LavitDefaults:
    """The settings that the configs of the language model and of the detokenizer hold, or else official ones.

    `default_size` is (height, width) in pixels of the UNet.
    """
    preset = image_preset(model)
    decoder = detokenizer.config if detokenizer else LavitDetokenizerConfig()

    def of_model(name: str, otherwise):
        return otherwise if preset.get(name) is None else preset[name]

    aspect_ratios = decoder.aspect_ratios
    if aspect_ratios is None:
        aspect_ratios = {"1:1": default_size} if default_size not in (None, (1024, 1024)) else ASPECT_RATIOS
    return LavitDefaults(
        guidance_scale=of_model("guidance_scale", GUIDANCE_SCALE),
        multimodal_guidance_scale=of_model("multimodal_guidance_scale", MULTIMODAL_GUIDANCE_SCALE),
        max_image_tokens=min(of_model("max_image_tokens", MAX_IMAGE_TOKENS), decoder.num_queries),
        num_inference_steps=decoder.default_num_inference_steps,
        decoder_guidance_scale=decoder.default_decoder_guidance_scale,
        aspect_ratios={name: (size[0], size[1]) for name, size in aspect_ratios.items()},
    )


def store_defaults(model, detokenizer, of_model: dict[str, Any], of_decoder: dict[str, Any]):
    """Writes settings into the configs of those of the two that are there; settings that are None stay as they are."""
    drawing = {name: value for name, value in of_model.items() if value is not None}
    if drawing and model:
        presets = getattr(model.generation_config, "generation_presets", None) or {}
        model.generation_config.generation_presets = {**presets, "image": image_preset(model) | drawing}
    for name, value in of_decoder.items() if detokenizer else ():
        if value is not None:
            setattr(detokenizer.config, name, value)
