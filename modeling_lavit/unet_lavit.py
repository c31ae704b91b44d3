"""A UNet that sees its conditions in their places, too."""

import functools
import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel


class LavitUNet2DConditionModel(UNet2DConditionModel):
    """`UNet2DConditionModel` whose conditions, one for each patch in row-major order, are also laid out as a map
    beside the latents, as further input channels.

    Configuration, weights and interface are those of `UNet2DConditionModel`, with a wider `conv_in` and one linear
    layer more. By cross attention alone a small UNet takes very long to find out which condition belongs to which
    place.
    """

    @functools.wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        narrow = self.conv_in
        map_channels = narrow.out_channels // 2
        self.condition_map = torch.nn.Linear(self.config.cross_attention_dim, map_channels)
        self.conv_in = torch.nn.Conv2d(
            narrow.in_channels + map_channels, narrow.out_channels, narrow.kernel_size, padding=narrow.padding
        )

    def forward(self, sample: torch.Tensor, timestep, encoder_hidden_states: torch.Tensor, *args, **kwargs):
        """
        Args:
            sample: (B, C, h, w).
            encoder_hidden_states: (B, N, cross_attention_dim), N a square number.
            timestep, args, kwargs: as in `UNet2DConditionModel`.
        """
        patches = encoder_hidden_states.shape[1]
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"conditions must be one a patch of a square picture, got {patches}")
        places = self.condition_map(encoder_hidden_states).transpose(1, 2).unflatten(2, (side, side))
        places = F.interpolate(places, size=sample.shape[-2:], mode="nearest")
        return super().forward(torch.cat([sample, places], dim=1), timestep, encoder_hidden_states, *args, **kwargs)
