"""Stage 3: a denoising UNet on the detokenizer's conditions (paper section 3.1, Eq. 5).

UNet, autoencoder and scheduler go on from Stable Diffusion 1.5 or XL, or from a result of this stage; of the
detokenizer what makes conditions of its features is trained with them. The prediction type is the scheduler's:
epsilon, v_prediction or sample.

Dimension letters: B images, S side in pixels, N patches, C width of the encoder.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.optim.swa_utils import AveragedModel

from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer, LavitDetokenizerOutput
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.pixels_lavit import scale_latents
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder
from modeling_lavit.training.data.augmentation import SampleNoise, augment, normalize_images
from modeling_lavit.training.data.datasets import load_data
from modeling_lavit.training.recipe import PixelDecoderRecipe
from modeling_lavit.training.results import (
    AUTOENCODERS,
    UNETS,
    is_whole,
    load_component,
    load_visual_tokenizer,
    result_of,
    write_whole,
)
from modeling_lavit.training.stage import Parts, Stage, TrainingModel


def warm_average(decay: float):
    """Moves an average at a decay that is smaller at first, so that it does not remember the start: for
    [`AveragedModel`]."""

    @torch.no_grad()
    def move(averaged: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor) -> None:
        now = min(decay, float((1 + updates) / (10 + updates)))
        torch._foreach_lerp_(averaged, current, 1 - now)

    return move


class PixelDecoderTraining(TrainingModel):
    """UNet and detokenizer with the diffusion loss, and an exponential moving average of both."""

    def __init__(
        self,
        tokenizer: LavitVisualTokenizer,
        detokenizer: LavitDetokenizer,
        unet: UNet2DConditionModel,
        vae: LavitPatchAutoencoder | AutoencoderKL,
        scheduler: DDIMScheduler,
        recipe: PixelDecoderRecipe,
    ):
        super().__init__()
        self.objective, self.augmentation = recipe.objective, recipe.augmentation.model_dump()
        self.tokenizer = tokenizer.requires_grad_(False)
        self.vae = vae.requires_grad_(False)
        self.scheduler = scheduler
        self.trained = nn.ModuleDict({"detokenizer": detokenizer, "unet": unet})
        kinds = {type(module).__name__ for module in unet.modules()}
        self._no_split_modules = sorted(kinds & set(unet._no_split_modules))
        detokenizer.requires_grad_(False)
        for parameter in readout(detokenizer).values():
            parameter.requires_grad_(True)
        decay = self.objective.ema_decay
        self.average = AveragedModel(self.trained, multi_avg_fn=warm_average(decay)).requires_grad_(False)

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Called by the trainer where its arguments ask for it."""
        self.trained["unet"].enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.24

    def train(self, mode: bool = True):
        super().train(mode)
        self.tokenizer.eval()  # frozen, its statistics too
        return self

    def after_step(self) -> None:
        self.average.update_parameters(self.trained)

    @property
    def used(self) -> nn.ModuleDict:
        """Detokenizer and UNet: those that are trained, in evaluation their average."""
        return self.trained if self.training else self.average.module

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) in [0, 1] as the tokenizer's encoder takes them."""
        size = self.tokenizer.config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return normalize_images(images)

    def conditions(self, images: torch.Tensor, noise: SampleNoise) -> LavitDetokenizerOutput:
        """Images (B, 3, S, S) in [0, 1] to the UNet's conditions."""
        with torch.no_grad():
            tokens = self.tokenizer.tokenize(self.pixel_values(images))
        return self.used["detokenizer"](tokens.codes, tokens.lengths)

    def unet_conditions(self, condition: LavitDetokenizerOutput, keep: torch.Tensor, size: int) -> dict:
        """The UNet's arguments for images of `size` pixels; those not in `keep` (B,) get the unconditional ones."""
        nothing = self.used["detokenizer"].unconditional(len(keep))
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

    def further_loss(
        self, latents: torch.Tensor, images: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
        """What stages of other data add to the loss, and its figures.

        Args:
            latents: that are predicted, (B, C, h, w). images: (B, 3, S, S) in [0, 1].
            keep: (B,), which have their conditions.
        """
        return 0.0, {}

    def forward(self, images: torch.Tensor, noise: SampleNoise, progress: float) -> dict:
        images = images.float() / 255
        if self.training:
            images = augment(images, noise, **self.augmentation)
        latents = self.vae.encode(images * 2 - 1).latent_dist.mode().float()
        latents = scale_latents(latents, self.vae.config)
        uniform = noise.uniform(2)
        keep = uniform[:, 0] >= self.objective.condition_dropout
        timesteps = (uniform[:, 1] * self.scheduler.config.num_train_timesteps).long()
        added = noise.normal(*latents.shape[1:])
        prediction = self.used["unet"](
            self.scheduler.add_noise(latents, added, timesteps),
            timesteps,
            **self.unet_conditions(self.conditions(images, noise), keep, images.shape[-1]),
        ).sample.float()
        kind = self.scheduler.config.prediction_type
        variance = 1 - self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]  # of the noise
        if kind == "sample":
            target, weight = latents, (1 / variance).clamp(max=self.objective.max_weight)
        elif kind == "epsilon":
            target, weight = added, torch.ones_like(variance)
        else:
            target, weight = self.scheduler.get_velocity(latents, added, timesteps), torch.ones_like(variance)
        error = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
        more, figures = self.further_loss(prediction, images, keep)
        loss = (weight * error).mean() + more
        return {"loss": loss, "metrics": {"error": error, "error_noisy": error[variance > 0.9]} | figures}


