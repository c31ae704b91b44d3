"""A linear patch autoencoder with the interface of `AutoencoderKL`, for pictures too small to need more."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput


class LavitPatchAutoencoder(ModelMixin, ConfigMixin):
    """Each patch of pixels to its leading principal components, and back; orthonormal, so noise keeps its size.

    With `latent_channels = 3 · patch_size²` it is exactly invertible.

    Args:
        patch_size: side of a patch in pixels, a power of two.
        latent_channels: number of components kept.
        scaling_factor: as in `AutoencoderKL`: what a pipeline multiplies latents with.
        block_out_channels: tells pipelines the downsampling factor `2 ** (len - 1)`, as in `AutoencoderKL`.
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

    @torch.no_grad()
    def fit(self, pictures: torch.Tensor) -> float:
        """Principal components of the patches of `pictures` (B, 3, S, S) in [-1, 1]; returns the share kept."""
        patches = F.pixel_unshuffle(pictures, self.config.patch_size).movedim(1, -1).flatten(0, -2).double()
        covariance = torch.cov(patches.T)
        values, vectors = torch.linalg.eigh(covariance)
        self.mean.copy_(patches.mean(0))
        self.components.copy_(vectors.flip(1)[:, : self.config.latent_channels].T)
        return float(values.flip(0)[: self.config.latent_channels].sum() / values.sum())

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Pictures (B, 3, S, S) in [-1, 1] to a distribution without spread over (B, latent_channels, S/p, S/p)."""
        patches = F.pixel_unshuffle(x, self.config.patch_size) - self.mean[:, None, None]
        latents = torch.einsum("bchw,kc->bkhw", patches, self.components)
        posterior = DiagonalGaussianDistribution(
            torch.cat([latents, torch.zeros_like(latents)], 1), deterministic=True
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Latents (B, latent_channels, h, w) to pictures (B, 3, h·p, w·p)."""
        patches = torch.einsum("bkhw,kc->bchw", z, self.components) + self.mean[:, None, None]
        sample = F.pixel_shuffle(patches, self.config.patch_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict)
