"""Images that a model knows as codes, and how they say what may come next: retrieval-based speculative decoding
(arXiv 2311.08252)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from .loading_lavit import fetched


DRAFTS_FILE = "draft_codes.safetensors"
END = -1  # behind the codes of every image
LOOKED_AT = 16  # so many codes of what is written are compared


def join_codes(images: list[torch.Tensor]) -> torch.Tensor:
    """The codes (n,) of images in one line (N,) int16, each with [`END`] behind it."""
    return torch.cat([F.pad(codes.to("cpu", torch.int16), (0, 1), value=END) for codes in images])


class LavitDraftIndex:
    """Finds where in known images the codes stand that were written last, and what came then.

    Args:
        known: (N,) of [`join_codes`].
    """

    def __init__(self, known: torch.Tensor):
        # something stands before the first
        self.codes = F.pad(known.long().cpu(), (LOOKED_AT, 0), value=END)
        pairs = self._pair(self.codes[:-2], self.codes[1:-1])
        self.pairs, self.order = pairs.sort(stable=True)

    @staticmethod
    def _pair(first, second):
        return first * 2**16 + second

    def continuation(self, written: list[int], count: int) -> list[int]:
        """The codes, `count` at most, that came behind the longest end of `written` that is known; [`END`] comes last.

        Args:
            written: codes of the image so far. Fewer than two, or two that never stood side by side: none come.
        """
        if len(written) < 2 or count < 1:
            return []
        pair = torch.tensor(self._pair(*written[-2:]))
        first, last = (int(torch.searchsorted(self.pairs, pair, right=right)) for right in (False, True))
        if first == last:
            return []
        next_ones = self.order[first:last] + 2
        recent = torch.tensor(written[-LOOKED_AT:]).flip(0)
        before = self.codes[next_ones[:, None] - torch.arange(1, len(recent) + 1)]
        best = (before == recent).long().cumprod(1).sum(1).argmax()
        found = self.codes[next_ones[best] :][:count].tolist()
        return found[: found.index(END) + 1] if END in found else found


class LavitDraftMixin(PreTrainedModel if TYPE_CHECKING else object):
    """The images that a model knows as codes. They lie beside its weights, in a file of their own."""

    _chosen: Callable[[GenerationConfig, str], Any]
    draft_codes: torch.Tensor | None = None
    _draft_index: LavitDraftIndex | None = None

    def set_draft_codes(self, images: list[torch.Tensor]) -> None:
        """Gives the model the codes of images, e.g. of those that it was trained on. [`generate`] looks up there how
        an image may go on (arXiv 2311.08252). They replace earlier ones, and are saved beside the weights, two bytes
        a code.

        Args:
            images: the codes (n,) of each image. An empty list removes those that were there.

        Raises:
            ValueError: there are other codes among them than the codebook has.
        """
        for codes in images:
            if codes.ndim != 1 or not 0 <= int(codes.min()) <= int(codes.max()) < self.config.vocabulary.codebook_size:
                raise ValueError(
                    f"images must be codes (n,) from 0 to {self.config.vocabulary.codebook_size - 1}, got {codes}"
                )
        self.draft_codes = join_codes(images) if images else None
        self._draft_index = None

    def save_draft_codes(self, folder: str | os.PathLike) -> None:
        """Writes [`DRAFTS_FILE`], or takes it away where no image is known."""
        file = Path(folder) / DRAFTS_FILE
        if self.draft_codes is None:
            file.unlink(missing_ok=True)
            return
        written = file.with_name(f".{DRAFTS_FILE}.partial")
        save_file({"codes": self.draft_codes}, written)
        os.replace(written, file)

    def load_draft_codes(self, folder_or_repo: str | os.PathLike, **hub_options) -> None:
        """Reads [`DRAFTS_FILE`] of a folder or repository, where there is one.

        Raises:
            ValueError: it holds other codes than the codebook has.
        """
        try:
            file = fetched(folder_or_repo, DRAFTS_FILE, **hub_options)
        except OSError:  # most models know none
            return
        codes = load_file(file).get("codes")
        size = self.config.vocabulary.codebook_size
        if codes is None or codes.ndim != 1 or codes.dtype != torch.int16 or not len(codes):
            raise ValueError(f"{file} holds no list of draft codes: take it away, or save the model again")
        if int(codes.min()) < END or int(codes.max()) >= size:
            raise ValueError(f"{file} has draft codes of another codebook than this one's {size}")
        self.draft_codes, self._draft_index = codes, None

    def _known_images(self) -> LavitDraftIndex | None:
        if self._draft_index is None and self.draft_codes is not None:
            self._draft_index = LavitDraftIndex(self.draft_codes)
        return self._draft_index

    def _draft_length(
        self, given: int | None, default: int, generation_mode: str, config: GenerationConfig, reference_compat: bool
    ) -> int:
        """How many codes are looked up ahead; a default gives way where it cannot be, what was asked for raises."""
        reasons = {
            f"must not be negative, got {given}": (given or 0) < 0,
            "needs generation_mode 'image' without reference_compat": generation_mode != "image" or reference_compat,
            "needs images that the model knows: give it some by set_draft_codes": self.draft_codes is None,
            "does not go with num_beams": (self._chosen(config, "num_beams") or 1) > 1,
            "needs a dynamic cache, from which codes can be taken back": (
                (self._chosen(config, "cache_implementation") or "dynamic") != "dynamic"
            ),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if given and reason:
            raise ValueError(f"draft_length {reason}")
        return 0 if reason else default if given is None else given
