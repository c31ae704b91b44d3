"""Stage 3: a denoising UNet on the detokenizer's conditions (paper section 3.1, Eq. 5), and the detokenizer with it.

`condition: features` trains on the encoder's own features, before a tokenizer exists; `condition: codes` on what
the detokenizer makes of the codes. UNet, autoencoder and scheduler are new, or those of `start`: a result of this
stage, or a folder of Stable Diffusion 1.5 or SDXL. The prediction type is the scheduler's: epsilon, v_prediction or
sample.
"""

import copy
import itertools
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import TrainerCallback

from ..configuration_lavit import LavitDetokenizerConfig, LavitVisualTokenizerConfig
from ..modeling_lavit_detokenizer import LavitDetokenizer, LavitDetokenizerOutput
from ..modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from ..small_decoder_lavit import LavitPatchAutoencoder, LavitUNet2DConditionModel
from .data import PictureDataset, SampleNoise, augment, load_pictures, normalize_pictures, result_of
from .distributed import ragged_mean
from .train_visual_tokenizer import load_encoder


# The classes of components that a folder may hold, by the name in their config.
UNETS = {cls.__name__: cls for cls in (LavitUNet2DConditionModel, UNet2DConditionModel)}
AUTOENCODERS = {cls.__name__: cls for cls in (LavitPatchAutoencoder, AutoencoderKL)}


