"""Stage 3 of the embedded checkpoint: a small new UNet on the encoder's own features, before a tokenizer exists
(`condition: features`), then on what the detokenizer makes of the codes."""

import json

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from modeling_lavit.configuration_lavit import LavitDetokenizerConfig, LavitVisualTokenizerConfig
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer, LavitDetokenizerOutput
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.pixels_lavit import unscale_latents
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder, LavitUNet2DConditionModel
from modeling_lavit.training.data.augmentation import SampleNoise
from modeling_lavit.training.data.datasets import collate_images
from modeling_lavit.training.distributed import ragged_mean
from modeling_lavit.training.emoji.images import load_named
from modeling_lavit.training.emoji.pretrain_encoder import load_pretrained
from modeling_lavit.training.emoji.recipe import EmojiPixelDecoderRecipe
from modeling_lavit.training.results import result_of
from modeling_lavit.training.train_pixel_decoder import PixelDecoderStage, PixelDecoderTraining


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
AUTOENCODER = {"patch_size": 4, "latent_channels": 24}
UNET = {
    "sample_size": 12,
    "in_channels": 24,
    "out_channels": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 176,
}


class EmojiPixelDecoderTraining(PixelDecoderTraining):
    """The diffusion loss on other conditions, and with a perceptual term."""

    def __init__(self, tokenizer, detokenizer, unet, vae, scheduler, recipe: EmojiPixelDecoderRecipe):
        super().__init__(tokenizer, detokenizer, unet, vae, scheduler, recipe)
        if self.objective.train_detokenizer:
            detokenizer.requires_grad_(True)
            detokenizer.codebook.requires_grad_(False)
        if self.objective.perceptual_weight and scheduler.config.prediction_type != "sample":
            raise ValueError(
                "objective.perceptual_weight needs a scheduler whose prediction_type is 'sample', got "
                f"{scheduler.config.prediction_type!r}"
            )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) in [0, 1] to the encoder's normalised features (B, N, C)."""
        features = self.tokenizer.encode_patches(self.pixel_values(images)).float()
        return F.layer_norm(features, features.shape[-1:])

    def conditions(self, images: torch.Tensor, noise: SampleNoise) -> LavitDetokenizerOutput:
        """Those of features, or of codes, a share of which is replaced by others."""
        detokenizer = self.used["detokenizer"]
        if self.objective.condition == "features":
            with torch.no_grad():
                features = self.features(images)
            return detokenizer.conditions(features)
        if not self.training:
            return super().conditions(images, noise)
        with torch.no_grad():
            tokens = self.tokenizer.tokenize(self.pixel_values(images))
        patches = torch.arange(self.tokenizer.config.num_patches, device=tokens.lengths.device)
        kept = patches < tokens.lengths[:, None]
        uniform = noise.uniform(self.tokenizer.config.num_patches, 2)[kept]
        corrupted = uniform[:, 0] < self.objective.code_corruption
        others = (uniform[:, 1] * detokenizer.config.codebook_size).long()
        return detokenizer(torch.where(corrupted, others, tokens.codes), tokens.lengths)

    def perceptual_distances(self, latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Cosine distances (B,), means over patches, between what the tokenizer's encoder sees in the images of
        predicted latents (B, C, h, w) and in the images (B, 3, S, S) in [0, 1] themselves (as LPIPS, arXiv 1801.03924,
        with the encoder that is here): squared errors alone blur what tells one drawing style from another."""
        predicted = self.vae.decode(unscale_latents(latents, self.vae.config)).sample.float() / 2 + 0.5
        with torch.no_grad():
            seen = self.features(images)
        return (1 - F.cosine_similarity(self.features(predicted), seen, dim=-1)).mean(1)

    def further_loss(self, latents: torch.Tensor, images: torch.Tensor, keep: torch.Tensor) -> tuple:
        if not self.objective.perceptual_weight:
            return 0.0, {}
        distance = ragged_mean(self.perceptual_distances(latents, images), keep.float())
        return self.objective.perceptual_weight * distance, {"perceptual": distance}


class EmojiPixelDecoderStage(PixelDecoderStage):
    """Stage 3 on images with names and styles."""

    recipe_class = EmojiPixelDecoderRecipe
    training_class = EmojiPixelDecoderTraining

    def conditioners(self, recipe: EmojiPixelDecoderRecipe) -> tuple[LavitVisualTokenizer, LavitDetokenizer]:
        """Without a tokenizer, the encoder of stage 0 in a new one."""
        if recipe.objective.condition == "codes":
            return super().conditioners(recipe)
        config = LavitVisualTokenizerConfig(**recipe.model.model_dump(exclude_none=True))
        tokenizer = LavitVisualTokenizer._from_config(config, attn_implementation="eager")
        labels = json.loads(result_of("encoder", recipe.encoder, "labels.json").read_text())
        load_pretrained(recipe.encoder, tokenizer, labels["styles"])
        sizes = LavitDetokenizerConfig(**recipe.detokenizer.model_dump(exclude_none=True))
        return tokenizer, LavitDetokenizer._from_config(sizes, attn_implementation="eager")

    def data(self, recipe: EmojiPixelDecoderRecipe, size: int) -> tuple:
        parts = load_named(recipe.data, size)
        for images in filter(None, parts):
            images.collate = collate_images  # names and styles are left out
        return parts

    def denoiser(self, recipe: EmojiPixelDecoderRecipe, detokenizer: LavitDetokenizer, dataset) -> tuple:
        """Those of `start`, or new ones."""
        if recipe.start:
            return super().denoiser(recipe, detokenizer, dataset)
        unet = LavitUNet2DConditionModel(**UNET, **recipe.unet.model_dump())
        vae = LavitPatchAutoencoder(**AUTOENCODER)
        vae.fit(dataset.images[: recipe.vae_images].float() / 127.5 - 1)
        return unet, vae, DDIMScheduler(**SCHEDULER)
