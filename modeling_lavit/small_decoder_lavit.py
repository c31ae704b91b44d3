"""Parts of small pixel decoders: a UNet that sees its conditions in their positions, a linear patch autoencoder."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook


class LavitUNet2DConditionModel(UNet2DConditionModel):
    """`UNet2DConditionModel` whose conditions, one for each patch in row-major order, are also laid out as a map
    beside the latents, as further input channels.

    Configuration, weights and interface are those of `UNet2DConditionModel`, with a wider `conv_in` and one linear
    layer more. By cross attention alone a small UNet takes very long to find out which condition belongs to which
    position.
    """

    @functools.wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        narrow = self.conv_in
        map_channels = narrow.out_channels // 2
        self.condition_map = torch.nn.Linear(self.config["cross_attention_dim"], map_channels)
        self.conv_in = torch.nn.Conv2d(
            narrow.in_channels + map_channels, narrow.out_channels, narrow.kernel_size, padding=narrow.padding
        )

    def forward(self, sample: torch.Tensor, timestep, encoder_hidden_states: torch.Tensor, *args, **kwargs):
        """
        Args:
            sample: (B, C, h, w).
            encoder_hidden_states: (B, N, cross_attention_dim), N a square number.
            timestep, args, kwargs: as in `UNet2DConditionModel`.

        Raises:
            ValueError: the number of conditions is not a square.
        """
        patches = encoder_hidden_states.shape[1]
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"conditions must be one a patch of a square image, got {patches}")
        condition_map = self.condition_map(encoder_hidden_states).transpose(1, 2).unflatten(2, (side, side))
        condition_map = F.interpolate(condition_map, size=sample.shape[-2:], mode="nearest")
        return super().forward(
            torch.cat([sample, condition_map], dim=1), timestep, encoder_hidden_states, *args, **kwargs
        )


class LavitPatchAutoencoder(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Each patch of pixels to its leading principal components, and back; orthonormal, so noise keeps its size.

    With `latent_channels = 3 · patch_size²` it is exactly invertible. As patches are independent, `enable_slicing`
    (one image after the other) and `enable_tiling` (bands of `tile_latent_min_size` rows of patches) change nothing.

    Args:
        patch_size: side of a patch in pixels, a power of two.
        latent_channels: number of components kept.
        scaling_factor: as in `AutoencoderKL`: the factor by which a pipeline multiplies latents.
        block_out_channels: tells pipelines the downsampling factor `2 ** (len - 1)`, as in `AutoencoderKL`.

    Raises:
        ValueError: `block_out_channels` and `patch_size` say different factors.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 48,
        scaling_factor: float = 1.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1),
        force_upcast: bool = False,
    ):
        super().__init__()
        if 2 ** (len(block_out_channels) - 1) != patch_size:
            raise ValueError(
                f"{len(block_out_channels)} block_out_channels do not make a patch of {patch_size} pixels"
            )
        self.components = torch.nn.Parameter(torch.eye(latent_channels, in_channels * patch_size**2))
        self.mean = torch.nn.Parameter(torch.zeros(in_channels * patch_size**2))
        self.use_slicing = self.use_tiling = False
        self.tile_latent_min_size = 64

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> float:
        """Principal components of the patches of `images` (B, 3, S, S) in [-1, 1]; returns the share kept."""
        patches = F.pixel_unshuffle(images, self.config["patch_size"]).movedim(1, -1).flatten(0, -2).double()
        covariance = torch.cov(patches.T)
        values, vectors = torch.linalg.eigh(covariance)
        self.mean.copy_(patches.mean(0))
        self.components.copy_(vectors.flip(1)[:, : self.config["latent_channels"]].T)
        return float(values.flip(0)[: self.config["latent_channels"]].sum() / values.sum())

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | Any:
        """Images (B, 3, S, S) in [-1, 1] to a distribution without spread over (B, latent_channels, S/p, S/p)."""
        latents = self._piecewise(self._encode, x, self.config["patch_size"] * self.tile_latent_min_size)
        posterior = DiagonalGaussianDistribution(
            torch.cat([latents, torch.zeros_like(latents)], 1), deterministic=True
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | Any:
        """Latents (B, latent_channels, h, w) to images (B, 3, h·p, w·p)."""
        sample = self._piecewise(self._decode, z, self.tile_latent_min_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(x, self.config["patch_size"]) - self.mean[:, None, None]
        return torch.einsum("bchw,kc->bkhw", patches, self.components)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        patches = torch.einsum("bkhw,kc->bchw", z, self.components) + self.mean[:, None, None]
        return F.pixel_shuffle(patches, self.config["patch_size"])

    def _piecewise(self, compute, values: torch.Tensor, band: int) -> torch.Tensor:
        """`compute` on the images one by one, and on bands of so many rows, as slicing and tiling ask for it."""
        images = values.split(1) if self.use_slicing else [values]
        bands = [image.split(band, dim=2) if self.use_tiling else [image] for image in images]
        return torch.cat([torch.cat([compute(part) for part in parts], dim=2) for parts in bands])

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | Any:
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict)