def readout(detokenizer: LavitDetokenizer) -> dict[str, nn.Parameter]:
    """What makes conditions of features, and those without any."""
    parts = ("prompt_projections.", "attention_pool.", "unconditional_embedding")
    return {key: value for key, value in detokenizer.named_parameters() if key.startswith(parts)}


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


def go_on_from(start: Path, detokenizer: LavitDetokenizer) -> None:
    """Loads what a former result of this stage has of a detokenizer; a folder of Stable Diffusion has none."""
    if not (start / "detokenizer").is_dir():
        return
    trained = LavitDetokenizer.from_pretrained(start / "detokenizer", dtype=torch.float32)
    if torch.equal(trained.codebook.weight, detokenizer.codebook.weight):
        detokenizer.load_state_dict(trained.state_dict())
    else:  # it was trained on features, or on other codes
        detokenizer.load_state_dict({k: v.data for k, v in readout(trained).items()}, strict=False)


class PixelDecoderStage(Stage):
    """Stage 3."""

    recipe_class = PixelDecoderRecipe
    training_class = PixelDecoderTraining

    def build(self, recipe: PixelDecoderRecipe) -> Parts:
        tokenizer, detokenizer = self.conditioners(recipe)
        size = recipe.resolution or tokenizer.config.image_size
        dataset, validation = self.data(recipe, size)
        unet, vae, scheduler = self.denoiser(recipe, detokenizer, dataset)
        check_fit(unet, detokenizer, vae)
        if not torch.cuda.is_available():
            unet.set_attn_processor(AttnProcessor())  # the backward of fused attention is slow on CPUs
        model = self.training_class(tokenizer, detokenizer, unet, vae, scheduler, recipe)
        return Parts(model, dataset, validation)

    def conditioners(self, recipe: PixelDecoderRecipe) -> tuple[LavitVisualTokenizer, LavitDetokenizer]:
        """What makes conditions of images."""
        tokenizer = load_visual_tokenizer(recipe.tokenizer, torch.float32)[0].eval()
        tokenizer.set_attn_implementation("eager")
        folder = result_of("tokenizer", recipe.tokenizer, "detokenizer")
        detokenizer = LavitDetokenizer.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return tokenizer, detokenizer

    def data(self, recipe: PixelDecoderRecipe, size: int) -> tuple:
        """What is trained and validated on, images of `size` pixels."""
        return load_data(recipe.data, size, recipe.training_arguments.seed)

    def denoiser(self, recipe: PixelDecoderRecipe, detokenizer: LavitDetokenizer, dataset) -> tuple:
        """UNet, autoencoder and scheduler."""
        start = Path(recipe.start)
        parts = (
            load_component(start / "unet", UNETS),
            load_component(start / "vae", AUTOENCODERS),
            DDIMScheduler.from_pretrained(start / "scheduler"),
        )
        go_on_from(start, detokenizer)
        return parts

    def finish(self, model: PixelDecoderTraining, parts: Parts, recipe: PixelDecoderRecipe, output: Path) -> None:
        """Writes the averaged detokenizer and UNet, the autoencoder and the scheduler; in a whole checkpoint where the
        recipe names a language model."""
        components = dict(model.average.module.items()) | {"vae": model.vae, "scheduler": model.scheduler}
        if not recipe.language_model:
            for name, component in components.items():
                component.save_pretrained(output / name)
            return
        language_model = LavitForConditionalGeneration.from_pretrained(recipe.language_model, dtype=torch.float32)
        processor = LavitProcessor.from_pretrained(recipe.language_model)
        base = recipe.language_model if is_whole(recipe.language_model) else None
        write_whole(language_model, processor, output, base, **components)
