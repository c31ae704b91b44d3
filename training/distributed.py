"""Statistics of the global batch, the same on every rank; on one rank these are the plain things.

Gradients are averaged over ranks by whoever runs the training (DDP). The helpers give each rank a loss whose averaged
gradient is that of the loss of the global batch.
"""

import accelerate.utils
import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started."""
    return PartialState(cpu=not torch.cuda.is_available())


def world_size() -> int:
    """Number of ranks."""
    return process_state().num_processes


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, rank after rank, each with as many rows (M, …) as it has. No gradient."""
    if world_size() == 1:
        return tensor
    counts = accelerate.utils.gather(torch.tensor([len(tensor)], device=tensor.device))
    padded = accelerate.utils.gather(accelerate.utils.pad_across_processes(tensor))
    parts = padded.split(int(counts.max()))
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def gather_dicts(values: dict) -> list[dict]:
    """The values of all ranks, rank after rank."""
    return [values] if world_size() == 1 else accelerate.utils.gather_object([values])


def global_mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of a mean over equally many samples each; its gradient is that of this rank's value."""
    if world_size() == 1:
        return value
    mean = accelerate.utils.reduce(value.detach(), "mean")
    return value + (mean - value.detach())


def ragged_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's share (), with gradient, of a mean over the values of all ranks, of which each has its own number.

    The mean of the shares over ranks is the (weighted) mean of all values.

    Args:
        values: (M,).
        weights: (M,), ones by default.
    """
    weights = torch.ones_like(values) if weights is None else weights
    total = weights.sum().detach()
    if world_size() > 1:
        total = accelerate.utils.reduce(total, "sum")
    return (weights * values).sum() * world_size() / total.clamp_min(1e-9)
