"""The codebook's own learning."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from modeling_lavit.training import codebook
from modeling_lavit.training.codebook import EMACodebook, kmeans, nearest


def unit_vectors(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def started(vectors: torch.Tensor, codes: int, **settings) -> tuple[EMACodebook, torch.Tensor]:
    """Statistics and codebook on the k-means centres of vectors."""
    statistics = EMACodebook(codes, vectors.shape[1], **({"decay": 0.5, "reset_below": 0.1} | settings))
    statistics.remember(vectors)
    weights = torch.zeros(codes, vectors.shape[1])
    statistics.start(weights)
    return statistics, weights


def test_the_codebook_follows_its_vectors_and_resets_dead_codes():
    centres = unit_vectors(8, 4)
    noise = 0.02 * torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    vectors = F.normalize(centres.repeat(50, 1) + noise, dim=-1)
    found = kmeans(vectors, 8, iterations=20, generator=torch.Generator().manual_seed(0))
    assert (vectors @ found.T).amax(1).min() > 0.8

    statistics, weights = started(vectors, 8)
    only_first = vectors[nearest(vectors, weights) == 0]
    for _ in range(8):
        statistics.note(only_first, nearest(only_first, weights))
        statistics.update(weights)
    # every other code was put on a vector that does occur
    assert (weights @ only_first.T).amax(1).min() > 0.99


def test_the_codebook_moves_once_an_optimizer_step_by_all_its_forwards():
    vectors = unit_vectors(60, 4)
    (whole, one), (parts, other) = (started(vectors, 6) for _ in range(2))
    codes = nearest(vectors, one)
    whole.note(vectors, codes)
    for part in range(3):
        chosen = slice(20 * part, 20 * part + 20)
        before = other.clone()
        parts.note(vectors[chosen], codes[chosen])
        assert torch.equal(other, before)
    for statistics, weights in ((whole, one), (parts, other)):
        statistics.update(weights)
    assert int(parts.updates) == 1 and torch.equal(one, other) and torch.equal(whole.counts, parts.counts)
    parts.update(other)
    assert int(parts.updates) == 1  # nothing was noted since


class Largest(TorchFunctionMode):
    """Watches the size of everything that is computed."""

    numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_kmeans_never_holds_all_similarities(monkeypatch):
    vectors, codes = unit_vectors(3000, 8), 100
    expected = kmeans(vectors, codes, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(codebook, "CHUNK", 50_000)
    with Largest() as largest:
        found = kmeans(vectors, codes, generator=torch.Generator().manual_seed(0))
    assert largest.numel <= 50_000 < len(vectors) * codes
    torch.testing.assert_close(found, expected)
