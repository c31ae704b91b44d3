"""The second stage of [`LavitPipeline`], step by step: visual tokens to conditions, noise, and latents to images."""

import os
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor

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
        return {name: value.to(device, self.unet.dtype) for name, value in conditions.items()}, mask

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

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE: latents to pixels (batch, 3, height, width) in -1..1.

        Raises:
            ValueError: the VAE overflows in half precision, and is offloaded so that no copy of it can be made.
        """
        vae = self.vae
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae = _in_full_precision(vae, self._execution_device)
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

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
