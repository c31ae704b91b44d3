"""The second stage of [`LavitPipeline`], step by step: visual tokens to conditions, noise, and latents to images."""

import os
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor

from .checks_lavit import (
    check_count,
    check_interval,
    check_pair,
    check_scale,
    check_scheduler,
    check_size,
    check_tensor_inputs,
)
from .denoising_lavit import DecodingUNet, LavitDenoiser
from .modeling_lavit_detokenizer import LavitDetokenizer
from .visual_tokens_lavit import LavitVisualTokens


LOADING_OPTIONS = (
    "cache_dir",
    "dtype",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "torch_dtype",
)


class LavitPixelsMixin(DiffusionPipeline if TYPE_CHECKING else object):
    """What stands before and behind the denoising loop."""

    def enable_vae_slicing(self):
        """The VAE decodes one image after the other: less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        self.vae.disable_slicing()

    def enable_vae_tiling(self):
        """The VAE decodes images part by part: less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self):
        self.vae.disable_tiling()

    def encode_visual_tokens(
        self, visual_tokens: LavitVisualTokens, num_images_per_prompt: int = 1
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The detokenizer: visual tokens to the UNet's conditions.

        Returns:
            `prompt_embeds` (images, conditions, width), `pooled_prompt_embeds` (images, width) and their `negative_`
            counterparts; and the mask (2 * images, conditions) over [unconditional; conditional], or `None` where all
            conditions count.
        """
        rows = [codes for codes in visual_tokens.split() for _ in range(num_images_per_prompt)]
        device = self._execution_device
        lengths = torch.tensor([len(codes) for codes in rows], device=device)
        cond = self.detokenizer(torch.cat(rows).to(device), lengths)
        uncond = _unconditional(self.detokenizer, len(rows), device)
        mask = None
        if uncond.attention_mask is not None:
            mask = torch.cat([uncond.attention_mask, cond.attention_mask]).to(device)

        conditions = {
            "prompt_embeds": cond.prompt_embeds,
            "negative_prompt_embeds": uncond.prompt_embeds,
            # SDXL's loop wants a pooled condition; an SD-1.5-shaped UNet ignores it
            "pooled_prompt_embeds": cond.prompt_embeds[:, 0] if mask is not None else cond.pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": uncond.prompt_embeds[:, 0]
            if mask is not None
            else uncond.pooled_prompt_embeds,
        }
        return {name: value.to(device) for name, value in conditions.items()}, mask

    def choose_size(self, height: int | None, width: int | None, aspect_ratio: str | None) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn: as given, else of the aspect ratio, else the UNet's own.

        Raises:
            ValueError: sizes that the decoder cannot draw, or an unknown aspect ratio.
        """
        known = self.defaults.aspect_ratios
        check_size(height, width, aspect_ratio, known, max(8, self.vae_scale_factor))
        size = known[aspect_ratio] if aspect_ratio else self.default_size
        return height or size[0], width or size[1]

    def latents_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(images, channels, height, width) of the latents of images of `height` and `width` pixels."""
        factor = self.vae_scale_factor
        return batch_size, self.unet.config.in_channels, height // factor, width // factor

    def prepare_latents(
        self, batch_size: int, height: int, width: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """Noise (batch, channels, height, width) / vae_scale_factor, drawn in float32 whatever the UNet's dtype."""
        shape = self.latents_shape(batch_size, height, width)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return noise.to(self.unet.dtype)

    def check_denoising(self, **settings) -> dict[str, Any]:
        """The settings of [`denoise`], the checkpoint's defaults in place of `None`; all of them are to be given.

        Raises:
            ValueError: one is out of range: with what was given and what is allowed.
        """
        for name in ("num_inference_steps", "decoder_guidance_scale"):
            if settings[name] is None:
                settings[name] = getattr(self.defaults, name)
        check_count("num_inference_steps", settings["num_inference_steps"])
        check_scheduler(self.scheduler, settings["num_inference_steps"])
        check_scale("decoder_guidance_scale", settings["decoder_guidance_scale"], "up to 1 means none")
        check_scale("guidance_rescale", settings["guidance_rescale"], "0 means none")
        check_interval(settings["decoder_guidance_interval"])
        check_tensor_inputs(settings["callback_on_step_end_tensor_inputs"], self._callback_tensor_inputs)
        check_scale("eta", settings["eta"], "0 means none")
        for name in ("original_size", "crops_coords_top_left", "target_size"):
            check_pair(name, settings[name])
        return settings

    def denoise(
        self,
        latents: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        mask: torch.Tensor | None,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        *,
        decoder_guidance_scale: float,
        decoder_guidance_interval: tuple[float, float],
        **settings,
    ) -> torch.Tensor:
        """SDXL's loop: noise to latents of images, (images, channels, height, width) / vae_scale_factor.

        Args:
            latents: of [`prepare_latents`].
            conditions, mask: of [`encode_visual_tokens`].
            height, width: in pixels.
            generator: of schedulers that draw noise.
            decoder_guidance_scale, decoder_guidance_interval, settings: of [`check_denoising`].
        """
        with self._calls.begin(one_at_a_time=self._takes_turns, join=True) as call:
            # LoRA's scale is set in the UNet's layers for the time of a call
            lock = self._calls.turn if getattr(self.unet, "peft_config", None) else None
            start, stop = decoder_guidance_interval
            unet = DecodingUNet(self.unet, len(latents), mask, (start, stop), lock)
            denoiser = LavitDenoiser.of(self, call, unet)
            return denoiser(
                **{name: value.to(self.unet.dtype) for name, value in conditions.items()},
                height=height,
                width=width,
                generator=generator,
                latents=latents,
                guidance_scale=decoder_guidance_scale,
                output_type="latent",
                **settings,
            ).images

    def decode_images(self, latents: torch.Tensor, output_type: str = "pil") -> tuple[Any, list[bool] | None]:
        """Latents to images of [`LavitPipelineOutput`] and flags of the safety checker; "latent" leaves them as they
        are."""
        if output_type == "latent":
            return latents, None
        images, flags = self.run_safety_checker(self.decode_latents(latents))
        return self.image_processor.postprocess(images.float(), output_type=output_type), flags

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE: latents to pixels (batch, 3, height, width) in -1..1.

        Raises:
            ValueError: the VAE overflows in half precision, and is offloaded so that no copy of it can be made.
        """
        vae = self.vae
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae = _in_full_precision(vae, self._execution_device)
        return vae.decode(unscale_latents(latents.to(vae.dtype), vae.config), return_dict=False)[0]

    def run_safety_checker(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Blackens flagged images, (batch, 3, height, width) in -1..1; flags are `None` without a safety checker."""
        if self.safety_checker is None:
            return images, None
        shown = self.image_processor.postprocess(images, output_type="pil")
        clip_input = self.feature_extractor(shown, return_tensors="pt").pixel_values
        array = images.float().permute(0, 2, 3, 1).cpu().numpy()
        checker = self.safety_checker
        _, flags = checker(images=array, clip_input=clip_input.to(self._execution_device, checker.dtype))
        flagged = torch.tensor(flags, device=images.device)[:, None, None, None]
        return images.masked_fill(flagged, -1.0), flags


def scale_latents(latents: torch.Tensor, config) -> torch.Tensor:
    """What a VAE encodes, (images, channels, height, width), as a UNet sees it; `config`: of the VAE."""
    shift, spread = _shift_and_spread(latents, config)
    latents = latents if shift is None else latents - shift
    return latents * config.scaling_factor / spread if spread is not None else latents * config.scaling_factor


def unscale_latents(latents: torch.Tensor, config) -> torch.Tensor:
    """The inverse of [`scale_latents`], as in `StableDiffusionXLPipeline` (mean and deviation of each channel) and
    `StableDiffusion3Pipeline` (one shift)."""
    shift, spread = _shift_and_spread(latents, config)
    latents = latents / config.scaling_factor if spread is None else latents * spread / config.scaling_factor
    return latents if shift is None else latents + shift


def _shift_and_spread(latents: torch.Tensor, config) -> tuple[torch.Tensor | float | None, torch.Tensor | None]:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor"), None
    shift, spread = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return shift, spread


# begins elsewhere than in `forward`: offloading must bring the weights first
@apply_forward_hook
def _unconditional(detokenizer, batch_size: int, device: torch.device):
    return detokenizer.unconditional(batch_size, device)


def _in_full_precision(vae, device: torch.device):
    """A float32 copy of a VAE, with its slicing and tiling. The component stays as it is: others may share it."""
    weights = vae.state_dict()
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError(
            "this vae overflows in float16 and is offloaded layer by layer: load it in float32, "
            'vae=AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=torch.float32)'
        )
    with torch.device("meta"):
        copy = type(vae).from_config(vae.config).eval()
    copy.load_state_dict({name: weight.to(device, torch.float32) for name, weight in weights.items()}, assign=True)
    for name, value in vars(vae).items():
        if name.startswith(("use_", "tile_")):
            setattr(copy, name, value)
    return copy


def load_pixel_decoder(source: str | os.PathLike, folder: str, given: dict[str, Any]) -> dict[str, Any]:
    """Detokenizer, UNet, VAE and scheduler from a subfolder of a checkpoint, those apart that are `given`.

    Returns:
        `given`, the arguments of a `from_pretrained`, and the components.
    """
    options = {name: given[name] for name in LOADING_OPTIONS if name in given}
    without_dtype = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
    classes = {
        "detokenizer": (LavitDetokenizer, options),
        "unet": (UNet2DConditionModel, options),
        "vae": (AutoencoderKL, options),
        "scheduler": (DDIMScheduler, without_dtype),
    }
    loaded = {
        name: component_class.from_pretrained(source, subfolder=f"{folder}/{name}", **its_options)
        for name, (component_class, its_options) in classes.items()
        if name not in given
    }
    return given | loaded
