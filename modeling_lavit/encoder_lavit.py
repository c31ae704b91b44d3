"""The encoder of the visual tokenizer: BLIP-2's vision model, which is EVA ViT-g, with a choice of stems."""

import torch
import torch.nn as nn
from transformers import Blip2VisionConfig, Blip2VisionModel

from .configuration_lavit import LavitVisualTokenizerConfig


class LavitResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a 1x1 one: (B, in, H, W) to (B, out, H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(hidden) + self.shortcut(hidden))


class LavitConvolutionalStem(nn.Module):
    """Overlapping convolutions (B, 3, S, S) to (B, C, S / p, S / p) in the place of the linear patch embedding
    (arXiv 2106.14881): one residual block of stride 2 for every halving, one of stride 1, a projection."""

    def __init__(self, config: LavitVisualTokenizerConfig):
        super().__init__()
        halvings = config.patch_size.bit_length() - 1
        widths = [3, *(config.hidden_size >> (halvings - i) for i in range(halvings + 1))]
        strides = [2] * halvings + [1]
        self.blocks = nn.Sequential(
            *(LavitResidualBlock(widths[i], widths[i + 1], strides[i]) for i in range(halvings + 1))
        )
        self.projection = nn.Conv2d(config.hidden_size, config.hidden_size, 1)

    @property
    def weight(self) -> torch.Tensor:
        """What `Blip2VisionModel` asks for the dtype of."""
        return self.projection.weight

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.blocks(pixel_values))


def build_encoder(config: LavitVisualTokenizerConfig) -> Blip2VisionModel:
    """EVA ViT-g, which is BLIP-2's vision model, with the config's stem; LaVIT reads it before the post norm."""
    encoder = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            qkv_bias=True,
            hidden_act="gelu",
            initializer_range=config.initializer_range,
            attn_implementation=config._attn_implementation,  # pyright: ignore[reportCallIssue]
        )
    )
    if config.stem == "convolutional":
        encoder.embeddings.patch_embedding = LavitConvolutionalStem(config)  # pyright: ignore[reportAttributeAccessIssue]
    return encoder
