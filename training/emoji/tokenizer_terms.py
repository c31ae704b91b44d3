"""What stage 1 needs beside the paper's loss where data are few: terms by which each code tells its own patch and
where it is, by which the decoder finds codes, and by which the selector becomes decisive."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AttentionInterface

from modeling_lavit.configuration_lavit import LavitVisualTokenizerConfig
from modeling_lavit.layers_lavit import eager_attention_forward
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.training.distributed import gather, ragged_mean
from modeling_lavit.training.emoji.augmentation import patchify
from modeling_lavit.training.emoji.pretrain_encoder import ImageHeads, patch_positions
from modeling_lavit.training.train_visual_tokenizer import LossTerm, Step


# Attention of the decoder that can be looked at.
RECORDED_ATTENTION = "lavit_recorded"
# An image whose name the heads of stage 0 do not know.
IGNORED_NAME = -100


def recorded_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention that leaves its weights (B, H, R, K) at the module."""
    attended, module.recorded = eager_attention_forward(module, query, key, value, attention_mask, scaling)
    return attended, module.recorded


AttentionInterface.register(RECORDED_ATTENTION, recorded_attention_forward)


def ramped(progress: float, until: float) -> float:
    """From 0 to 1 over the share `until` of a run; 1 throughout where it is 0."""
    return min(1.0, progress / until) if until else 1.0


class FeatureScale(LossTerm):
    """Squared error of the rebuilt features: the cosine alone leaves their scale open."""

    def forward(self, step: Step, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scale": F.mse_loss(step.rebuilt, step.target)}


class LocalCodes(LossTerm):
    """Each code tells its own patch's feature and where the patch is."""

    def __init__(self, weights: dict[str, float], config: LavitVisualTokenizerConfig):
        super().__init__(weights)
        width, dim = config.hidden_size, config.codebook_dim
        self.local_head = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width + 6))
        self.register_buffer("positions", patch_positions(config))

    def forward(self, step: Step, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        local = self.local_head(step.vectors)
        positions = self.positions.expand(len(step.kept), -1, -1)[step.kept]
        targets = (step.target - step.target.mean(1, keepdim=True))[step.kept]
        return {
            "local": ragged_mean(1 - F.cosine_similarity(local[:, :-6].float(), targets, dim=-1)),
            "place": ragged_mean((local[:, -6:].float() - positions).square().mean(1)),
        }


def saliency(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Detail of each patch, (B, N): the mean gradient of its pixels. images: (B, 3, S, S) in [0, 1]."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    horizontal = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]).abs()
    vertical = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]).abs()
    return F.avg_pool2d((horizontal + vertical).mean(1, keepdim=True), patch_size).flatten(1)


class DecisiveSelector(LossTerm):
    """Starts the selector on patches with detail (`saliency`, which fades over `until` of the run) and makes it
    decisive (`entropy`)."""

    def __init__(self, weights: dict[str, float], patch_size: int, until: float):
        super().__init__(weights)
        self.patch_size, self.until = patch_size, until

    def forward(self, step: Step, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        detail = saliency(step.images, self.patch_size)
        # even patches come last to first where they tie
        detail = detail + 1e-6 * torch.linspace(0, 1, detail.shape[1], device=detail.device)
        salient = (detail > gather(detail).flatten().quantile(1 - step.keep_rate)).float()
        logit = (step.log_probs[..., 0] - step.log_probs[..., 1]).float()
        probability = step.log_probs[..., 0].exp()
        fade = 1 - ramped(step.progress, self.until)
        return {
            "saliency": F.binary_cross_entropy_with_logits(logit, salient) * fade,
            "entropy": F.binary_cross_entropy_with_logits(logit, probability),
            "decided": ((probability > 0.95) | (probability < 0.05)).float(),
        }


class FrozenHeads(LossTerm):
    """Linear pixels, name and style, read off the rebuilt features by the frozen heads of stage 0.

    Args:
        heads: of [`load_pretrained`]. known: the names that they know, in their order.
        names: of the data set.
    """

    def __init__(
        self, weights: dict[str, float], heads: ImageHeads, known: list[str], names: list[str], patch_size: int
    ):
        super().__init__(weights)
        self.heads, self.patch_size = heads, patch_size
        index = {name: i for i, name in enumerate(known)}
        self.register_buffer("names", torch.tensor([index.get(name, IGNORED_NAME) for name in names]))

    def forward(self, step: Step, name: torch.Tensor, style: torch.Tensor) -> dict[str, torch.Tensor]:
        name = self.names[name]
        name_logits, style_logits, pixels, _ = self.heads(step.rebuilt)
        known = F.cross_entropy(name_logits.float(), name, ignore_index=IGNORED_NAME, reduction="sum")
        return {
            "pixels": F.mse_loss(pixels.float(), patchify(step.images * 2 - 1, self.patch_size)),
            "name": known / len(name),
            "style": F.cross_entropy(style_logits.float(), style),
            "name_top1": (name_logits.argmax(-1) == name).float(),
            "style_top1": (style_logits.argmax(-1) == style).float(),
        }


class Lookup(LossTerm):
    """Half of the decoder's cross attention heads look at the codes near each query: mean cross entropy over layers
    and heads to the softmax of `-distance² / 2`, in patches."""

    def __init__(self, weights: dict[str, float], detokenizer: LavitDetokenizer, side: int):
        super().__init__(weights)
        self.attentions, self.side = [layer.cross_attn for layer in detokenizer.layers], side

    def forward(self, step: Step, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = step.kept.nonzero()[:, 1].float()
        patches = torch.zeros_like(step.valid, dtype=torch.float32).masked_scatter(step.valid, kept)
        places = torch.stack([patches.div(self.side, rounding_mode="floor"), patches % self.side], dim=-1)
        axis = torch.arange(self.side, dtype=torch.float32)
        queries = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).to(places.device)
        distance = torch.cdist(queries.expand(len(places), -1, -1), places).square()
        target = (-distance / 2).masked_fill(~step.valid[:, None], -torch.inf).softmax(-1)[:, None]
        losses = []
        for attention in self.attentions:
            weights = attention.recorded
            weights = weights[:, : weights.shape[1] // 2].float()
            losses.append(-(target * weights.clamp_min(1e-6).log()).sum(-1).mean())
        return {"lookup": torch.stack(losses).mean()}
