"""What [`LavitPipeline`] refuses before any model runs, and how it says so."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

from .visual_tokens_lavit import LavitVisualTokens


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# arguments of other pipelines -> what to write here
OTHER_NAMES = {
    "image": 'images are part of the prompt: pipe([image, "in the snow"]), or pipe.reconstruct(image)',
    "images": 'images are part of the prompt: pipe([image, "in the snow"]), or pipe.reconstruct(image)',
    "ip_adapter_image": 'images are part of the prompt: pipe([image, "in the snow"])',
    "seed": "give generator=torch.Generator().manual_seed(seed), one or one for each image",
    "strength": "images of a prompt are read, not noised; guidance_scale says how closely the prompt is followed",
    "num_images": "it is called num_images_per_prompt",
    "steps": "it is called num_inference_steps",
    "prompt_embeds": "what is decoded are visual tokens, not embeddings of text: give visual_tokens",
    "negative_prompt_embeds": "what is decoded are visual tokens, not embeddings of text: give negative_prompt",
}


def check_names(given: dict[str, Any]):
    """Says what arguments that other pipelines take are called here."""
    for name in given:
        if name in OTHER_NAMES:
            raise ValueError(f"{name} is no argument of LavitPipeline: {OTHER_NAMES[name]}")


def check_components(pipeline, what: str, *names: str):
    """Says which of the components that `what` needs a pipeline was made without."""
    missing = [name for name in names if getattr(pipeline, name) is None]
    if missing:
        raise ValueError(
            f"{what} needs {' and '.join(missing)}, which this pipeline was made without: "
            + ("it decodes visual_tokens alone" if "model" in names else "it makes visual tokens alone")
        )


def check_count(name: str, value: Any):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")


def check_scale(name: str, value: Any, none: str):
    """`none` says which values switch it off."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be a number from 0 on ({none}), got {value!r}")


def check_size(height: int | None, width: int | None, aspect_ratio: str | None, known: dict, multiple: int):
    """`known`: the aspect ratios by name; `multiple`: what heights and widths are multiples of."""
    if aspect_ratio is not None:
        if height is not None or width is not None:
            raise ValueError("give either aspect_ratio or height and width, not both")
        if aspect_ratio not in known:
            raise ValueError(f"aspect_ratio must be one of {list(known)}, got {aspect_ratio!r}")
    for name, size in (("height", height), ("width", width)):
        if size is not None and (not isinstance(size, numbers.Integral) or size <= 0 or size % multiple):
            raise ValueError(f"{name} must be a positive multiple of {multiple}, got {size!r}")


def check_scheduler(scheduler, num_inference_steps: int):
    name = type(scheduler).__name__
    if not hasattr(scheduler, "init_noise_sigma") or not hasattr(scheduler, "scale_model_input"):
        raise ValueError(f"{name} is no scheduler of Stable Diffusion: take one of pipe.scheduler.compatibles")
    # its first steps are of Runge-Kutta's method, of four
    if scheduler.config.get("skip_prk_steps") is False and num_inference_steps < 4:
        raise ValueError(
            f"{name} needs 4 num_inference_steps or more, got {num_inference_steps}: for fewer give it "
            "skip_prk_steps=True"
        )


def check_interval(interval: tuple[float, float]):
    if not _is_pair(interval) or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"decoder_guidance_interval must be (start, stop) with 0 <= start < stop <= 1, got {interval!r}"
        )


def check_pair(name: str, value: tuple[int, int] | None):
    if value is not None and not _is_pair(value):
        raise ValueError(f"{name} must be two numbers of pixels, got {value!r}")


def _is_pair(value: Any) -> bool:
    numeric = isinstance(value, list | tuple) and all(isinstance(one, numbers.Real) for one in value)
    return numeric and len(value) == 2


def check_tensor_inputs(given: Sequence[str], allowed: list[str]):
    if not isinstance(given, list | tuple) or not set(given) <= set(allowed):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {allowed}, got {given!r}")


def check_output_type(output_type: str, vae):
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
    if vae is None and output_type != "latent":
        raise ValueError(f'this pipeline has no vae: it gives output_type="latent" alone, not {output_type!r}')


def check_latents(latents: torch.Tensor, shape: tuple[int, ...]):
    """`shape`: (images, channels, height, width)."""
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
        got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"latents must be a tensor (images, channels, height, width) of {shape}, got {got}")
    if not latents.isfinite().all():
        raise ValueError("latents hold NaN or infinite values")


def as_generators(generator: Any, count: int) -> torch.Generator | list[torch.Generator] | None:
    """One generator, or a list of `count`.

    Raises:
        ValueError: something else, or a number of them that is not `count`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"generator must be a torch.Generator, or one for each image, got {generator!r:.80}: for a seed write "
            "torch.Generator().manual_seed(seed)"
        )
    if len(generator) != count:
        raise ValueError(f"{count} images are drawn, but {len(generator)} generators given: one for each image")
    return list(generator)


def as_visual_tokens(visual_tokens: LavitVisualTokens | Sequence) -> LavitVisualTokens:
    """Visual tokens of at least one code an image; a list of 1-D integer tensors, arrays or lists is joined.

    Raises:
        ValueError: numbers that are no codes, or an image without any.
    """
    if not isinstance(visual_tokens, LavitVisualTokens):
        if not isinstance(visual_tokens, list | tuple):
            raise ValueError(
                "visual_tokens must be LavitVisualTokens or a list with a 1-D tensor of codes for each image, got "
                f"{type(visual_tokens).__name__}"
            )
        rows = [torch.as_tensor(row) for row in visual_tokens]
        for i, row in enumerate(rows):
            if row.numel() and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool):
                raise ValueError(f"visual_tokens of image {i} must be codes, whole numbers, got {row.dtype}")
        lengths = [row.numel() for row in rows]
    else:
        lengths = visual_tokens.lengths.tolist()
    empty = [i for i, length in enumerate(lengths) if length < 1]
    if empty:
        raise ValueError(f"images {empty} have no visual tokens: each needs one code or more")
    return visual_tokens if isinstance(visual_tokens, LavitVisualTokens) else LavitVisualTokens.join(rows)
