"""Which ids may come next: the grammar of images, and ranges of ids. Ids are int64, scores float32."""

import torch
from transformers import LogitsProcessor

from .vocabulary_lavit import LavitVocabulary


def image_state(input_ids: torch.Tensor, vocabulary: LavitVocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) ids -> inside (B,) bool, whether a row ends within an image; opened (B,), where its last `[IMG]` is."""
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    opened = (positions * (input_ids == vocabulary.boi_token_id)).amax(1)
    closed = (positions * (input_ids == vocabulary.eoi_token_id)).amax(1)
    return opened > closed, opened - 1


class LavitGrammarLogitsProcessor(LogitsProcessor):
    """Keeps sequences well formed: `[IMG] codes [/IMG]`, with a bounded number of codes, and text around images.

    Inside an image only codes and `[/IMG]` are allowed; `[/IMG]` from `min_image_tokens` codes on, and nothing else
    after `max_image_tokens` codes or where the sequence must end. Outside, only text ids and `[IMG]`, the latter while
    an image of the least size still fits. What is inside follows from the ids alone, so beams and batches need no
    bookkeeping.

    Args:
        vocabulary: meaning of the ids.
        min_image_tokens, max_image_tokens: number of codes of an image.
        max_length: number of ids of a finished sequence, the prompt included.
    """

    def __init__(self, vocabulary: LavitVocabulary, min_image_tokens: int, max_image_tokens: int, max_length: int):
        self.vocabulary = vocabulary
        self.min_image_tokens = min_image_tokens
        self.max_image_tokens = max_image_tokens
        self.max_length = max_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        vocabulary, length = self.vocabulary, input_ids.shape[1]
        inside, opened = image_state(input_ids, vocabulary)
        count = (length - 1 - opened).unsqueeze(1)
        ids = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0)
        is_code = vocabulary.is_code(ids)
        is_end = ids == vocabulary.eoi_token_id
        must_close = (count >= self.max_image_tokens) | (length + 1 >= self.max_length)
        may_close = (count >= self.min_image_tokens) | must_close
        in_image = (is_code & ~must_close) | (is_end & may_close)
        image_fits = length + 2 + max(self.min_image_tokens, 1) <= self.max_length
        in_text = ids < vocabulary.boi_token_id + int(image_fits)
        return scores.masked_fill(~torch.where(inside.unsqueeze(1), in_image, in_text), float("-inf"))


class LavitRangeLogitsProcessor(LogitsProcessor):
    """Allows the ids of some ranges alone.

    Args:
        ranges: (start, stop) of each.
    """

    supports_continuous_batching = True

    def __init__(self, *ranges: tuple[int, int]):
        self.ranges = ranges

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(scores.shape[-1], device=scores.device)
        allowed = torch.stack([(ids >= start) & (ids < stop) for start, stop in self.ranges]).any(0)
        return scores.masked_fill(~allowed, float("-inf"))