class PixelDecoderTraining(nn.Module):
    """UNet and detokenizer with the diffusion loss, and an exponential moving average of both."""

    def __init__(
        self,
        tokenizer: LavitVisualTokenizer,
        detokenizer: LavitDetokenizer,
        unet: UNet2DConditionModel,
        vae: LavitPatchAutoencoder | AutoencoderKL,
        scheduler: DDIMScheduler,
        recipe: dict,
    ):
        super().__init__()
        self.recipe, self.augmentation = recipe["objective"], recipe["augmentation"]
        self.tokenizer = tokenizer.requires_grad_(False)
        self.vae = vae.requires_grad_(False)
        self.scheduler = scheduler
        self.trained = nn.ModuleDict({"detokenizer": detokenizer, "unet": unet})
        kinds = {type(module).__name__ for module in unet.modules()}
        self._no_split_modules = sorted(kinds & set(unet._no_split_modules))  # what FSDP shards one by one
        detokenizer.codebook.requires_grad_(False)
        if not self.recipe["train_detokenizer"]:
            detokenizer.requires_grad_(False)
            for parameter in readout(detokenizer).values():
                parameter.requires_grad_(True)
        if self.recipe["perceptual_weight"] and scheduler.config.prediction_type != "sample":
            raise ValueError(
                "objective.perceptual_weight needs a scheduler whose prediction_type is 'sample', got "
                f"{scheduler.config.prediction_type!r}"
            )
        self.register_buffer("updates", torch.tensor(0))
        self.average = copy.deepcopy(self.trained).requires_grad_(False)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Called by the trainer where its arguments ask for it."""
        self.trained["unet"].enable_gradient_checkpointing()

    def train(self, mode: bool = True):
        super().train(mode)
        self.tokenizer.eval()  # frozen, its statistics too
        return self

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average; faster at first, so that it does not remember the start."""
        self.updates += 1
        decay = min(self.recipe["ema_decay"], float((1 + self.updates) / (10 + self.updates)))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.trained.parameters()), 1 - decay)

    def pixel_values(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S) in [0, 1] as the tokenizer's encoder takes them."""
        size = self.tokenizer.config.image_size
        if pictures.shape[-1] != size:
            pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return normalize_pictures(pictures)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S) in [0, 1] to the encoder's normalised features (B, N, C)."""
        features = self.tokenizer.encode_patches(self.pixel_values(pictures)).float()
        return F.layer_norm(features, features.shape[-1:])

    def conditions(self, pictures: torch.Tensor, noise: SampleNoise) -> LavitDetokenizerOutput:
        """Pictures (B, 3, S, S) in [0, 1] to the UNet's conditions."""
        detokenizer = self.trained["detokenizer"]
        if self.recipe["condition"] == "features":
            with torch.no_grad():
                features = self.features(pictures)
            return detokenizer.conditions(features)
        with torch.no_grad():
            tokens = self.tokenizer.tokenize(self.pixel_values(pictures))
        patches = torch.arange(self.tokenizer.config.num_patches, device=tokens.lengths.device)
        kept = patches < tokens.lengths[:, None]
        uniform = noise.uniform(self.tokenizer.config.num_patches, 2)[kept]
        corrupted = uniform[:, 0] < self.recipe["code_corruption"]
        others = (uniform[:, 1] * detokenizer.config.codebook_size).long()
        return detokenizer(torch.where(corrupted, others, tokens.codes), tokens.lengths)

    def unet_conditions(self, condition: LavitDetokenizerOutput, keep: torch.Tensor, size: int) -> dict:
        """The UNet's arguments for pictures of `size` pixels; those not in `keep` (B,) get the unconditional ones."""
        nothing = self.trained["detokenizer"].unconditional(len(keep))
        embeds = torch.where(keep[:, None, None], condition.prompt_embeds.float(), nothing.prompt_embeds.float())
        if condition.pooled_prompt_embeds is None:
            mask = torch.where(keep[:, None], condition.attention_mask, nothing.attention_mask)
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        pooled = condition.pooled_prompt_embeds.float(), nothing.pooled_prompt_embeds.float()
        time_ids = embeds.new_tensor([size, size, 0, 0, size, size]).expand(len(keep), -1)
        return {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": {"text_embeds": torch.where(keep[:, None], *pooled), "time_ids": time_ids},
        }

    def perceptual_distances(self, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Cosine distances (B,), means over patches, between what the tokenizer's encoder sees in the pictures of
        predicted latents (B, C, h, w) and in the pictures (B, 3, S, S) in [0, 1] themselves (as LPIPS, arXiv
        1801.03924, with the encoder that is here): squared errors alone blur what tells one drawing style from
        another."""
        predicted = self.vae.decode(latents / self.vae.config.scaling_factor).sample.float() / 2 + 0.5
        with torch.no_grad():
            seen = self.features(pictures)
        return (1 - F.cosine_similarity(self.features(predicted), seen, dim=-1)).mean(1)

    def forward(self, pictures, noise: SampleNoise, progress: float = 1.0, **labels):
        pictures = augment(pictures.float() / 255, noise, **self.augmentation)
        latents = self.vae.encode(pictures * 2 - 1).latent_dist.mode().float() * self.vae.config.scaling_factor
        uniform = noise.uniform(2)
        keep = uniform[:, 0] >= self.recipe["condition_dropout"]
        timesteps = (uniform[:, 1] * self.scheduler.config.num_train_timesteps).long()
        added = noise.normal(*latents.shape[1:])
        prediction = self.trained["unet"](
            self.scheduler.add_noise(latents, added, timesteps),
            timesteps,
            **self.unet_conditions(self.conditions(pictures, noise), keep, pictures.shape[-1]),
        ).sample.float()
        kind = self.scheduler.config.prediction_type
        variance = 1 - self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]  # of the noise
        if kind == "sample":
            target, weight = latents, (1 / variance).clamp(max=self.recipe["max_weight"])
        elif kind == "epsilon":
            target, weight = added, torch.ones_like(variance)
        else:
            target, weight = self.scheduler.get_velocity(latents, added, timesteps), torch.ones_like(variance)
        error = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
        loss = (weight * error).mean()
        noisy = variance > 0.9
        metrics = {"error": error.mean().detach(), "error_noisy": error[noisy].mean().detach()}
        if self.recipe["perceptual_weight"]:
            distance = ragged_mean(self.perceptual_distances(prediction, pictures), keep.float())
            loss = loss + self.recipe["perceptual_weight"] * distance
            metrics["perceptual"] = distance.detach()
        return {"loss": loss, "metrics": {k: v for k, v in metrics.items() if v.isfinite()}}


class AverageCallback(TrainerCallback):
    """Moves the average after every optimizer step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        getattr(model, "module", model).update_average()


def readout(detokenizer: LavitDetokenizer) -> dict[str, nn.Parameter]:
    """What makes conditions of features, and those without any."""
    parts = ("prompt_projections.", "attention_pool.", "unconditional_embedding")
    return {key: value for key, value in detokenizer.named_parameters() if key.startswith(parts)}


def load_component(folder: Path, classes: dict[str, type]) -> nn.Module:
    """A component of a diffusers folder, in float32.

    Raises:
        OSError: there is none.
        ValueError: its class is not one of `classes`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(
            f"there is no {path}: start must be a result of this stage, or a Stable Diffusion 1.5 or SDXL folder"
        )
    name = json.loads(path.read_text()).get("_class_name")
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}; known here are {sorted(classes)}")
    return classes[name].from_pretrained(folder, dtype=torch.float32)


def check_fit(unet: UNet2DConditionModel, detokenizer: LavitDetokenizer, vae) -> None:
    """Refuses components of which one cannot read the other.

    Raises:
        ValueError: widths of conditions or numbers of channels differ.
    """
    config = detokenizer.config
    pairs = {
        "the UNet's cross_attention_dim and the sum of prompt_embed_dims": (
            unet.config.cross_attention_dim,
            sum(config.prompt_embed_dims),
        ),
        "the UNet's in_channels and the autoencoder's latent_channels": (
            unet.config.in_channels,
            vae.config.latent_channels,
        ),
        "whether the UNet takes a pooled embedding and whether the detokenizer is highres": (
            unet.config.addition_embed_type == "text_time",
            config.variant == "highres",
        ),
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"{what} differ: {one}, {other}")


def first_pictures(dataset, count: int) -> torch.Tensor:
    """The first pictures (count, 3, S, S) uint8 of a data set, at most."""
    if isinstance(dataset, PictureDataset):
        return dataset.pictures[:count]
    items = (
        dataset
        if isinstance(dataset, torch.utils.data.IterableDataset)
        else map(dataset.__getitem__, range(len(dataset)))
    )
    return torch.stack([item["pictures"] for item in itertools.islice(items, count)])


def build(recipe: dict):
    if recipe["objective"]["condition"] == "features":
        if missing := {"encoder", "model", "detokenizer"} - recipe.keys():
            raise ValueError(f"the condition `features` needs the sections {sorted(missing)} in the recipe")
        tokenizer = LavitVisualTokenizer._from_config(
            LavitVisualTokenizerConfig(**recipe["model"]), attn_implementation="eager"
        )
        load_encoder(Path(recipe["encoder"]), tokenizer, None)
        detokenizer = LavitDetokenizer._from_config(
            LavitDetokenizerConfig(**recipe["detokenizer"]), attn_implementation="eager"
        )
    else:
        folder = result_of("tokenizer", recipe["tokenizer"], "visual_tokenizer").parent
        tokenizer = LavitVisualTokenizer.from_pretrained(
            folder / "visual_tokenizer", dtype=torch.float32, attn_implementation="eager"
        )
        detokenizer = LavitDetokenizer.from_pretrained(
            folder / "detokenizer", dtype=torch.float32, attn_implementation="eager"
        )
    dataset = load_pictures(recipe["data"], recipe["resolution"] or tokenizer.config.image_size)
    if recipe["start"]:
        start = Path(recipe["start"])
        unet = load_component(start / "unet", UNETS)
        vae = load_component(start / "vae", AUTOENCODERS)
        scheduler = DDIMScheduler.from_pretrained(start / "scheduler")
        if (start / "detokenizer").is_dir():
            trained = LavitDetokenizer.from_pretrained(start / "detokenizer", dtype=torch.float32)
            if torch.equal(trained.codebook.weight, detokenizer.codebook.weight):
                detokenizer.load_state_dict(trained.state_dict())
            else:  # it was trained on features, or on other codes
                detokenizer.load_state_dict({k: v.data for k, v in readout(trained).items()}, strict=False)
    elif missing := {"unet", "vae", "vae_pictures", "scheduler"} - recipe.keys():
        raise ValueError(f"the recipe needs a start, or the sections {sorted(missing)} for new components")
    else:
        unet = LavitUNet2DConditionModel(**recipe["unet"])
        vae = LavitPatchAutoencoder(**recipe["vae"])
        vae.fit(first_pictures(dataset, recipe["vae_pictures"]).float() / 127.5 - 1)
        scheduler = DDIMScheduler(**recipe["scheduler"])
    check_fit(unet, detokenizer, vae)
    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())  # the backward of fused attention is slow on CPUs
    model = PixelDecoderTraining(tokenizer, detokenizer, unet, vae, scheduler, recipe)
    return model, dataset, [AverageCallback()]


@torch.no_grad()
def finish(model: PixelDecoderTraining, dataset, recipe: dict, output: Path) -> None:
    """Writes the averaged detokenizer and UNet, the autoencoder and the scheduler."""
    for name, component in (*model.average.items(), ("vae", model.vae), ("scheduler", model.scheduler)):
        component.save_pretrained(output / name)
