"""Statistics of the global batch, the same on every rank; on one rank these are the plain things.

Gradients are averaged over ranks by whoever runs the training (DDP). The helpers give each rank a loss whose averaged
gradient is that of the loss of the global batch.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist


_alone = False


@contextmanager
def alone():
    """Within it a rank counts as the only one, and waits for no other."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def world_size() -> int:
    """Number of ranks."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, rank after rank, each with as many rows (M, …) as it has. No gradient."""
    if world_size() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(count) for count in counts)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_metrics(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """The values of all ranks under each name; a rank may lack some names."""
    if world_size() == 1:
        return values
    parts = [None] * world_size()
    dist.all_gather_object(parts, dict(values))
    return {
        name: [x for part in parts for x in part.get(name, [])] for name in dict.fromkeys(sum(map(list, parts), []))
    }


def global_mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of a mean over equally many samples each; its gradient is that of this rank's value."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / world_size() - value.detach())


def ragged_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's share (), with gradient, of a mean over the values of all ranks, of which each has its own number.

    The mean of the shares over ranks is the (weighted) mean of all values.

    Args:
        values: (M,).
        weights: (M,), ones by default.
    """
    weights = torch.ones_like(values) if weights is None else weights
    total = weights.sum().detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return (weights * values).sum() * world_size() / total.clamp_min(1e-9)
