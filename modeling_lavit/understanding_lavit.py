"""Images as the language model reads them. C: width of the visual tokenizer, E: of the language model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_lavit import LavitConfig
from .modeling_lavit_visual_tokenizer import LavitTokenMerger


@dataclass
class LavitImageFeatures(ModelOutput):
    """What [`LavitModel.get_image_features`] returns.

    Args:
        last_hidden_state: (images, N, C), the encoder's features of all patches.
        pooler_output: what the language model reads of each image, (n, E) each.
        hidden_states, attentions: of the encoder, where they were asked for.
        lengths: (images,) int64, n of each.
    """

    last_hidden_state: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    pooler_output: tuple[torch.Tensor, ...] = None  # pyright: ignore[reportAssignmentType]
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    lengths: torch.Tensor = None  # pyright: ignore[reportAssignmentType]


class LavitUnderstanding(nn.Module):
    """Images as the language model reads them: merged continuous features, projected to its width (no quantization).

    Has its own merger, because stage 2 trains one for reading, unless `config.share_understanding_merger`.
    """

    def __init__(self, config: LavitConfig):
        super().__init__()
        self.merger = None if config.share_understanding_merger else LavitTokenMerger(config.visual_config)
        self.projection = nn.Linear(config.visual_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor, keep_mask: torch.BoolTensor | None = None) -> torch.Tensor:
        """(sum of kept, E), image after image.

        Args:
            features: (B, N, C) of the encoder, or (sum of kept, C) merged already where the merger is shared.
            keep_mask: (B, N), which patches are kept; for a merger of its own.
        """
        if self.merger is not None:
            features = self.merger(features, keep_mask)
        return self.projection(features.to(self.projection.weight.dtype))
