"""Stage 0: an encoder for the tokenizer to look through, where no pretrained vision tower fits (the embedded
checkpoint).

Losses: contrast of the pooled features with all names of the data set (a text tower that averages word embeddings), a
style classification, a linear reconstruction of every patch's pixels and of its position from its own feature, so that
features keep what an image shows, how it looks, and where (codes that have lost their position cannot be drawn: the
decoder knows their order alone); and imitation of teachers, convolutional classifiers of the same training images: a
small vision transformer alone hardly generalises over styles. The first teacher is imitated in its names and feature
maps, others in their names alone, and one of styles, which sees little of an image at a time, in what it says of every
position.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from modeling_lavit.configuration_lavit import LavitVisualTokenizerConfig
from modeling_lavit.encoder_lavit import build_encoder
from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.training.data.augmentation import SampleNoise, normalize_images
from modeling_lavit.training.distributed import gather
from modeling_lavit.training.emoji.augmentation import augment_halves, patchify
from modeling_lavit.training.emoji.images import load_more, load_named
from modeling_lavit.training.emoji.recipe import EncoderRecipe
from modeling_lavit.training.results import result_of
from modeling_lavit.training.stage import Parts, Stage, TrainingModel
from modeling_lavit.training.train_visual_tokenizer import load_encoder


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


def patch_positions(config: LavitVisualTokenizerConfig) -> torch.Tensor:
    """Where each patch is, (N, 6): row and column from -1 to 1, and the sine and cosine of each with a period of a
    third of the side, by which near ones are told apart."""
    axis = torch.linspace(-1, 1, config.image_size // config.patch_size)
    positions = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return torch.cat([positions, (3 * torch.pi * positions).sin(), (3 * torch.pi * positions).cos()], dim=-1)


class ImageHeads(nn.Module):
    """What is read off patch features (B, N, C): name logits (B, L), style logits (B, S), patch pixels (B, N, 3·p²),
    positions (B, N, 6, see [`patch_positions`])."""

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


class EncoderPretraining(TrainingModel):
    """Encoder and heads, with their losses."""

    def __init__(self, config: LavitVisualTokenizerConfig, names: list[str], styles: list[str], recipe: EncoderRecipe):
        super().__init__()
        self.objective, self.config = recipe.objective, config
        self.augmentations = recipe.augmentation, recipe.weak_augmentation
        self.encoder = build_encoder(config)
        self.heads = ImageHeads(config, names, len(styles))
        self.teacher, *others = [
            load_teacher(folder, names, styles) for folder in (recipe.teacher, *recipe.name_teachers)
        ]
        self.name_teachers = nn.ModuleList(others)
        self.style_teacher = load_teacher(recipe.style_teacher, names, styles)
        self.teacher_channels = [block.body[-1].num_features for block in self.teacher.body[1:3]]
        self.teacher_maps = nn.Linear(config.hidden_size, sum(self.teacher_channels))
        self.style_map = nn.Linear(config.hidden_size, len(styles))
        self.register_buffer("patch_positions", patch_positions(config), persistent=False)

    def train(self, mode: bool = True):
        super().train(mode)
        for teacher in (self.teacher, *self.name_teachers, self.style_teacher):
            teacher.eval()
        return self

    @torch.no_grad()
    def teach(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teachers' mean name log-probabilities (B, L); the first one's second and third feature maps at every
        patch (B, N, C)."""
        maps = self.teacher.feature_maps(images)
        side = self.config.image_size // self.config.patch_size
        at_patches = [F.interpolate(x.float(), size=side).flatten(2).transpose(1, 2) for x in maps[1:3]]
        at_patches = [F.layer_norm(x, x.shape[-1:]) for x in at_patches]
        logits = [self.teacher.classify(maps[-1])[0], *(teacher(images)[0] for teacher in self.name_teachers)]
        names = torch.stack([x.float().log_softmax(-1) for x in logits]).mean(0)
        return names, torch.cat(at_patches, dim=-1)

    @torch.no_grad()
    def teach_styles(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The style teacher's probabilities (B, S), and its logits at every patch (B, N, S) in units of their
        spread."""
        logits = self.style_teacher.style_map(self.style_teacher.feature_maps(images)[-1]).float()
        probabilities = logits.mean((2, 3)).softmax(-1)
        side = self.config.image_size // self.config.patch_size
        logits = F.adaptive_avg_pool2d(logits, side).flatten(2).transpose(1, 2)
        return probabilities, logits / gather(logits).std().clamp_min(1e-6)

    def features(self, images: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Features (B, M, C) of the patches (B, M) of images (B, 3, S, S) in [0, 1]; the others are not seen."""
        embeddings = self.encoder.embeddings(normalize_images(images))
        patches = (patches + 1)[..., None].expand(-1, -1, embeddings.shape[-1])
        embeddings = torch.cat([embeddings[:, :1], embeddings.gather(1, patches)], dim=1)
        return self.encoder.encoder(inputs_embeds=embeddings).last_hidden_state[:, 1:]

    def visible_patches(self, batch: int, noise: SampleNoise, progress: float) -> torch.Tensor:
        """The patches (B, M) that are seen: a random share, which regularises, until `dropout_until`."""
        if not self.training or progress >= self.objective.dropout_until:
            return torch.arange(self.config.num_patches, device=self.patch_positions.device).expand(batch, -1)
        order = noise.uniform(self.config.num_patches).argsort(1)
        return order[:, : round((1 - self.objective.patch_dropout) * self.config.num_patches)]

    def forward(self, images, name, style, noise: SampleNoise, progress: float) -> dict:
        images = images.float() / 255
        weak = torch.ones(len(images), dtype=torch.bool, device=images.device)
        if self.training:
            images, weak = augment_halves(images, noise, *self.augmentations)
        weak = weak & (style >= 0)
        patches = self.visible_patches(len(images), noise, progress)
        features = self.features(images, patches)
        name_logits, style_logits, pixels, positions = self.heads(features)

        def visible(maps: torch.Tensor) -> torch.Tensor:
            return maps.gather(1, patches[..., None].expand(-1, -1, maps.shape[-1]))

        teacher_names, teacher_maps = self.teach(images)
        teacher_styles, teacher_style_map = self.teach_styles(images)
        style_losses = F.cross_entropy(style_logits.float(), style, label_smoothing=0.1, reduction="none")
        differences = F.kl_div(style_logits.float().log_softmax(-1), teacher_styles, reduction="none").sum(-1)
        num_weak = weak.sum().clamp_min(1)
        seen = self.heads.norm(features)
        of_style_map = F.mse_loss(self.style_map(seen).float(), visible(teacher_style_map))
        losses = {
            "name": F.cross_entropy(name_logits.float(), name, label_smoothing=0.1),
            "style": (weak * style_losses).sum() / num_weak,
            "pixel": F.mse_loss(pixels.float(), visible(patchify(images * 2 - 1, self.config.patch_size))),
            "place": F.mse_loss(positions.float(), self.patch_positions[patches]),
            "teacher": F.kl_div(
                (name_logits.float() / 2).log_softmax(-1), (teacher_names / 2).softmax(-1), reduction="batchmean"
            ),
            "map": F.mse_loss(self.teacher_maps(seen).float(), visible(teacher_maps)),
            "style_teacher": of_style_map + (weak * differences).sum() / num_weak,
        }
        loss = sum(getattr(self.objective.weights, key) * value for key, value in losses.items())
        metrics = {
            **{f"{key}_loss": value for key, value in losses.items()},
            "name_top1": (name_logits.argmax(-1) == name).float(),
            "style_top1": (style_logits.argmax(-1) == style).float(),
        }
        return {"loss": loss, "metrics": metrics}


def load_teacher(folder: str, names: list[str], styles: list[str]) -> Classifier:
    """A frozen teacher.

    Raises:
        OSError: there is none.
        ValueError: it was trained with other names or styles.
    """
    path = result_of("classifier", folder, "classifier.json")
    teacher = Classifier.load(path.parent).requires_grad_(False)
    if teacher.names != names or teacher.styles != styles:
        raise ValueError(f"the teacher {folder} knows other names or styles than the data set")
    return teacher


def load_pretrained(
    folder: str | Path, tokenizer: LavitVisualTokenizer, styles: list[str]
) -> tuple[ImageHeads, list[str]]:
    """Loads the encoder of `tokenizer` from a result of this stage, whose frozen heads and their names it returns.

    Raises:
        OSError: there is no result.
        ValueError: the encoder has another size, or was trained with other styles.
    """
    labels = json.loads(result_of("encoder", folder, "labels.json").read_text())
    if labels["styles"] != styles:
        raise ValueError(f"{folder} was trained with the styles {labels['styles']}, the data have {styles}")
    pretrained = load_file(Path(folder) / "model.safetensors")
    heads = ImageHeads(tokenizer.config, labels["names"], len(styles))
    heads.load_state_dict(with_prefix(pretrained, "heads."))
    load_encoder(with_prefix(pretrained, "encoder."), tokenizer, str(folder))
    return heads.requires_grad_(False), labels["names"]


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose key starts with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class EncoderStage(Stage):
    """Stage 0."""

    recipe_class = EncoderRecipe

    def build(self, recipe: EncoderRecipe) -> Parts:
        sizes = recipe.model.model_dump(exclude_none=True)
        config = LavitVisualTokenizerConfig(**sizes, attn_implementation="eager")
        dataset, validation = load_named(recipe.data, config.image_size)
        if more := load_more(recipe.data, config.image_size):
            dataset.append(more)
        model = EncoderPretraining(config, dataset.names, dataset.styles, recipe)
        if config.stem == "convolutional":  # the teacher's first blocks, which generalise already
            blocks = model.encoder.embeddings.patch_embedding.blocks
            blocks.load_state_dict(model.teacher.body[: len(blocks)].state_dict())
        return Parts(model, dataset, validation)

    def finish(self, model: EncoderPretraining, parts: Parts, recipe: EncoderRecipe, output: Path) -> None:
        """Writes encoder and heads."""
        teachers = ("teacher.", "name_teachers.", "style_teacher.")
        tensors = {key: value for key, value in model.state_dict().items() if not key.startswith(teachers)}
        save_file(tensors, output / "model.safetensors")
        labels = {"names": parts.dataset.names, "styles": parts.dataset.styles}
        (output / "labels.json").write_text(json.dumps(labels))
