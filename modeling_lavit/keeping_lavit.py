"""The keep dial: how many patches of an image become visual tokens, by number or by what they keep of it.

B images, N patches, C width of the encoder.
"""

import torch
import torch.nn.functional as F


QUALITY_BATCH = 16  # numbers of tokens that are tried at once


def keep_best(log_probs: torch.Tensor, keep: float | int | str) -> torch.Tensor:
    """The most probable patches.

    Args:
        log_probs: (B, N, 2), index 0 being "keep".
        keep: a share of the patches, above 0 and at most 1 (float); a number of patches (int); or `"threshold=0.7"`,
            the patches whose probability is at least that, and the best one in any case.

    Returns:
        (B, N) bool.

    Raises:
        ValueError: it is none of these, or out of range.
    """
    patches = log_probs.shape[1]
    if isinstance(keep, str):
        name, _, value = keep.partition("=")
        try:
            threshold = float(value) if name == "threshold" else -1.0
        except ValueError:
            threshold = -1.0
        if not 0 <= threshold <= 1:
            raise ValueError(f"keep as text is like 'threshold=0.7', with a probability, got {keep!r}")
        probability = log_probs[..., 0].exp()
        return (probability >= threshold) | first_patches(log_probs, 1)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ValueError(f"keep must be a share (float), a number of patches (int) or 'threshold=0.7', got {keep!r}")
    if isinstance(keep, int):
        if not 1 <= keep <= patches:
            raise ValueError(f"keep must be from 1 to {patches} patches, got {keep}")
        return first_patches(log_probs, keep)
    if not 0 < keep <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep}")
    return first_patches(log_probs, max(1, round(keep * patches)))


def first_patches(log_probs: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N) bool: the `count` patches of each image that the selector (B, N, 2) would rather keep."""
    scores = log_probs[..., 0] - log_probs[..., 1]
    best = scores.topk(count, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


@torch.no_grad()
def keep_for_quality(tokenizer, features: torch.Tensor, log_probs: torch.Tensor, target: float, detokenizer):
    """The fewest best patches of each image whose tokens are decoded to features close enough.

    Close is the mean cosine over patches between the encoder's features and those decoded, the one that stage 1
    trains (paper Eq. 4). It is tried with one token, two, and so on: more tokens are not always better.

    Args:
        tokenizer: a [`LavitVisualTokenizer`].
        features: (B, N, C) of its encoder.
        log_probs: (B, N, 2) of its selector.
        target: the cosine to reach.
        detokenizer: the [`LavitDetokenizer`] of the same codebook.

    Returns:
        (B, N) bool.

    Raises:
        ValueError: no detokenizer, a target that is no cosine, or one that an image reaches with no number of tokens.
    """
    if detokenizer is None:
        raise ValueError("target_quality needs the detokenizer that decodes the tokens")
    if detokenizer.device != features.device:
        raise ValueError(
            f"target_quality needs the detokenizer on {features.device}, it is on {detokenizer.device}: do not offload"
        )
    if not -1 <= target <= 1:
        raise ValueError(f"target_quality is a cosine from -1 to 1, got {target}")
    most = min(features.shape[1], detokenizer.config.num_queries)
    masks = []
    for i in range(len(features)):
        best = -2.0
        for start in range(1, most + 1, QUALITY_BATCH):
            counts = range(start, min(start + QUALITY_BATCH, most + 1))
            tried = torch.cat([first_patches(log_probs[i : i + 1], count) for count in counts])
            cosines = decoded_cosine(tokenizer, features[i : i + 1].expand(len(counts), -1, -1), tried, detokenizer)
            reached = (cosines >= target).nonzero().flatten()
            best = max(best, float(cosines.max()))
            if len(reached):
                masks.append(tried[int(reached[0])])
                break
        else:
            raise ValueError(
                f"the tokens of image {i} reach a cosine of {best:.4f} at most, target_quality is {target}"
            )
    return torch.stack(masks)


def decoded_cosine(tokenizer, features: torch.Tensor, keep_mask: torch.Tensor, detokenizer) -> torch.Tensor:
    """(B,) mean cosines over patches between features (B, N, C) and those decoded from the tokens of a mask (B, N)."""
    codes = tokenizer.quantizer(tokenizer.merger(features, keep_mask))
    decoded = detokenizer.decode(*detokenizer.pad(codes, keep_mask.sum(1)))
    return F.cosine_similarity(features.float(), decoded.float(), dim=-1).mean(1)
