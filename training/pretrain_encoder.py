"""Stage 0: an encoder for the tokenizer to look through, where no pretrained vision tower fits (the embedded
checkpoint).

Losses: contrast of the pooled features with all names of the data set (a text tower that averages word embeddings), a
style classification, a linear reconstruction of every patch's pixels and of its place from its own feature, so that
features keep what a picture shows, how it looks, and where (codes that have lost their place cannot be drawn: the
decoder knows their order alone); and imitation of a guide, a convolutional classifier of the same training
pictures, in its names and its feature maps: a small vision transformer alone hardly generalises over styles.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_model

from ..configuration_lavit import LavitVisualTokenizerConfig
from ..evaluation.judge import Judge
from ..modeling_lavit_visual_tokenizer import build_encoder
from .data import PictureDataset, SampleNoise, augment, load_pictures, normalize_pictures, patchify, result_of


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

    guide_channels = (64, 128)

    def __init__(self, config: LavitVisualTokenizerConfig, names: list[str], num_styles: int, recipe: dict):
        super().__init__()
        guide = recipe["guide"]
        self.recipe, self.augmentation = recipe["objective"], recipe["augmentation"]
        self.config = config
        self.encoder = build_encoder(config)
        self.heads = PictureHeads(config, names, num_styles)
        self.guide = Judge.load(result_of("judge", guide, "judge.json").parent).requires_grad_(False)
        if self.guide.names != names:
            raise ValueError(f"the guide {guide} knows other names than the data set")
        self.guide_maps = nn.Linear(config.hidden_size, sum(self.guide_channels))
        self.register_buffer("patch_places", patch_places(config), persistent=False)

    @torch.no_grad()
    def guidance(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The guide's name logits (B, L), and its second and third feature maps at every patch (B, N, 64 + 128)."""
        self.guide.eval()
        maps = self.guide.feature_maps(pictures)
        side = self.config.image_size // self.config.patch_size
        at_patches = [F.interpolate(x.float(), size=side).flatten(2).transpose(1, 2) for x in maps[1:3]]
        at_patches = [F.layer_norm(x, x.shape[-1:]) for x in at_patches]
        return self.guide.classify(maps[-1])[0].float(), torch.cat(at_patches, dim=-1)

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
        if self.training:
            pictures = augment(pictures, noise, **self.augmentation)
        patches = self.visible_patches(len(pictures), noise, progress)
        features = self.features(pictures, patches)
        name_logits, style_logits, pixels, places = self.heads(features)
        guide_logits, guide_maps = self.guidance(pictures)
        guide_maps = guide_maps.gather(1, patches[..., None].expand(-1, -1, guide_maps.shape[-1]))
        target = patchify(pictures * 2 - 1, self.config.patch_size)
        target = target.gather(1, patches[..., None].expand(-1, -1, target.shape[-1]))
        losses = {
            "name_loss": F.cross_entropy(name_logits.float(), name, label_smoothing=0.1),
            "style_loss": F.cross_entropy(style_logits.float(), style, label_smoothing=0.1),
            "pixel_loss": F.mse_loss(pixels.float(), target),
            "place_loss": F.mse_loss(places.float(), self.patch_places[patches]),
        }
        agreement = F.kl_div(
            (name_logits.float() / 2).log_softmax(-1), (guide_logits / 2).softmax(-1), reduction="batchmean"
        )
        losses |= {
            "guide_loss": agreement,
            "map_loss": F.mse_loss(self.guide_maps(self.heads.norm(features)).float(), guide_maps),
        }
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
    model = EncoderPretraining(config, dataset.names, len(dataset.styles), recipe)
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
    save_model(model, output / "model.safetensors")
    (output / "labels.json").write_text(json.dumps({"names": dataset.names, "styles": dataset.styles}))
    model.eval()
    for split in ("train", "held_out"):
        pictures = PictureDataset(recipe["data"]["folder"], model.config.image_size, (split,))
        totals = torch.zeros(3)
        for start in range(0, len(pictures.name), 64):
            rows = slice(start, start + 64)
            batch = {"pictures": pictures.pictures[rows], "name": pictures.name[rows], "style": pictures.style[rows]}
            metrics = model(**batch)["metrics"]
            weight = len(batch["name"]) / len(pictures.name)
            totals += weight * torch.stack([metrics["name_top1"], metrics["style_top1"], metrics["pixel_loss"]])
        psnr = -10 * (totals[2] / 4).log10()
        print(f"{split}: name top-1 {totals[0]:.3f}, style top-1 {totals[1]:.3f}, linear pixels {psnr:.1f} dB")
