"""Stage 1: selector, merger, quantizer and the decoder that proves them (paper section 3.1, Eq. 1-4).

The encoder is frozen. Loss: `1 - cos` between the encoder's features and those that the decoder rebuilds from the
kept tokens, plus `rate_weight · (keep_rate - mean keep)²`; first without quantization, then with it (EMA codebook
started by k-means). Around it stand the terms that a small data set needs, each with its weight in the recipe, 0 for
the paper's loss: linear pixels, name and style read off the rebuilt features by the frozen heads of stage 0; a local
term, by which each code must tell its own patch and place; a lookup term, by which some heads of the decoder learn to
find the codes of near patches; and a saliency term, which starts the selector on patches with detail and makes it
decisive.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AttentionInterface

from ..configuration_lavit import LavitDetokenizerConfig, LavitVisualTokenizerConfig
from ..layers_lavit import eager_attention_forward
from ..modeling_lavit_detokenizer import LavitDetokenizer
from ..modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .codebook import EMACodebook
from .data import PictureDataset, SampleNoise, augment, load_pictures, normalize_pictures, patchify, result_of
from .distributed import gather, global_mean, ragged_mean
from .pretrain_encoder import PictureHeads, patch_places
from .tokenize_dataset import load_visual_tokenizer


# Attention of the decoder that can be looked at.
RECORDED_ATTENTION = "lavit_recorded"
# A picture whose name the heads of stage 0 do not know.
IGNORED_NAME = -100


def recorded_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention that leaves its weights (B, H, R, K) at the module."""
    attended, module.recorded = eager_attention_forward(module, query, key, value, attention_mask, scaling)
    return attended, module.recorded


AttentionInterface.register(RECORDED_ATTENTION, recorded_attention_forward)


