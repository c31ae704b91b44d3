"""What every id of the language model means: the one home of ids, and of the mappings between ids and codes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LavitVocabulary:
    """What every id of the language model means: `text < [IMG] < [/IMG] < codes`.

    Args:
        text_vocab_size: number of text ids; `[IMG]` and `[/IMG]` follow right above them.
        codebook_size: number of codes; code `k` has the id `visual_offset + k`. None where it is not known: then
            every id from `visual_offset` on is a code.
    """

    text_vocab_size: int
    codebook_size: int | None

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
        """Number of ids in all.

        Raises:
            ValueError: the number of codes is not known.
        """
        if self.codebook_size is None:
            raise ValueError("the number of codes is not known: give codebook_size")
        return self.visual_offset + self.codebook_size

    def is_code(self, ids):
        """Whether ids are codes of images: of a number a bool, of a tensor a bool tensor of its shape."""
        if self.codebook_size is None:
            return ids >= self.visual_offset
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
        self._check(ids, self.visual_offset, None if self.codebook_size is None else self.size, "ids of codes")
        return ids - self.visual_offset

    @staticmethod
    def _check(values, start: int, stop: int | None, name: str) -> None:
        if isinstance(values, torch.Tensor):
            if torch.compiler.is_compiling() or values.device.type == "meta" or not values.numel():
                return
            low, high = int(values.min()), int(values.max())
        else:
            low = high = values
        if low < start or (stop is not None and high >= stop):
            end = "on" if stop is None else f"to {stop - 1}"
            raise ValueError(f"{name} go from {start} {end}, got {low} to {high}")
