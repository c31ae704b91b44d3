"""Prompts as ragged rows: taking the padding off, filling image slots, padding again.

A slot is an adjacent `[IMG][/IMG]` pair: the place of an image that is given as pixels.
Ids, masks and positions are int64.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .vocabulary_lavit import LavitVocabulary


@dataclass
class LavitPositions:
    """Where a caller's ids stand among the positions of prompts whose slots are filled.

    A cache carries it (see [`positions_of`]), so that a conversation goes on from it in ids as the caller has them.

    Args:
        own: (B, L), the position of every id; 0 for the caller's padding.
        mask: (B, P), the attention mask of the filled prompts.
    """

    own: torch.Tensor
    mask: torch.Tensor

    def resized(self, length: int) -> "LavitPositions":
        """With the ids that were written behind, one position each, up to `length` positions; or without those that
        were cut off again.

        Raises:
            ValueError: the cache was cut within an image, or not between the same ids in all rows.
        """
        if length < self.mask.shape[1]:
            kept = (self.own < length).sum(1)
            last = self.own.gather(1, (kept - 1).clamp_min(0).unsqueeze(1))
            if not bool((kept == kept[0]).all() and (last == length - 1).all()):
                raise ValueError(
                    f"the cache was cut to {length} positions, within an image: cut it behind an id, or start again"
                )
            return LavitPositions(self.own[:, : int(kept[0])], self.mask[:, :length])
        further = torch.arange(self.mask.shape[1], length, device=self.own.device).expand(len(self.own), -1)
        return LavitPositions(
            torch.cat([self.own, further], dim=1), torch.cat([self.mask, torch.ones_like(further)], dim=1)
        )

    def repeated(self, rows: int) -> "LavitPositions":
        """For a cache of several rows a prompt."""
        repeats = rows // len(self.own)
        return LavitPositions(self.own.repeat_interleave(repeats, 0), self.mask.repeat_interleave(repeats, 0))


def positions_of(cache) -> LavitPositions | None:
    """What a filled cache knows of its ids; None where every id took one position."""
    positions = getattr(cache, "lavit_positions", None)
    if positions is None:
        return None
    rows = next(len(layer.keys) for layer in cache.layers if getattr(layer, "keys", None) is not None)
    return positions.resized(cache.get_seq_length()).repeated(rows)


def tell_positions(cache: Any, positions: LavitPositions | None) -> None:
    """Leaves with a cache what [`positions_of`] reads."""
    cache.lavit_positions = positions


def locate(
    rows: list[torch.Tensor], slots: list[list[int]], lengths: list[int], attention_mask: torch.Tensor, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ids stand once their slots are filled and the rows padded again.

    Args:
        rows: prompts without padding. slots: of [`find_slots`]. lengths: of what fills each slot, in reading order.
        attention_mask: (B, L) of the prompts as they were given.
        side: on which the filled rows are padded.

    Returns:
        own (B, L): the position of every id, 0 for padding; and speaks (B, L): the position whose output is the
        prediction of what follows the id: its own, but for a slot's `[IMG]`, which the end of the image speaks for.
    """
    remaining = iter(lengths)
    moved, ends = [], []
    for row, starts in zip(rows, slots, strict=True):
        own = torch.arange(len(row), device=row.device)
        end = own.clone()
        for start in starts:
            own[start + 1 :] += next(remaining)
        for start in starts:
            end[start] = own[start + 1] - 1
        is_opening = torch.zeros_like(own, dtype=torch.bool)
        is_opening[starts] = True
        moved.append(own)
        ends.append(torch.where(is_opening, end, own))
    longest = max(int(own[-1]) + 1 if len(own) else 0 for own in moved)
    positions = []
    for values in (moved, ends):
        placed = torch.zeros_like(attention_mask, dtype=torch.long)
        shifts = [longest - int(own[-1]) - 1 if side == "left" and len(own) else 0 for own in moved]
        placed[attention_mask.bool()] = torch.cat([v + shift for v, shift in zip(values, shifts, strict=True)])
        positions.append(placed)
    return positions[0], positions[1]


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


def check_slots(slots: list[list[int]], num_images: int) -> None:
    """Raises ValueError unless there are as many slots as images."""
    num_slots = sum(len(starts) for starts in slots)
    if num_slots != num_images:
        raise ValueError(
            f"the prompts have {num_slots} image slots ([IMG][/IMG], written <image>), "
            f"but pixel_values has {num_images} images: every image has one slot, which no truncation may cut"
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


def check_ids_and_mask(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, vocab_size: int, has_cache: bool = False
) -> None:
    """Raises ValueError where ids are none of the vocabulary's, or a 2-D mask is not of their shape; with a cache it
    may have more columns."""
    if input_ids is None or torch.compiler.is_compiling() or input_ids.is_meta:
        return
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be (batch, length) integers, got {tuple(input_ids.shape)} {input_ids.dtype}")
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(
            f"input_ids go from {int(input_ids.min())} to {int(input_ids.max())}, the vocabulary from 0 to "
            f"{vocab_size - 1}"
        )
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return
    further = attention_mask.shape[1] - input_ids.shape[1]
    if len(attention_mask) != len(input_ids) or further < 0 or (further and not has_cache):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, but input_ids are {tuple(input_ids.shape)}: "
            "it needs a row for each prompt and a column for each id"
        )


@dataclass
class LavitInputs:
    """Prompts whose slots are filled, see [`LavitModel.expand_inputs`]; P positions.

    Args:
        input_ids: (B, P). Image features have no id: code 0 stands in for them.
        inputs_embeds: (B, P, E).
        attention_mask: (B, P), 0 on padding.
        labels: (B, P) or None; -100 on image features and padding.
        is_feature: (B, P) bool, where the image features are.
        positions: where the ids of the prompts as they were given stand.
        speaks: (B, L), the position that predicts what follows each of these ids: its own, but for a slot's `[IMG]`,
            which the last feature of its image speaks for.
    """

    input_ids: torch.Tensor
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None
    is_feature: torch.Tensor
    positions: LavitPositions
    speaks: torch.Tensor