def sinusoid(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding (M, width) of positions (M,)."""
    frequencies = 1 / 100 ** (torch.arange(width // 2) / (width // 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def ramped(progress: float, until: float) -> float:
    """From 0 to 1 over the share `until` of a run; 1 throughout where it is 0."""
    return min(1.0, progress / until) if until else 1.0


def begun(progress: float, start: float | None) -> bool:
    """Whether a run has come to the share `start` of itself; never, where it is None."""
    return start is not None and progress >= start


def saliency(pictures: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Detail of each patch, (B, N): the mean gradient of its pixels. pictures: (B, 3, S, S) in [0, 1]."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    horizontal = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]).abs()
    vertical = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]).abs()
    return F.avg_pool2d((horizontal + vertical).mean(1, keepdim=True), patch_size).flatten(1)


class VisualTokenizerTraining(nn.Module):
    """Tokenizer, decoder and heads with the losses of stage 1."""

    def __init__(
        self,
        tokenizer: LavitVisualTokenizer,
        detokenizer: LavitDetokenizer,
        heads: PictureHeads | None,
        names: torch.Tensor | None,
        recipe: dict,
    ):
        super().__init__()
        self.recipe = recipe["objective"]
        self.augmentation = recipe["augmentation"]
        self.tokenizer, self.detokenizer, self.heads = tokenizer, detokenizer, heads
        config = tokenizer.config
        self.config = config
        self.tokenizer.encoder.requires_grad_(False)
        self.tokenizer.quantizer.codebook.requires_grad_(False)
        self.detokenizer.codebook.requires_grad_(False)
        if heads is not None:
            self.heads.requires_grad_(False)
        width, dim = config.hidden_size, config.codebook_dim
        self.local_head = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width + 6))
        self.codebook = EMACodebook(
            config.codebook_size, dim, self.recipe["codebook_decay"], self.recipe["revive_below"]
        )
        self.register_buffer("names", names)
        self.register_buffer("places", patch_places(config))

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Called by the trainer where its arguments ask for it."""
        self.detokenizer.gradient_checkpointing_enable(**kwargs)

    def train(self, mode: bool = True):
        super().train(mode)
        self.tokenizer.encoder.eval()  # frozen, its statistics too
        return self

    def init_positions(self) -> None:
        """Sinusoidal start of the decoder's query and order embeddings (small-normal ones take long to be used)."""
        config = self.tokenizer.config
        side = config.image_size // config.patch_size
        rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        width = config.hidden_size // 2
        grid = torch.cat([sinusoid(rows.float(), width), sinusoid(columns.float(), width)], dim=-1)
        order = sinusoid(torch.arange(side * side).float() / 2, config.hidden_size)
        with torch.no_grad():
            self.detokenizer.query_embedding.copy_(0.7 * grid[None])
            self.detokenizer.position_embedding.copy_(0.5 * order[None])

    def keep_rate(self, progress: float) -> float:
        """The target share of kept patches: linear from `keep_start` to `keep_rate` over `keep_ramp` of the run."""
        ramp = ramped(progress, self.recipe["keep_ramp"])
        return self.recipe["keep_start"] + ramp * (self.recipe["keep_rate"] - self.recipe["keep_start"])

    def lookup_loss(self, places: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """How far half of the decoder's cross attention heads are from looking at the codes near each query.

        Args:
            places: (B, n, 2) rows and columns of the kept patches, in patches.
            valid: (B, n), false at padding.

        Returns:
            () mean cross entropy over layers and heads to the softmax of `-distance² / 2`.
        """
        side = self.config.image_size // self.config.patch_size
        axis = torch.arange(side, dtype=torch.float32)
        queries = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).to(places.device)
        distance = torch.cdist(queries.expand(len(places), -1, -1), places).square()
        target = (-distance / 2).masked_fill(~valid[:, None], -torch.inf).softmax(-1)[:, None]
        losses = []
        for layer in self.detokenizer.layers:
            weights = layer.cross_attn.recorded
            weights = weights[:, : weights.shape[1] // 2].float()
            losses.append(-(target * weights.clamp_min(1e-6).log()).sum(-1).mean())
        return torch.stack(losses).mean()

    def quantize(self, projected: torch.Tensor, progress: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unit vectors (M, D) to what the decoder sees and the codes; both phases of the recipe."""
        codebook = self.tokenizer.quantizer.codebook.weight
        if not begun(progress, self.recipe["quantize_from"]):
            self.codebook.remember(projected.detach())
            return projected, None
        if not self.codebook.started:
            self.codebook.remember(projected.detach())
            self.codebook.start(codebook)
        codes = self.tokenizer.quantizer.nearest(projected)
        quantized = codebook[codes].clone()
        if self.training:
            self.codebook.update(projected.detach(), codes, codebook)
        return projected + (quantized - projected).detach(), codes

    def choose(self, log_probs: torch.Tensor, noise: SampleNoise | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B, N, 2) to the patches that are kept, (B, N) ones and zeros, and the same with the
        gradient of the Gumbel-softmax (straight-through); in evaluation the more probable choice, without noise."""
        if self.config.selection == "all":
            hard = torch.ones_like(log_probs[..., 0])
            return hard, hard
        if self.training:
            uniform = noise.uniform(*log_probs.shape[1:]).clamp_min(1e-10)
            soft = (log_probs - (-uniform.log()).log()).softmax(-1)[..., 0]
        else:
            soft = log_probs[..., 0].exp()
        hard = (soft >= 0.5).float()
        hard = torch.maximum(hard, F.one_hot(soft.argmax(1), hard.shape[1]).float())
        return hard, hard - soft.detach() + soft

    def forward(self, pictures, name=None, style=None, noise: SampleNoise | None = None, progress: float = 1.0):
        weights = self.recipe["weights"]
        pictures = pictures.float() / 255
        if self.training:
            pictures = augment(pictures, noise, **self.augmentation)
        with torch.no_grad():
            features = self.tokenizer.encode_patches(normalize_pictures(pictures)).float()
            target = F.layer_norm(features, features.shape[-1:])
        log_probs = self.tokenizer.selector(features)
        if self.config.selection == "all" or begun(progress, self.recipe["freeze_selector_from"]):
            log_probs = log_probs.detach()
        hard, mask = self.choose(log_probs, noise)
        merged = self.tokenizer.merger(features, mask)
        projected = F.normalize(self.tokenizer.quantizer.project(merged).float(), dim=-1)
        vectors, codes = self.quantize(projected, progress)

        lengths = hard.sum(1).long()
        valid = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        padded = vectors.new_zeros(*valid.shape, vectors.shape[-1]).index_put((valid,), vectors)
        rebuilt = self.detokenizer.decode(padded, valid).float()

        keep_rate = self.keep_rate(progress)
        detail = saliency(pictures, self.config.patch_size)
        # even patches come last to first where they tie
        detail = detail + 1e-6 * torch.linspace(0, 1, detail.shape[1], device=detail.device)
        salient = (detail > gather(detail).flatten().quantile(1 - keep_rate)).float()
        keep_logit = (log_probs[..., 0] - log_probs[..., 1]).float()
        probability = log_probs[..., 0].exp()
        local = self.local_head(vectors)
        kept = hard.bool()
        kept_places = self.places.expand(len(kept), -1, -1)[kept]
        patch_targets = (target - target.mean(1, keepdim=True))[kept]
        terms = {
            "cosine": (1 - F.cosine_similarity(rebuilt, target, dim=-1)).mean(),
            "scale": F.mse_loss(rebuilt, target),
            "rate": (global_mean(probability.mean()) - keep_rate).square(),
            "local": ragged_mean(1 - F.cosine_similarity(local[:, :-6].float(), patch_targets, dim=-1)),
            "place": ragged_mean((local[:, -6:].float() - kept_places).square().mean(1)),
            "saliency": F.binary_cross_entropy_with_logits(keep_logit, salient),
            "entropy": F.binary_cross_entropy_with_logits(keep_logit, probability),
        }
        metrics = {}
        if self.heads is not None:
            name = self.names[name]
            name_logits, style_logits, pixels, _ = self.heads(rebuilt)
            known = F.cross_entropy(name_logits.float(), name, ignore_index=IGNORED_NAME, reduction="sum")
            terms |= {
                "pixels": F.mse_loss(pixels.float(), patchify(pictures * 2 - 1, self.config.patch_size)),
                "name": known / len(name),
                "style": F.cross_entropy(style_logits.float(), style),
            }
            metrics["name_top1"] = (name_logits.argmax(-1) == name).float().mean()
        if weights["lookup"]:
            side = self.config.image_size // self.config.patch_size
            patches = torch.zeros_like(valid, dtype=torch.float32).masked_scatter(valid, hard.nonzero()[:, 1].float())
            places = torch.stack([patches.div(side, rounding_mode="floor"), patches % side], dim=-1)
            terms["lookup"] = self.lookup_loss(places, valid)
        metrics |= {key: value.detach() for key, value in terms.items()}
        terms["saliency"] = terms["saliency"] * (1 - ramped(progress, self.recipe["saliency_until"]))
        terms["rate"] = terms["rate"] * ramped(progress, self.recipe["rate_ramp"])
        if codes is not None:
            terms["commitment"] = ragged_mean((projected - vectors.detach()).square().sum(1))
            pictures_of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
            used = torch.stack([pictures_of, codes], dim=1).unique(dim=0)[:, 0]
            distinct = used.bincount(minlength=len(lengths)) / lengths
            metrics |= {
                "commitment": terms["commitment"].detach(),
                "perplexity": self.codebook.perplexity(),
                "codes_used": (self.codebook.counts >= self.codebook.revive_below).float().mean(),
                "distinct": distinct.mean(),
            }
        metrics |= {
            "kept": lengths.float().mean(),
            "kept_std": lengths.float().std(),
            "argmax_kept": (keep_logit >= 0).float().sum(1).mean(),
            "decided": ((probability > 0.95) | (probability < 0.05)).float().mean(),
            "detail_correlation": torch.corrcoef(torch.stack([lengths.float(), detail.mean(1)]))[0, 1],
        }
        loss = sum(weights[key] * value for key, value in terms.items())
        return {"loss": loss, "metrics": {key: value for key, value in metrics.items() if value.isfinite()}}


def load_encoder(
    folder: Path, tokenizer: LavitVisualTokenizer, styles: list[str] | None
) -> tuple[PictureHeads | None, list[str]]:
    """Loads the encoder of `tokenizer` from a result of stage 0, whose heads and their names it returns, or from a
    LaVIT checkpoint or its visual tokenizer, which have none.

    Args:
        styles: those of the data; None for pictures without.

    Raises:
        ValueError: the encoder has another size, or was trained with other styles.
        OSError: nothing of either kind is in the folder.
    """
    result_of("encoder", folder, ".")
    heads, names = None, []
    if (folder / "labels.json").is_file():
        pretrained = load_file(folder / "model.safetensors")
        labels = json.loads((folder / "labels.json").read_text())
        if styles is not None:
            if labels["styles"] != styles:
                raise ValueError(f"{folder} was trained with the styles {labels['styles']}, the data have {styles}")
            names = labels["names"]
            heads = PictureHeads(tokenizer.config, names, len(styles))
            heads.load_state_dict(with_prefix(pretrained, "heads."))
        pretrained = with_prefix(pretrained, "encoder.")
    else:
        pretrained = load_visual_tokenizer(str(folder), torch.float32)[0].encoder.state_dict()
    own = tokenizer.encoder.state_dict()
    wrong = sorted(key for key in own if key not in pretrained or pretrained[key].shape != own[key].shape)
    if wrong:
        raise ValueError(
            f"the encoder in {folder} does not have the recipe's size; the first that differs: {wrong[0]}"
        )
    tokenizer.encoder.load_state_dict(pretrained)
    return heads, names


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose key starts with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def build(recipe: dict):
    config = LavitVisualTokenizerConfig(**recipe["model"])
    weights = recipe["objective"]["weights"]
    dataset = load_pictures(recipe["data"], config.image_size)
    tokenizer = LavitVisualTokenizer._from_config(config, attn_implementation="eager")
    detokenizer = LavitDetokenizer._from_config(
        LavitDetokenizerConfig(**recipe["detokenizer"]),
        attn_implementation=RECORDED_ATTENTION if weights["lookup"] else "eager",
    )
    heads, known = load_encoder(Path(recipe["encoder"]), tokenizer, getattr(dataset, "styles", None))
    names = None
    if heads is None:
        for term in ("pixels", "name", "style"):
            if weights[term]:
                raise ValueError(
                    f"objective.weights.{term} must be 0: it needs an encoder of stage 0, and named pictures"
                )
    else:
        index = {name: i for i, name in enumerate(known)}
        names = torch.tensor([index.get(name, IGNORED_NAME) for name in dataset.names])
    model = VisualTokenizerTraining(tokenizer, detokenizer, heads, names, recipe)
    model.init_positions()
    if recipe["start"]:  # another encoder may stand under what was trained
        start = Path(recipe["start"])
        trained = LavitVisualTokenizer.from_pretrained(start / "visual_tokenizer").state_dict()
        trained = {key: value for key, value in trained.items() if not key.startswith("encoder.")}
        tokenizer.load_state_dict(trained, strict=False)
        detokenizer.load_state_dict(LavitDetokenizer.from_pretrained(start / "detokenizer").state_dict())
        if begun(0.0, recipe["objective"]["quantize_from"]):
            model.codebook.follow(tokenizer.quantizer.codebook.weight)
    return model, dataset, []


@torch.no_grad()
def finish(model: VisualTokenizerTraining, dataset, recipe: dict, output: Path) -> None:
    """Writes tokenizer and detokenizer, and prints the metrics of both splits under deterministic selection."""
    model.detokenizer.codebook.weight.copy_(model.tokenizer.quantizer.codebook.weight)
    model.tokenizer.save_pretrained(output / "visual_tokenizer")
    model.detokenizer.save_pretrained(output / "detokenizer")
    if not isinstance(dataset, PictureDataset):
        return
    model.eval()
    for split in ("train", "held_out"):
        pictures = PictureDataset(recipe["data"]["folder"], model.config.image_size, (split,))
        totals = {}
        rows = pictures.spread(400)
        for part in rows.split(64):
            batch = (pictures.pictures[part], pictures.name[part], pictures.style[part])
            for key, value in model(*batch)["metrics"].items():
                totals[key] = totals.get(key, 0.0) + float(value) * len(part) / len(rows)
        print(split, {key: round(value, 4) for key, value in totals.items()})
