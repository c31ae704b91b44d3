"""The codebook's own learning: k-means start, exponential moving averages, reset of dead codes (authors, issues 10 and
29). Every rank sees the vectors of all ranks, in the order of the global batch, and does the same.

Own code: neither torch nor accelerate has a quantizer.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from modeling_lavit.training.distributed import gather


# Similarities that are computed at once, 64 MB in float32: the paper's start would have 16,384 x 65,536 of them.
CHUNK = 2**24


def nearest(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The centre (K, D) with the largest inner product for each vector (M, D), (M,)."""
    parts = vectors.split(max(1, CHUNK // len(centres)))
    return torch.cat([(part @ centres.T).argmax(1) for part in parts])


def kmeans(
    vectors: torch.Tensor, num_codes: int, iterations: int = 10, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Spherical k-means of unit vectors (M, D), M ≥ num_codes, to centres (num_codes, D)."""
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:num_codes]]
    for _ in range(iterations):
        assigned = nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, assigned, vectors)
        empty = torch.bincount(assigned, minlength=num_codes) == 0
        sums[empty] = vectors[torch.randint(len(vectors), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=-1)
    return centres


class EMACodebook(nn.Module):
    """Keeps the statistics by which a codebook (K, D) of unit vectors follows the vectors that choose it.

    Args:
        num_codes, dim: of the codebook.
        decay: of the moving averages, an optimizer step.
        reset_below: a code chosen less often than this share of the mean is put on a vector of the batch.
    """

    def __init__(self, num_codes: int, dim: int, decay: float, reset_below: float):
        super().__init__()
        self.decay, self.reset_below = decay, reset_below
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))
        self.register_buffer("recent", torch.zeros(4 * num_codes, dim))
        self.register_buffer("seen", torch.tensor(0))
        self.chosen = []  # vectors and their codes since the last update, one pair a forward

    @torch.no_grad()
    def remember(self, vectors: torch.Tensor) -> None:
        """Keeps the last vectors (M, D), on each rank its own, of all ranks: what the codebook starts from."""
        vectors = gather(vectors)
        self.recent.copy_(torch.cat([self.recent, vectors])[-len(self.recent) :])
        self.seen += len(vectors)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def start(self, codebook: torch.Tensor) -> None:
        """Puts the codebook on the k-means centres of the vectors remembered.

        Raises:
            ValueError: there are fewer vectors than codes.
        """
        vectors = self.recent[-min(int(self.seen), len(self.recent)) :]
        if self.seen < len(codebook):
            raise ValueError(
                f"the codebook has {len(codebook)} codes, but the batches before quantization gave only "
                f"{int(self.seen)} vectors to start it from: raise quantize_from or the batch, or lower codebook_size"
            )
        codebook.copy_(kmeans(vectors, len(codebook), generator=torch.Generator().manual_seed(0)))
        counts = torch.bincount(nearest(vectors, codebook), minlength=len(codebook)).float().clamp_min(1)
        self.counts.copy_(counts)
        self.counts.mul_(1 / self.counts.mean())
        self.sums.copy_(codebook * self.counts[:, None])
        self.started.fill_(True)

    def follow(self, codebook: torch.Tensor) -> None:
        """Goes on from a codebook that was trained before, (K, D) unit vectors."""
        self.sums.copy_(codebook)
        self.started.fill_(True)

    def note(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """Notes the vectors (M, D) of a forward and the codes (M,) they chose, on each rank its own."""
        self.chosen.append((vectors.detach(), codes))

    @torch.no_grad()
    def update(self, codebook: torch.Tensor) -> None:
        """Moves the codebook by what was noted since the last update: once an optimizer step, however many forwards
        it has."""
        if not self.chosen:
            return
        vectors, codes = (gather(torch.cat(parts)) for parts in zip(*self.chosen, strict=True))
        self.chosen = []
        self.updates += 1
        scale = len(codebook) / len(vectors)
        counts = torch.bincount(codes, minlength=len(codebook)).float() * scale
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors) * scale
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.counts < self.reset_below
        generator = torch.Generator().manual_seed(int(self.updates))
        self.sums[dead] = vectors[torch.randint(len(vectors), (int(dead.sum()),), generator=generator)]
        self.counts[dead] = 1.0
        codebook.copy_(F.normalize(self.sums, dim=-1))

    def perplexity(self) -> torch.Tensor:
        """Perplexity of the codes' moving frequencies."""
        share = self.counts / self.counts.sum()
        return (-(share * share.clamp_min(1e-9).log()).sum()).exp()
