"""Several drawings for each image that is asked for, of which a reranker such as a CLIP keeps the best."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from .checks_lavit import check_count
from .prompts_lavit import Part
from .visual_tokens_lavit import LavitVisualTokens


# images and the texts they were drawn from -> a score for each pair, the higher the better
Reranker = Callable[[list[Image.Image], list[str]], Any]


def check_candidates(num_candidates: int, reranker: Reranker | None, prompt: Any, output_type: str) -> None:
    """Raises ValueError unless there is something to choose among and to choose by."""
    check_count("num_candidates", num_candidates)
    if (num_candidates == 1) != (reranker is None):
        raise ValueError("a reranker chooses among candidates: give reranker and a num_candidates above 1, or neither")
    if reranker is not None and (prompt is None or output_type != "pil"):
        raise ValueError('a reranker compares images with their prompt: give a prompt, and leave output_type "pil"')


def keep_best_candidates(
    reranker: Reranker,
    num_candidates: int,
    prompts: list[list[Part]],
    images: list[Image.Image],
    visual_tokens: LavitVisualTokens,
    flags: list[bool] | None,
) -> tuple[list[Image.Image], LavitVisualTokens, list[bool] | None]:
    """The best of each `num_candidates` images in a row, with their visual tokens and flags.

    Raises:
        ValueError: the reranker gave another number of scores than there are images.
    """
    per_prompt = len(images) // len(prompts)
    texts = [" ".join(part for part in parts if isinstance(part, str)) for parts in prompts for _ in range(per_prompt)]
    scores = torch.as_tensor(reranker(images, texts), dtype=torch.float32)
    if scores.shape != (len(images),):
        raise ValueError(f"the reranker gave scores of shape {tuple(scores.shape)} for {len(images)} images")
    best = scores.view(-1, num_candidates).argmax(1).tolist()
    kept = [i * num_candidates + candidate for i, candidate in enumerate(best)]
    codes = visual_tokens.split()
    tokens = LavitVisualTokens.join([codes[i] for i in kept])
    return [images[i] for i in kept], tokens, None if flags is None else [flags[i] for i in kept]
