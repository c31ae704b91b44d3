"""What generated ids hold: text, codes, and images where a pixel decoder is attached."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from .visual_tokens_lavit import LavitVisualTokens


class LavitTokenOutputMixin(PreTrainedModel if TYPE_CHECKING else object):
    """Takes generated ids apart, and decodes images."""

    def split_segments(self, ids: torch.Tensor | list[int]) -> list[tuple[str, torch.Tensor]]:
        """One row of ids (L,) to its parts in order: `("text", ids)` and `("image", codes)`, 1-D, codes from 0 on.

        `[IMG]` and `[/IMG]` are left out, and so is an image without codes (a slot). Codes belong to an image even if
        no `[IMG]` precedes them, as in what `generate(generation_mode="image")` returns.
        """
        vocabulary = self.config.vocabulary
        segments: list[tuple[str, list[int]]] = []
        boundary = True
        for token in torch.as_tensor(ids).tolist():
            if token in (vocabulary.boi_token_id, vocabulary.eoi_token_id):
                boundary = True
                continue
            is_code = vocabulary.is_code(token)
            kind, value = ("image", vocabulary.codes_of(token)) if is_code else ("text", token)
            if boundary or segments[-1][0] != kind:
                segments.append((kind, []))
            segments[-1][1].append(value)
            boundary = False
        return [(kind, torch.tensor(values, dtype=torch.long)) for kind, values in segments]

    def set_pixel_decoder(self, pixel_decoder: Callable | None) -> None:
        """Attaches what turns codes into images for [`decode_image_tokens`]; nothing is loaded, None detaches.

        Args:
            pixel_decoder: a `LavitPipeline`, or a callable that takes `visual_tokens=LavitVisualTokens` and returns
                the images, or an object with them in `.images`. It is no part of the model: not saved, not moved.
        """
        self.__dict__["_pixel_decoder"] = pixel_decoder

    @torch.no_grad()
    def decode_image_tokens(self, ids: torch.Tensor) -> list:
        """What `generate(generation_mode="image")` returned, (rows, L) ids, as an image for every row.

        Everything that is no code is dropped, and so are padding and what follows `[/IMG]`. Without a pixel decoder
        ([`set_pixel_decoder`]) the codes are returned: a list of 1-D tensors.
        """
        vocabulary = self.config.vocabulary
        is_end = ids == vocabulary.eoi_token_id
        is_code = vocabulary.is_code(ids) & (is_end.cumsum(1) == 0)
        codes = [vocabulary.codes_of(row[kept]) for row, kept in zip(ids, is_code, strict=True)]
        pixel_decoder = self.__dict__.get("_pixel_decoder")
        if pixel_decoder is None:
            return codes
        tokens = LavitVisualTokens(codes=torch.cat(codes), lengths=is_code.sum(1))
        images = pixel_decoder(visual_tokens=tokens)
        return list(getattr(images, "images", images))
