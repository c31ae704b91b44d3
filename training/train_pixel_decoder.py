"""Stage 3: a denoising UNet on the detokenizer's conditions (paper section 3.1, Eq. 5), and the detokenizer with it.

`condition: features` trains on the encoder's own features, before a tokenizer exists; `condition: codes` on what
the detokenizer makes of the codes. The prediction type is the scheduler's: epsilon, v_prediction or sample.
"""

import copy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..autoencoder_lavit import LavitPatchAutoencoder
from ..configuration_lavit import LavitDetokenizerConfig, LavitVisualTokenizerConfig
from ..modeling_lavit_detokenizer import LavitDetokenizer, LavitDetokenizerOutput
from ..modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from ..unet_lavit import LavitUNet2DConditionModel
from .data import PictureDataset, SampleNoise, augment, load_pictures, normalize_pictures


class PixelDecoderTraining(nn.Module):
    """UNet and detokenizer with the diffusion loss, and an exponential moving average of both."""

    def __init__(
        self,
        tokenizer: LavitVisualTokenizer,
        detokenizer: LavitDetokenizer,
        unet: LavitUNet2DConditionModel,
        vae: LavitPatchAutoencoder,
        scheduler: DDIMScheduler,
        recipe: dict,
    ):
        super().__init__()
        self.recipe, self.augmentation = recipe["objective"], recipe["augmentation"]
        self.tokenizer = tokenizer.requires_grad_(False)
        self.vae = vae.requires_grad_(False)
        self.scheduler = scheduler
        self.trained = nn.ModuleDict({"detokenizer": detokenizer, "unet": unet})
        detokenizer.codebook.requires_grad_(False)
        if not self.recipe["train_detokenizer"]:
            detokenizer.requires_grad_(False)
            detokenizer.prompt_projections.requires_grad_(True)
            detokenizer.attention_pool.requires_grad_(True)
        self.register_buffer("updates", torch.tensor(0))
        self.average = copy.deepcopy(self.trained).requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.tokenizer.eval()  # frozen, its statistics too
        return self

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average; faster at first, so that it does not remember the start."""
        self.updates += 1
        decay = min(self.recipe["ema_decay"], float((1 + self.updates) / (10 + self.updates)))
        for average, current in zip(self.average.parameters(), self.trained.parameters(), strict=True):
            average.lerp_(current, 1 - decay)

    def conditions(self, pictures: torch.Tensor, noise: SampleNoise) -> LavitDetokenizerOutput:
        """Pictures (B, 3, S, S) in [0, 1] to the UNet's conditions."""
        detokenizer = self.trained["detokenizer"]
        with torch.no_grad():
            pixel_values = normalize_pictures(pictures)
            if self.recipe["condition"] == "features":
                features = self.tokenizer.encode_patches(pixel_values).float()
                features = F.layer_norm(features, features.shape[-1:])
            else:
                tokens = self.tokenizer.tokenize(pixel_values)
        if self.recipe["condition"] == "features":
            return detokenizer.conditions(features)
        kept = torch.arange(self.tokenizer.config.num_patches) < tokens.lengths[:, None]
        uniform = noise.uniform(self.tokenizer.config.num_patches, 2)[kept]
        corrupted = uniform[:, 0] < self.recipe["code_corruption"]
        others = (uniform[:, 1] * detokenizer.config.codebook_size).long()
        return detokenizer(torch.where(corrupted, others, tokens.codes), tokens.lengths)

    def forward(self, pictures, name, style, noise: SampleNoise, progress: float = 1.0):
        pictures = augment(pictures.float() / 255, noise, **self.augmentation)
        latents = self.vae.encode(pictures * 2 - 1).latent_dist.mode() * self.vae.config.scaling_factor
        condition = self.conditions(pictures, noise)
        batch, size = len(pictures), pictures.shape[-1]
        uniform = noise.uniform(2)
        keep = (uniform[:, 0] >= self.recipe["condition_dropout"]).float()
        time_ids = latents.new_tensor([size, size, 0, 0, size, size]).expand(batch, -1)
        timesteps = (uniform[:, 1] * self.scheduler.config.num_train_timesteps).long()
        added = noise.normal(*latents.shape[1:])
        prediction = self.trained["unet"](
            self.scheduler.add_noise(latents, added, timesteps),
            timesteps,
            condition.prompt_embeds.float() * keep[:, None, None],
            added_cond_kwargs={
                "text_embeds": condition.pooled_prompt_embeds.float() * keep[:, None],
                "time_ids": time_ids,
            },
        ).sample.float()
        kind = self.scheduler.config.prediction_type
        variance = 1 - self.scheduler.alphas_cumprod[timesteps]  # of the noise
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
        return {"loss": loss, "metrics": {k: v for k, v in metrics.items() if v.isfinite()}}


class AverageCallback(TrainerCallback):
    """Moves the average after every optimizer step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        getattr(model, "module", model).update_average()


def build(recipe: dict):
    config = LavitVisualTokenizerConfig(**recipe["model"])
    dataset = load_pictures(recipe["data"], config.image_size)
    if recipe["objective"]["condition"] == "features":
        tokenizer = LavitVisualTokenizer._from_config(config, attn_implementation="eager")
        pretrained = load_file(Path(recipe["encoder"]) / "model.safetensors")
        tokenizer.encoder.load_state_dict(
            {k.removeprefix("encoder."): v for k, v in pretrained.items() if k.startswith("encoder.")}
        )
        detokenizer = LavitDetokenizer._from_config(
            LavitDetokenizerConfig(**recipe["detokenizer"]), attn_implementation="eager"
        )
    else:
        folder = Path(recipe["tokenizer"])
        tokenizer = LavitVisualTokenizer.from_pretrained(folder / "visual_tokenizer", attn_implementation="eager")
        detokenizer = LavitDetokenizer.from_pretrained(folder / "detokenizer", attn_implementation="eager")
    vae = LavitPatchAutoencoder(**recipe["vae"])
    vae.fit(dataset.pictures.float() / 127.5 - 1)
    scheduler = DDIMScheduler(**recipe["scheduler"])
    if recipe["start"]:
        start = Path(recipe["start"])
        unet = LavitUNet2DConditionModel.from_pretrained(start / "unet")
        readout = LavitDetokenizer.from_pretrained(start / "detokenizer")
        detokenizer.prompt_projections.load_state_dict(readout.prompt_projections.state_dict())
        detokenizer.attention_pool.load_state_dict(readout.attention_pool.state_dict())
    else:
        unet = LavitUNet2DConditionModel(**recipe["unet"])
    unet.set_attn_processor(AttnProcessor())  # the backward of fused attention is slow on CPUs
    model = PixelDecoderTraining(tokenizer, detokenizer, unet, vae, scheduler, recipe)
    return model, dataset, [AverageCallback()]


@torch.no_grad()
def finish(model: PixelDecoderTraining, dataset: PictureDataset, recipe: dict, output: Path) -> None:
    """Writes the averaged detokenizer and UNet, the autoencoder and the scheduler."""
    for name, component in (*model.average.items(), ("vae", model.vae), ("scheduler", model.scheduler)):
        component.save_pretrained(output / name)
