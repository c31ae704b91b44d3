"""Prompts as ragged rows: taking the padding off, filling image slots, padding again.

A slot is an adjacent `[IMG][/IMG]` pair: the place of an image that is given as pixels.
"""

import torch

from .vocabulary_lavit import LavitVocabulary


def unpad(values: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows of (B, L) without the masked positions, wherever those are."""
    if attention_mask is None:
        return list(values)
    return [row[mask] for row, mask in zip(values, attention_mask.bool(), strict=True)]


def pad(rows: list[torch.Tensor], value: int | float, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to (B, longest) padded on `side` ("left" or "right"), and the attention mask of that."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    ones = [row.new_ones(row.shape[0], dtype=torch.long) for row in rows]
    return padded, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def find_slots(rows: list[torch.Tensor], vocabulary: LavitVocabulary) -> list[list[int]]:
    """Per row, the indices of `[IMG]` ids that `[/IMG]` follows at once."""
    is_slot = [(row[:-1] == vocabulary.boi_token_id) & (row[1:] == vocabulary.eoi_token_id) for row in rows]
    return [found.nonzero().flatten().tolist() for found in is_slot]


def check_slots(slots: list[list[int]], num_pictures: int) -> None:
    """Raises ValueError unless there are as many slots as pictures."""
    num_slots = sum(len(starts) for starts in slots)
    if num_slots != num_pictures:
        raise ValueError(
            f"the prompts have {num_slots} picture slots ([IMG][/IMG], written <image>), "
            f"but pixel_values has {num_pictures} pictures"
        )


def fill_slots(
    rows: list[torch.Tensor], slots: list[list[int]], fills: list[torch.Tensor], keep_brackets: bool = True
) -> list[torch.Tensor]:
    """Puts `fills`, in reading order over the batch, into the slots of `rows`; the rows get longer.

    With `keep_brackets=False` a fill replaces `[IMG][/IMG]`, else it stands between them.
    """
    remaining = iter(fills)
    filled = []
    for row, starts in zip(rows, slots, strict=True):
        pieces, done = [], 0
        for start in starts:
            before, behind = (start + 1, start + 1) if keep_brackets else (start, start + 2)
            pieces += [row[done:before], next(remaining)]
            done = behind
        filled.append(torch.cat([*pieces, row[done:]]))
    return filled
