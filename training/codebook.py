"""The codebook's own learning: k-means start, exponential moving averages, revival of dead codes (authors, issues
10 and 29)."""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks; the tensor itself on one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def kmeans(vectors: torch.Tensor, num_codes: int, iterations: int = 10) -> torch.Tensor:
    """Spherical k-means of unit vectors (M, D), M ≥ num_codes, to centres (num_codes, D)."""
    centres = vectors[torch.randperm(len(vectors))[:num_codes]]
    for _ in range(iterations):
        assigned = (vectors @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, assigned, vectors)
        empty = torch.bincount(assigned, minlength=num_codes) == 0
        sums[empty] = vectors[torch.randint(len(vectors), (int(empty.sum()),))]
        centres = F.normalize(sums, dim=-1)
    return centres


class EMACodebook(nn.Module):
    """Keeps the statistics by which a codebook (K, D) of unit vectors follows the vectors that choose it.

    Args:
        num_codes, dim: of the codebook.
        decay: of the moving averages.
        revive_below: a code chosen less often than this share of the mean is put on a vector of the batch.
    """

    def __init__(self, num_codes: int, dim: int, decay: float, revive_below: float):
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))

    @torch.no_grad()
    def start(self, vectors: torch.Tensor, codebook: torch.Tensor) -> None:
        """Puts the codebook on the k-means centres of `vectors` (M, D)."""
        codebook.copy_(kmeans(vectors, len(codebook)))
        assigned = (vectors @ codebook.T).argmax(1)
        self.counts.copy_(torch.bincount(assigned, minlength=len(codebook)).float().clamp_min(1))
        self.counts.mul_(1 / self.counts.mean())
        self.sums.copy_(codebook * self.counts[:, None])
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, vectors: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor) -> None:
        """Moves the codebook after a batch: vectors (M, D) and the codes (M,) they chose."""
        scale = len(codebook) / all_reduce(torch.tensor(float(len(vectors))))
        counts = all_reduce(torch.bincount(codes, minlength=len(codebook)).float()) * scale
        sums = all_reduce(torch.zeros_like(self.sums).index_add_(0, codes, vectors)) * scale
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.counts < self.revive_below
        self.sums[dead] = vectors[torch.randint(len(vectors), (int(dead.sum()),))]
        self.counts[dead] = 1.0
        codebook.copy_(F.normalize(self.sums, dim=-1))

    def perplexity(self) -> torch.Tensor:
        """Perplexity of the codes' moving frequencies."""
        share = self.counts / self.counts.sum()
        return (-(share * share.clamp_min(1e-9).log()).sum()).exp()
