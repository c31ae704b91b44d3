"""Packing: several documents in one row of a batch, none of which sees another."""

import torch


def pack_rows(lengths: list[int], max_length: int) -> list[list[int]]:
    """Which documents share a row: first fit, the longest first, none cut.

    Args:
        lengths: of the documents, in ids.
        max_length: of a row. A longer document has a row of its own.
    """
    rows, free = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, space in enumerate(free):
            if lengths[index] <= space:
                rows[row].append(index)
                free[row] -= lengths[index]
                break
        else:
            rows.append([index])
            free.append(max_length - lengths[index])
    return rows


def pack(
    embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, max_length: int, ignored_label: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded documents to rows of several.

    Args:
        embeds: (B, L, E). attention_mask, labels: (B, L).
        max_length: of a row, in ids.
        ignored_label: where there is no loss; the first id of a document, which nothing precedes, gets it too.

    Returns:
        embeds (R, M, E), position ids (R, M), labels (R, M), and the additive mask (R, 1, M, M) under which each
        document is causal and alone.
    """
    lengths = attention_mask.sum(1).tolist()
    rows = pack_rows(lengths, max_length)
    longest = max(sum(lengths[i] for i in row) for row in rows)
    shape = (len(rows), longest)
    packed = embeds.new_zeros(*shape, embeds.shape[-1])
    positions = torch.zeros(shape, dtype=torch.long, device=embeds.device)
    documents = torch.full(shape, -1, device=embeds.device)
    packed_labels = labels.new_full(shape, ignored_label)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            length = lengths[index]
            part = slice(start, start + length)
            packed[number, part] = embeds[index, :length]
            positions[number, part] = torch.arange(length, device=embeds.device)
            documents[number, part] = index
            packed_labels[number, part] = labels[index, :length]
            packed_labels[number, start] = ignored_label
            start += length
    alone = documents[:, :, None] == documents[:, None, :]
    allowed = alone & torch.ones(longest, longest, dtype=torch.bool, device=embeds.device).tril()
    mask = torch.zeros(allowed.shape, dtype=embeds.dtype, device=embeds.device)
    mask.masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    return packed, positions, packed_labels, mask[:, None]
