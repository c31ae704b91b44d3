"""What every id of the language model means: the one home of ids, and of the mappings between ids and codes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LavitVocabulary:
    """What every id of the language model means: `text < [IMG] < [/IMG] < codes`.

    Args:
        text_vocab_size: number of text ids; `[IMG]` and `[/IMG]` follow right above them.
        codebook_size: number of codes; code `k` has the id `visual_offset + k`.
    """

    text_vocab_size: int
    codebook_size: int

    @property
    def boi_token_id(self) -> int:
        """Id of `[IMG]`."""
        return self.text_vocab_size

    @property
    def eoi_token_id(self) -> int:
        """Id of `[/IMG]`."""
        return self.text_vocab_size + 1

    @property
    def visual_offset(self) -> int:
        """Id of code 0."""
        return self.text_vocab_size + 2

    @property
    def size(self) -> int:
        """Number of ids in all."""
        return self.visual_offset + self.codebook_size

    def is_code(self, ids):
        """Whether ids are codes of images: of a number a bool, of a tensor a bool tensor of its shape."""
        if isinstance(ids, torch.Tensor):
            return (ids >= self.visual_offset) & (ids < self.size)
        return self.visual_offset <= ids < self.size

    def ids_of(self, codes):
        """Codes, counted from 0, to ids; a number or an integer tensor of any shape.

        Raises:
            ValueError: there are other codes among them than the codebook has.
        """
        self._check(codes, 0, self.codebook_size, "codes")
        return codes + self.visual_offset

    def codes_of(self, ids):
        """Ids to codes, counted from 0; a number or an integer tensor of any shape.

        Raises:
            ValueError: there are ids among them that are no codes.
        """
        self._check(ids, self.visual_offset, self.size, "ids of codes")
        return ids - self.visual_offset

    @staticmethod
    def _check(values, start: int, stop: int, name: str) -> None:
        if isinstance(values, torch.Tensor):
            if torch.compiler.is_compiling() or values.device.type == "meta" or not values.numel():
                return
            low, high = int(values.min()), int(values.max())
        else:
            low = high = values
        if low < start or high >= stop:
            raise ValueError(f"{name} go from {start} to {stop - 1}, got {low} to {high}")
