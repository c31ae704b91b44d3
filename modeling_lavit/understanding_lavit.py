"""Images as the language model reads them. C: width of the visual tokenizer, E: of the language model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_lavit import LavitConfig
from .modeling_lavit_visual_tokenizer import LavitTokenMerger, LavitVisualTokenizer


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

    def forward(
        self, visual_tokenizer: LavitVisualTokenizer, pixel_values: torch.Tensor, **options
    ) -> LavitImageFeatures:
        """(B, 3, H, W) normalised pixels. `options`: see `LavitVisualTokenizer.encode`."""
        encoded = visual_tokenizer.encode(pixel_values, merger=self.merger, **options)
        projected = self.projection(encoded.features.to(self.projection.weight.dtype))
        return LavitImageFeatures(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=projected.split(encoded.lengths.tolist()),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            lengths=encoded.lengths,
        )
