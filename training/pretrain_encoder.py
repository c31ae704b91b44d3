"""Stage 0: an encoder for the tokenizer to look through, where no pretrained vision tower fits (the embedded
checkpoint).

Losses: contrast of the pooled features with all names of the data set (a text tower that averages word embeddings), a
style classification, a linear reconstruction of every patch's pixels and of its place from its own feature, so that
features keep what a picture shows, how it looks, and where (codes that have lost their place cannot be drawn: the
decoder knows their order alone); and imitation of guides, convolutional classifiers of the same training pictures: a
small vision transformer alone hardly generalises over styles. The first guide is imitated in its names and feature
maps, others in their names alone, and one of styles, which sees little of a picture at a time, in what it says of
every place.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..configuration_lavit import LavitVisualTokenizerConfig
from ..encoder_lavit import build_encoder
from ..evaluation.judge import Judge
from .data import (
    PictureDataset,
    SampleNoise,
    augment_halves,
    load_pictures,
    normalize_pictures,
    patchify,
    result_of,
)
from .distributed import gather


class NameEncoder(nn.Module):
    """Mean of word embeddings, then an MLP: all names (L,) to unit vectors (L, D)."""

    def __init__(self, names: list[str], width: int):
        super().__init__()
        words = sorted({word for name in names for word in name.split()})
        index = {word: i for i, word in enumerate(words)}
        bags = torch.zeros(len(names), len(words))
        for row, name in enumerate(names):
            for word in name.split():
                bags[row, index[word]] = 1 / len(name.split())
        self.register_buffer("bags", bags)
        self.embedding = nn.Linear(len(words), width, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        nn.init.normal_(self.embedding.weight)

    def forward(self) -> torch.Tensor:
        hidden = self.embedding(self.bags)
        return F.normalize(hidden + self.mlp(hidden), dim=-1)


def patch_places(config: LavitVisualTokenizerConfig) -> torch.Tensor:
    """Where each patch is, (N, 6): row and column from -1 to 1, and the sine and cosine of each with a period of a
    third of the side, by which near ones are told apart."""
    axis = torch.linspace(-1, 1, config.image_size // config.patch_size)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return torch.cat([places, (3 * torch.pi * places).sin(), (3 * torch.pi * places).cos()], dim=-1)


class PictureHeads(nn.Module):
    """What is read off patch features (B, N, C): name logits (B, L), style logits (B, S), patch pixels (B, N, 3·p²),
    places (B, N, 6, see [`patch_places`])."""

    def __init__(self, config: LavitVisualTokenizerConfig, names: list[str], num_styles: int):
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, 1)
        self.name_projection = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.names = NameEncoder(names, width)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.style = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_styles))
        self.pixels = nn.Linear(width, 3 * config.patch_size**2)
        self.places = nn.Linear(width, 6)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.norm(features)
        pooled = (self.pool(hidden).softmax(1) * hidden).sum(1)
        projected = F.normalize(self.name_projection(pooled), dim=-1)
        name_logits = self.logit_scale.exp().clamp(max=50) * projected @ self.names().T
        return name_logits, self.style(pooled), self.pixels(hidden), self.places(hidden)


class EncoderPretraining(nn.Module):
    """Encoder and heads, with their losses."""

    def __init__(self, config: LavitVisualTokenizerConfig, names: list[str], styles: list[str], recipe: dict):
        super().__init__()
        self.recipe = recipe["objective"]
        self.augmentations = recipe["augmentation"], recipe["close_augmentation"]
        self.config = config
        self.encoder = build_encoder(config)
        self.heads = PictureHeads(config, names, len(styles))
        self.guide, *others = [
            self.load_guide(folder, names, styles) for folder in (recipe["guide"], *recipe["name_guides"])
        ]
        self.name_guides = nn.ModuleList(others)
        self.style_guide = None
        if recipe["style_guide"]:
            self.style_guide = self.load_guide(recipe["style_guide"], names, styles)
        elif self.recipe["weights"]["style_guide"]:
            raise ValueError("objective.weights.style_guide must be 0: the recipe names no style_guide")
        self.guide_channels = [block.body[-1].num_features for block in self.guide.body[1:3]]
        self.guide_maps = nn.Linear(config.hidden_size, sum(self.guide_channels))
        self.style_map = nn.Linear(config.hidden_size, len(styles))
        self.register_buffer("patch_places", patch_places(config), persistent=False)

    @staticmethod
    def load_guide(folder: str, names: list[str], styles: list[str]) -> Judge:
        """Raises a ValueError where the guide was trained with other names or styles."""
        guide = Judge.load(result_of("judge", folder, "judge.json").parent).requires_grad_(False)
        if guide.names != names or guide.styles != styles:
            raise ValueError(f"the guide {folder} knows other names or styles than the data set")
        return guide

    def train(self, mode: bool = True):
        super().train(mode)
        for guide in (self.guide, *self.name_guides, self.style_guide):
            if guide is not None:
                guide.eval()
        return self

    @torch.no_grad()
    def guidance(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The guides' mean name log-probabilities (B, L); the first one's second and third feature maps at every patch
        (B, N, C)."""
        maps = self.guide.feature_maps(pictures)
        side = self.config.image_size // self.config.patch_size
        at_patches = [F.interpolate(x.float(), size=side).flatten(2).transpose(1, 2) for x in maps[1:3]]
        at_patches = [F.layer_norm(x, x.shape[-1:]) for x in at_patches]
        logits = [self.guide.classify(maps[-1])[0], *(guide(pictures)[0] for guide in self.name_guides)]
        names = torch.stack([x.float().log_softmax(-1) for x in logits]).mean(0)
        return names, torch.cat(at_patches, dim=-1)

    @torch.no_grad()
    def style_guidance(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The style guide's probabilities (B, S), and its logits at every patch (B, N, S) in units of their spread."""
        logits = self.style_guide.style_map(self.style_guide.feature_maps(pictures)[-1]).float()
        probabilities = logits.mean((2, 3)).softmax(-1)
        side = self.config.image_size // self.config.patch_size
        logits = F.adaptive_avg_pool2d(logits, side).flatten(2).transpose(1, 2)
        return probabilities, logits / gather(logits).std().clamp_min(1e-6)

    def features(self, pictures: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Features (B, M, C) of the patches (B, M) of pictures (B, 3, S, S) in [0, 1]; the others are not seen."""
        embeddings = self.encoder.embeddings(normalize_pictures(pictures))
        patches = (patches + 1)[..., None].expand(-1, -1, embeddings.shape[-1])
        embeddings = torch.cat([embeddings[:, :1], embeddings.gather(1, patches)], dim=1)
        return self.encoder.encoder(inputs_embeds=embeddings).last_hidden_state[:, 1:]

    def visible_patches(self, batch: int, noise: SampleNoise | None, progress: float) -> torch.Tensor:
        """The patches (B, M) that are seen: a random share, which regularises, until `dropout_until`."""
        if not self.training or progress >= self.recipe["dropout_until"]:
            return torch.arange(self.config.num_patches, device=self.patch_places.device).expand(batch, -1)
        order = noise.uniform(self.config.num_patches).argsort(1)
        return order[:, : round((1 - self.recipe["patch_dropout"]) * self.config.num_patches)]

    def forward(self, pictures, name, style, noise: SampleNoise | None = None, progress: float = 1.0):
        pictures = pictures.float() / 255
        close = torch.ones(len(pictures), dtype=torch.bool, device=pictures.device)
        if self.training:
            pictures, close = augment_halves(pictures, noise, *self.augmentations)
        patches = self.visible_patches(len(pictures), noise, progress)
        features = self.features(pictures, patches)
        name_logits, style_logits, pixels, places = self.heads(features)

        def visible(maps: torch.Tensor) -> torch.Tensor:
            return maps.gather(1, patches[..., None].expand(-1, -1, maps.shape[-1]))

        guide_names, guide_maps = self.guidance(pictures)
        style_losses = F.cross_entropy(style_logits.float(), style, label_smoothing=0.1, reduction="none")
        num_close = close.sum().clamp_min(1)
        seen = self.heads.norm(features)
        losses = {
            "name_loss": F.cross_entropy(name_logits.float(), name, label_smoothing=0.1),
            "style_loss": (close * style_losses).sum() / num_close,
            "pixel_loss": F.mse_loss(pixels.float(), visible(patchify(pictures * 2 - 1, self.config.patch_size))),
            "place_loss": F.mse_loss(places.float(), self.patch_places[patches]),
            "guide_loss": F.kl_div(
                (name_logits.float() / 2).log_softmax(-1), (guide_names / 2).softmax(-1), reduction="batchmean"
            ),
            "map_loss": F.mse_loss(self.guide_maps(seen).float(), visible(guide_maps)),
        }
        if self.style_guide is not None:
            guide_styles, guide_style_map = self.style_guidance(pictures)
            differences = F.kl_div(style_logits.float().log_softmax(-1), guide_styles, reduction="none").sum(-1)
            of_map = F.mse_loss(self.style_map(seen).float(), visible(guide_style_map))
            losses["style_guide_loss"] = of_map + (close * differences).sum() / num_close
        weights = self.recipe["weights"]
        loss = sum(weights[key.removesuffix("_loss")] * value for key, value in losses.items())
        metrics = {
            **losses,
            "name_top1": (name_logits.argmax(-1) == name).float().mean(),
            "style_top1": (style_logits.argmax(-1) == style).float().mean(),
        }
        return {"loss": loss, "metrics": {key: value.detach() for key, value in metrics.items()}}


def build(recipe: dict):
    config = LavitVisualTokenizerConfig(**recipe["model"], attn_implementation="eager")
    dataset = load_pictures(recipe["data"], config.image_size)
    model = EncoderPretraining(config, dataset.names, dataset.styles, recipe)
    if config.stem == "convolutional":  # the guide's first blocks, which generalise already
        blocks = model.encoder.embeddings.patch_embedding.blocks
        blocks.load_state_dict(model.guide.body[: len(blocks)].state_dict())
    if recipe["start"]:
        known = model.state_dict()
        start = {key: value for key, value in load_file(recipe["start"]).items() if value.shape == known[key].shape}
        model.load_state_dict(start, strict=False)
    return model, dataset, []


@torch.no_grad()
def finish(model: EncoderPretraining, dataset: PictureDataset, recipe: dict, output: Path) -> None:
    """Writes encoder and heads, and prints how well the held-out pictures are told."""
    output.mkdir(parents=True, exist_ok=True)
    guides = ("guide.", "name_guides.", "style_guide.")
    save_file({k: v for k, v in model.state_dict().items() if not k.startswith(guides)}, output / "model.safetensors")
    (output / "labels.json").write_text(json.dumps({"names": dataset.names, "styles": dataset.styles}))
    model.eval()
    for split in ("train", "held_out"):
        pictures = PictureDataset(recipe["data"]["folder"], model.config.image_size, (split,))
        rows = pictures.spread(400)
        inputs = pictures.pictures[rows].float() / 255
        patches = torch.arange(model.config.num_patches).expand(len(rows), -1)
        names, styles, pixels, _ = model.heads(model.features(inputs, patches))
        name_right = (names.argmax(-1) == pictures.name[rows]).float().mean()
        style_right = (styles.argmax(-1) == pictures.style[rows]).float().mean()
        error = F.mse_loss(pixels, patchify(inputs * 2 - 1, model.config.patch_size))
        psnr = -10 * (error / 4).log10()
        print(f"{split}: name top-1 {name_right:.3f}, style top-1 {style_right:.3f}, linear pixels {psnr:.1f} dB")
