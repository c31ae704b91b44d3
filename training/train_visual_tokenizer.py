"""Stage 1: selector, merger and quantizer, with the decoder that reconstructs features (paper section 3.1, Eq. 1-4).

The encoder is frozen. Loss: `1 - cos` between the encoder's features and those that the decoder rebuilds from the
kept tokens, plus `λ (ρ - mean keep)²`; first without quantization, then with it (EMA codebook started by k-means).

Dimension letters: B images, N patches, C width of the encoder, M kept patches of all images, n of one, D dimension of
the codebook.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from modeling_lavit.configuration_lavit import LavitDetokenizerConfig, LavitVisualTokenizerConfig
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.training.callbacks import NewPhaseCallback
from modeling_lavit.training.codebook import EMACodebook
from modeling_lavit.training.data.augmentation import SampleNoise, augment, normalize_images
from modeling_lavit.training.data.datasets import load_data
from modeling_lavit.training.distributed import global_mean, ragged_mean
from modeling_lavit.training.recipe import TokenizerRecipe
from modeling_lavit.training.results import load_visual_tokenizer, result_of
from modeling_lavit.training.stage import Parts, Stage, TrainingModel


@dataclass
class Step:
    """What a forward of stage 1 has computed, for further terms of the loss.

    Args:
        images: (B, 3, S, S) in [0, 1], augmented. target: features to rebuild (B, N, C), normalised. log_probs: of
        keeping and of dropping each patch (B, N, 2). kept: (B, N) bool. lengths: (B,). keep_rate: the share of
        patches that should be kept. vectors: what the decoder is given (M, D), unit vectors or codes. valid: where
        these are among (B, n) positions. rebuilt: features of the decoder (B, N, C). codes: (M,), None before
        quantization. progress: share of the run that is over.
    """

    images: torch.Tensor
    target: torch.Tensor
    log_probs: torch.Tensor
    kept: torch.Tensor
    lengths: torch.Tensor
    keep_rate: float
    vectors: torch.Tensor
    valid: torch.Tensor
    rebuilt: torch.Tensor
    codes: torch.Tensor | None
    progress: float


class LossTerm(nn.Module, ABC):
    """Further terms of the loss.

    Args:
        weights: of the terms, by name.
    """

    def __init__(self, weights: dict[str, float]):
        super().__init__()
        self.weights = weights

    @abstractmethod
    def forward(self, step: Step, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms (), not weighted, and further metrics; `labels`: what else the data set has of the images."""


