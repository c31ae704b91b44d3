"""What the visual tokenizer gives of a batch of images, ragged: B images, N patches, C width, K codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


# `ModelOutput` wants None as the default of all fields, also of those that are always there


@dataclass
class LavitVisualTokens(ModelOutput):
    """Discrete visual tokens of a batch of images.

    Args:
        codes: (sum of lengths,) int64, the images' codes one after the other, `0 … K-1`.
        lengths: (B,) int64, number of codes of each image.
        keep_mask: (B, N) bool, which patches were kept; None for codes that a language model wrote.
        keep_logprobs: (B, N) float32, log-probability of keeping each patch; None likewise.
        hidden_states, attentions: of the encoder's layers, where they were asked for.
    """

    codes: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    lengths: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    keep_mask: torch.Tensor | None = None
    keep_logprobs: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    def split(self) -> tuple[torch.Tensor, ...]:
        """The codes of each image, a 1-D tensor each."""
        return self.codes.split(self.lengths.tolist())

    @classmethod
    def join(cls, rows: Sequence[torch.Tensor]) -> "LavitVisualTokens":
        """The inverse of [`split`]: from a 1-D tensor of codes for each image.

        Raises:
            ValueError: there is no row, or one is not 1-D, has no codes, or holds no integers.
        """
        rows = [torch.as_tensor(row) for row in rows]
        if not rows or any(row.ndim != 1 or row.is_floating_point() or not len(row) for row in rows):
            raise ValueError(
                "visual_tokens must be LavitVisualTokens or a list with a 1-D tensor of codes, one at least, for each "
                "image"
            )
        rows = [row.long() for row in rows]
        return cls(codes=torch.cat(rows), lengths=torch.tensor([len(row) for row in rows]))


@dataclass
class LavitVisualFeatures(ModelOutput):
    """Continuous merged features of a batch of images, what the language model reads.

    Args:
        features: (sum of lengths, C).
        lengths, keep_mask, keep_logprobs: as in [`LavitVisualTokens`].
        last_hidden_state: (B, N, C), the encoder's features of all patches.
        hidden_states, attentions: of the encoder's layers, where they were asked for.
    """

    features: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    lengths: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    keep_mask: torch.Tensor | None = None
    keep_logprobs: torch.Tensor | None = None
    last_hidden_state: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    def split(self) -> tuple[torch.Tensor, ...]:
        """The features of each image, (n, C) each."""
        return self.features.split(self.lengths.tolist())
