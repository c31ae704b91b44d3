"""How well images fit texts by a CLIP of transformers: the CLIP score, and the choice among candidates."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor


class ClipScorer:
    """Scores pairs of images and texts; also the `reranker` of [`LavitPipeline`].

    Args:
        model: with `get_image_features` and `get_text_features`, such as `CLIPModel`.
        processor: of that model.
        name: what results call it.
    """

    def __init__(self, model, processor, name: str = "clip"):
        self.model, self.processor, self.name = model.eval(), processor, name

    @classmethod
    def from_pretrained(cls, source: str, device: str | torch.device = "cpu") -> "ClipScorer":
        """Loads a folder or repository of transformers.

        Raises:
            ValueError: it is no CLIP.
            OSError: it cannot be loaded.
        """
        model = AutoModel.from_pretrained(source).to(device)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(f"{source} is no CLIP: {type(model).__name__} has no features of images and texts")
        return cls(model, AutoProcessor.from_pretrained(source), str(source))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """The CLIP score of each pair, max(100 cos, 0), (B,) float32, as torchmetrics has it.

        Args:
            images, texts: as many of each; texts are cut at the length that the model takes.
        """
        inputs = self.processor(
            images=[image.convert("RGB") for image in images],
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(self.model.device)
        seen = _features(self.model.get_image_features(pixel_values=inputs["pixel_values"]))
        read = _features(
            self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        )
        return (100 * F.cosine_similarity(seen.float(), read.float())).clamp_min(0).cpu()


def _features(output) -> torch.Tensor:
    # transformers 5 gives an output object whose pooled entry is the projection
    return output if isinstance(output, torch.Tensor) else output.pooler_output