def sinusoid(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding (M, width) of positions (M,)."""
    frequencies = 1 / 100 ** (torch.arange(width // 2) / (width // 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def begun(progress: float, start: float | None) -> bool:
    """Whether a run has come to the share `start` of itself; never, where it is None."""
    return start is not None and progress >= start


class VisualTokenizerTraining(TrainingModel):
    """Tokenizer and decoder with the loss of stage 1, and with further terms where some are given."""

    def __init__(
        self,
        tokenizer: LavitVisualTokenizer,
        detokenizer: LavitDetokenizer,
        recipe: TokenizerRecipe,
        terms: Sequence[LossTerm] = (),
    ):
        super().__init__()
        self.objective, self.augmentation = recipe.objective, recipe.augmentation.model_dump()
        self.tokenizer, self.detokenizer = tokenizer, detokenizer
        self.config = tokenizer.config
        self.tokenizer.encoder.requires_grad_(False)
        self.tokenizer.quantizer.codebook.requires_grad_(False)
        self.detokenizer.codebook.requires_grad_(False)
        self.terms = nn.ModuleList(terms)
        self.codebook = EMACodebook(
            self.config.codebook_size,
            self.config.codebook_dim,
            self.objective.codebook_decay,
            self.objective.reset_below,
        )

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Called by the trainer where its arguments ask for it."""
        self.detokenizer.gradient_checkpointing_enable(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.24

    def train(self, mode: bool = True):
        super().train(mode)
        self.tokenizer.encoder.eval()  # frozen, its statistics too
        return self

    def after_step(self) -> None:
        self.codebook.update(self.tokenizer.quantizer.codebook.weight)

    def init_positions(self) -> None:
        """Sinusoidal start of the decoder's query and order embeddings (small-normal ones take long to be used)."""
        side = self.config.image_size // self.config.patch_size
        rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        width = self.config.hidden_size // 2
        grid = torch.cat([sinusoid(rows.float(), width), sinusoid(columns.float(), width)], dim=-1)
        order = sinusoid(torch.arange(side * side).float() / 2, self.config.hidden_size)
        with torch.no_grad():
            self.detokenizer.query_embedding.copy_(0.7 * grid[None])
            self.detokenizer.position_embedding.copy_(0.5 * order[None])

    def keep_rate(self, progress: float) -> float:
        """The share of patches that should be kept (ρ)."""
        return self.objective.keep_rate

    def select(self, log_probs: torch.Tensor, noise: SampleNoise) -> tuple[torch.Tensor, torch.Tensor]:
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

    def quantize(self, projected: torch.Tensor, progress: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unit vectors (M, D) to what the decoder sees and the codes; both phases of the recipe."""
        codebook = self.tokenizer.quantizer.codebook.weight
        if self.training and not self.codebook.started:
            self.codebook.remember(projected.detach())
            if begun(progress, self.objective.quantize_from):
                self.codebook.start(codebook)
        if not self.codebook.started:
            return projected, None
        codes = self.tokenizer.quantizer.nearest(projected)
        quantized = codebook[codes].clone()
        if self.training:
            self.codebook.note(projected, codes)
        return projected + (quantized - projected).detach(), codes

    def forward(self, images: torch.Tensor, noise: SampleNoise, progress: float, **labels: torch.Tensor) -> dict:
        images = images.float() / 255
        if self.training:
            images = augment(images, noise, **self.augmentation)
        with torch.no_grad():
            features = self.tokenizer.encode_patches(normalize_images(images)).float()
            target = F.layer_norm(features, features.shape[-1:])
        log_probs = self.tokenizer.selector(features)
        if self.config.selection == "all" or begun(progress, self.objective.freeze_selector_from):
            log_probs = log_probs.detach()
        hard, mask = self.select(log_probs, noise)
        merged = self.tokenizer.merger(features, mask)
        projected = F.normalize(self.tokenizer.quantizer.project(merged).float(), dim=-1)
        vectors, codes = self.quantize(projected, progress)

        lengths = hard.sum(1).long()
        valid = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        padded = vectors.new_zeros(*valid.shape, vectors.shape[-1]).index_put((valid,), vectors)
        rebuilt = self.detokenizer.decode(padded, valid).float()

        cosine = F.cosine_similarity(rebuilt, target, dim=-1)
        keep_rate = self.keep_rate(progress)
        rate = (global_mean(log_probs[..., 0].exp().mean()) - keep_rate).square()
        loss = (1 - cosine).mean() + self.objective.rate_weight * rate
        metrics = {"cosine": cosine.mean(1), "keep_rate": lengths / hard.shape[1]}
        if codes is not None:
            commitment = ragged_mean((projected - vectors.detach()).square().sum(1))
            loss = loss + self.objective.commitment_weight * commitment
            metrics |= {"commitment": commitment} | self.code_metrics(codes, lengths)
        step = Step(
            images, target, log_probs, hard.bool(), lengths, keep_rate, vectors, valid, rebuilt, codes, progress
        )
        for term in self.terms:
            values = term(step, **labels)
            metrics |= values
            for name, weight in term.weights.items():
                loss = loss + weight * values[name]
        return {"loss": loss, "metrics": metrics}

    def code_metrics(self, codes: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """How codes (M,) of images with so many each, (B,), are used: a codebook can collapse unseen by the loss."""
        images = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        used = torch.stack([images, codes], dim=1).unique(dim=0)[:, 0]
        return {
            "perplexity": self.codebook.perplexity(),
            "codes_used": (self.codebook.counts >= self.codebook.reset_below).float().mean(),
            "distinct": used.bincount(minlength=len(lengths)) / lengths,
        }


def load_encoder(encoder: dict[str, torch.Tensor], tokenizer: LavitVisualTokenizer, name: str) -> None:
    """Loads the encoder of a tokenizer.

    Raises:
        ValueError: it has another size.
    """
    own = tokenizer.encoder.state_dict()
    wrong = sorted(key for key in own if key not in encoder or encoder[key].shape != own[key].shape)
    if wrong:
        raise ValueError(f"the encoder in {name} does not have the recipe's size; the first that differs: {wrong[0]}")
    tokenizer.encoder.load_state_dict(encoder)


def new_parts(recipe: TokenizerRecipe, detokenizer_attention: str = "eager"):
    """Visual tokenizer and detokenizer of the sizes that a recipe names, random."""
    sizes = recipe.model.model_dump(exclude_none=True), recipe.detokenizer.model_dump(exclude_none=True)
    tokenizer = LavitVisualTokenizer._from_config(LavitVisualTokenizerConfig(**sizes[0]), attn_implementation="eager")
    detokenizer = LavitDetokenizer._from_config(
        LavitDetokenizerConfig(**sizes[1]), attn_implementation=detokenizer_attention
    )
    return tokenizer, detokenizer


def go_on_from(start: Path, model: VisualTokenizerTraining) -> None:
    """Loads a result of this stage; another encoder may stand under what was trained."""
    folder = result_of("tokenizer", start, "visual_tokenizer")
    trained = LavitVisualTokenizer.from_pretrained(folder, dtype=torch.float32).state_dict()
    trained = {key: value for key, value in trained.items() if not key.startswith("encoder.")}
    model.tokenizer.load_state_dict(trained, strict=False)
    trained = LavitDetokenizer.from_pretrained(start / "detokenizer", dtype=torch.float32)
    model.detokenizer.load_state_dict(trained.state_dict())
    if begun(0.0, model.objective.quantize_from):
        model.codebook.follow(model.tokenizer.quantizer.codebook.weight)


class TokenizerStage(Stage):
    """Stage 1."""

    recipe_class = TokenizerRecipe

    def build(self, recipe: TokenizerRecipe) -> Parts:
        tokenizer, detokenizer = new_parts(recipe)
        dataset, validation = load_data(recipe.data, tokenizer.config.image_size, recipe.training_arguments.seed)
        encoder = load_visual_tokenizer(recipe.encoder, torch.float32)[0].encoder
        load_encoder(encoder.state_dict(), tokenizer, recipe.encoder)
        model = VisualTokenizerTraining(tokenizer, detokenizer, recipe)
        return self.parts(model, recipe, dataset, validation)

    @staticmethod
    def parts(model: VisualTokenizerTraining, recipe: TokenizerRecipe, dataset, validation) -> Parts:
        """A new model starts as the recipe says."""
        model.init_positions()
        if recipe.start:
            go_on_from(Path(recipe.start), model)
        quantize_from = recipe.objective.quantize_from
        callbacks = [NewPhaseCallback(quantize_from)] if quantize_from else []
        return Parts(model, dataset, validation, callbacks)

    def finish(self, model: VisualTokenizerTraining, parts: Parts, recipe: TokenizerRecipe, output: Path) -> None:
        """Writes `visual_tokenizer` and `detokenizer`."""
        model.detokenizer.codebook.weight.copy_(model.tokenizer.quantizer.codebook.weight)
        model.tokenizer.save_pretrained(output / "visual_tokenizer")
        model.detokenizer.save_pretrained(output / "detokenizer")
