"""LavitPipeline: prompts to visual tokens (the language model), visual tokens to pixels (detokenizer, UNet, VAE)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .calls_lavit import LavitCallsMixin, RunningCalls
from .candidates_lavit import Reranker, check_candidates, keep_best_candidates
from .checks_lavit import (
    as_generators,
    as_visual_tokens,
    check_components,
    check_count,
    check_latents,
    check_names,
    check_output_type,
)
from .defaults_lavit import LavitDefaults, read_defaults, store_defaults
from .denoising_lavit import LavitDenoiser
from .hub_lavit import LavitLoadingMixin
from .pipeline_saving_lavit import LavitSavingMixin
from .pixels_lavit import LavitPixelsMixin, load_pixel_decoder
from .prompts_lavit import Part, Prompt, as_batch
from .tokens_lavit import LavitTokensMixin
from .visual_tokens_lavit import LavitVisualTokens


@dataclass
class LavitPipelineOutput(BaseOutput):
    """What [`LavitPipeline`] returns.

    Args:
        images: PIL images, an array (batch, height, width, 3), a tensor (batch, 3, height, width), or latents.
        visual_tokens: what the images were decoded from, as [`LavitPipeline.generate_visual_tokens`] gives.
        nsfw_content_detected: a flag for each image; `None` where the pipeline has no safety checker.
    """

    images: list[Image.Image] | Any
    visual_tokens: LavitVisualTokens
    nsfw_content_detected: list[bool] | None = None


class LavitPipeline(
    LavitSavingMixin,
    LavitLoadingMixin,
    LavitCallsMixin,
    LavitTokensMixin,
    LavitPixelsMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    StableDiffusionXLLoraLoaderMixin,
):
    """Draws images from prompts of text and images, in two stages that can be used apart.

    ```python
    pipe = LavitPipeline.from_pretrained(path)
    pipe("a red apple").images[0]
    pipe([image, "it is running in the snow"]).images[0]       # one multimodal prompt
    pipe(["a cat", "a dog"], num_images_per_prompt=4)          # a batch; of multimodal prompts: a list of lists
    tokens = pipe.generate_visual_tokens("a red apple")        # the language model's part alone
    pipe(visual_tokens=tokens)                                 # the decoder's part alone
    pipe.reconstruct(image)                                    # image -> visual tokens -> image
    ```

    The denoising loop is that of `StableDiffusionXLPipeline`: callbacks, schedulers, offload, slicing, tiling, LoRA on
    the UNet, `guidance_rescale` and `output_type` behave as there. Threads may share a pipeline: a call changes no
    component and has a scheduler of its own. They draw by turns where weights are offloaded.

    Each stage runs without the other's components, which are `None` then and are not fetched:

    ```python
    writer = LavitPipeline.from_pretrained(path, detokenizer=None, unet=None, vae=None, scheduler=None)
    tokens = writer.generate_visual_tokens("a red apple")
    decoder = LavitPipeline.from_pretrained(path, processor=None, model=None)
    decoder(visual_tokens=tokens)
    ```

    Args:
        processor: a [`LavitProcessor`]; with `model` it makes visual tokens of prompts and images.
        model: a [`LavitForConditionalGeneration`].
        detokenizer: a [`LavitDetokenizer`]: visual tokens to the UNet's conditions.
        unet: a `UNet2DConditionModel` of SDXL's shape ("highres" detokenizer) or of SD 1.5's ("lowres").
        vae: an `AutoencoderKL` or [`LavitPatchAutoencoder`]; None for a pipeline that gives latents alone.
        scheduler: any scheduler of Stable Diffusion.
        safety_checker, feature_extractor: a `StableDiffusionSafetyChecker` and its `CLIPImageProcessor`; flagged
            images come back black.
        aspect_ratios, default_num_inference_steps, default_decoder_guidance_scale: what a call uses when it does not
            say; written into the detokenizer's config, where such defaults live. None leaves what is there.
        default_guidance_scale, default_multimodal_guidance_scale, default_top_k, default_temperature: likewise, of the
            language model: written into `model.generation_config.generation_presets["image"]`.
    """

    model_cpu_offload_seq = "model->detokenizer->unet->vae"
    _optional_components = [
        "processor",
        "model",
        "detokenizer",
        "unet",
        "vae",
        "scheduler",
        "safety_checker",
        "feature_extractor",
    ]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = LavitDenoiser._callback_tensor_inputs
    # the text encoders that SDXL's LoRA files and methods speak of are none here
    _lora_loadable_modules = ["unet", "text_encoder", "text_encoder_2"]
    text_encoder = text_encoder_2 = None

    def __init__(
        self,
        processor: ProcessorMixin | None,
        model: PreTrainedModel | None,
        detokenizer: PreTrainedModel | None,
        unet,
        vae,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        aspect_ratios: dict | None = None,
        default_num_inference_steps: int | None = None,
        default_decoder_guidance_scale: float | None = None,
        default_guidance_scale: float | None = None,
        default_multimodal_guidance_scale: float | None = None,
        default_top_k: int | None = None,
        default_temperature: float | None = None,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs the feature_extractor that prepares its input")
        boi_token_id = getattr(processor, "boi_token_id", None)
        if processor and model and boi_token_id != model.config.vocabulary.boi_token_id:
            raise ValueError(
                f"the processor's [IMG] has the id {boi_token_id}, the model's is "
                f"{model.config.vocabulary.boi_token_id}: of different checkpoints, or tokenizer.json is missing"
            )
        self.register_modules(
            processor=processor,
            model=model,
            detokenizer=detokenizer,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        store_defaults(
            model,
            detokenizer,
            of_model={
                "guidance_scale": default_guidance_scale,
                "multimodal_guidance_scale": default_multimodal_guidance_scale,
                "top_k": default_top_k,
                "temperature": default_temperature,
            },
            of_decoder={
                "aspect_ratios": aspect_ratios and {name: list(size) for name, size in aspect_ratios.items()},
                "vae_scale_factor": vae and 2 ** (len(vae.config.block_out_channels) - 1),
                "default_num_inference_steps": default_num_inference_steps,
                "default_decoder_guidance_scale": default_decoder_guidance_scale,
            },
        )
        self.vae_scale_factor: int | Any = detokenizer.config.vae_scale_factor if detokenizer else None
        self.default_size: tuple[int, int] | Any = None  # without a pixel decoder
        if detokenizer and unet:
            sample_size = unet.config.sample_size
            height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            self.default_size = (height * self.vae_scale_factor, width * self.vae_scale_factor)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor or 8)
        self._calls = RunningCalls()

    @property
    def defaults(self) -> LavitDefaults:
        """What a call uses when it does not say: what the components' configs hold, or else the official settings."""
        return read_defaults(self.model, self.detokenizer, self.default_size)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, pixel_decoder: str | None = None, **kwargs
    ) -> "LavitPipeline":
        """Loads a folder or repository, see `DiffusionPipeline.from_pretrained`.

        Args:
            pretrained_model_name_or_path: with `model_index.json`.
            pixel_decoder: a subfolder that holds another detokenizer, UNet, VAE and scheduler, used in place of the
                main ones: "lowres" in folders converted with both decoders.
        """
        if pixel_decoder is not None:
            kwargs = load_pixel_decoder(pretrained_model_name_or_path, pixel_decoder, kwargs)
            # those that an earlier version of this class wrote into model_index.json are of the main decoder
            kwargs.setdefault("aspect_ratios", None)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "LavitPipeline":
        """A pipeline of another's components, which both then share, see `DiffusionPipeline.from_pipe`.

        As there, the components are put into `dtype`, float32 by default.
        """
        # given by name they may be of any class; the base class compares theirs with one
        own = {name: pipeline.components[name] for name in ("unet", "vae") if name in pipeline.components}
        return super().from_pipe(pipeline, **{**own, **kwargs})  # pyright: ignore[reportReturnType]

    def check_inputs(
        self,
        prompt: Prompt | None,
        visual_tokens: LavitVisualTokens | Sequence | None,
        num_images_per_prompt: int,
        output_type: str,
        token_kwargs: dict[str, Any],
    ):
        """Refuses arguments of a call that contradict each other or are out of range, before any model runs.

        Raises:
            ValueError: with what was given and what is allowed.
        """
        check_names(token_kwargs)
        if visual_tokens is not None and token_kwargs:
            raise ValueError(f"{sorted(token_kwargs)} are of the stage that visual_tokens replace")
        if (prompt is None) == (visual_tokens is None):
            raise ValueError("give either prompt or visual_tokens" + ("" if prompt is None else ", not both"))
        if prompt is not None:
            check_components(self, "a prompt", "processor", "model")
        check_components(self, "an image", "detokenizer", "unet", "scheduler")
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_output_type(output_type, self.vae)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        visual_tokens: LavitVisualTokens | Sequence[torch.Tensor] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        decoder_guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        num_candidates: int = 1,
        reranker: Reranker | None = None,
        **token_kwargs,
    ) -> LavitPipelineOutput | Any:
        """Draws.

        Args:
            prompt: see [`~LavitPipeline.generate_visual_tokens`].
            visual_tokens: in place of a prompt: what `generate_visual_tokens` or the visual tokenizer returned, or a
                list of 1-D tensors of codes, one for each image.
            height, width, aspect_ratio: in pixels, or one of `defaults.aspect_ratios`; by default the UNet's own size.
            num_images_per_prompt: of a prompt: distinct visual tokens; of given visual tokens: distinct decodings.
            num_inference_steps, timesteps, sigmas, eta, guidance_rescale, latents, cross_attention_kwargs,
                original_size, crops_coords_top_left, target_size: as in `StableDiffusionXLPipeline`.
            decoder_guidance_scale: of the UNet; up to 1 means none. The language model's is `guidance_scale`.
            decoder_guidance_interval: shares of the denoising steps between which the UNet is guided; the others cost
                half.
            generator: one, or one for each image: it drives the visual tokens first and then the noise, so that an
                image of a batch is the image drawn alone with its generator.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return a [`LavitPipelineOutput`] or a tuple with its entries.
            callback_on_step_end: `callback(pipe, step, timestep, tensors)` after every denoising step, which returns
                a dict of the tensors that it changes, or None; or a `PipelineCallback` of diffusers. `pipe` is the
                `StableDiffusionXLPipeline` that runs the loop of this call (`pipe._interrupt = True` stops it), which
                has this pipeline's components too.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback is given.
            num_candidates: images drawn for each one that is returned; above 1 it needs a `reranker`.
            reranker: `reranker(images, texts)` gives a score for each pair, and the best candidate is kept; a CLIP
                for example.
            token_kwargs: of `generate_visual_tokens`: `guidance_scale`, `negative_prompt`, `temperature`, `top_k`,
                `top_p`, `max_image_tokens`, `reference_compat`, `callback_on_token`, ...

        Returns:
            A [`LavitPipelineOutput`]: images of all prompts, each prompt's together, and their visual tokens.

        Raises:
            ValueError: contradictory or unknown arguments, empty prompts, more visual tokens than can be decoded.
        """
        self.check_inputs(prompt, visual_tokens, num_images_per_prompt, output_type, token_kwargs)
        height, width = self.choose_size(height, width, aspect_ratio)
        denoising = self.check_denoising(
            num_inference_steps=num_inference_steps,
            decoder_guidance_scale=decoder_guidance_scale,
            decoder_guidance_interval=decoder_guidance_interval,
            guidance_rescale=guidance_rescale,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
        )
        check_candidates(num_candidates, reranker, prompt, output_type)
        num_images_per_prompt *= num_candidates
        prompts: list[list[Part]] = []
        if visual_tokens is not None:
            visual_tokens = as_visual_tokens(visual_tokens)
            num_images = len(visual_tokens.lengths) * num_images_per_prompt
        else:
            prompts = as_batch(prompt)
            num_images = len(prompts) * num_images_per_prompt
        generator = as_generators(generator, num_images)
        if latents is not None:
            check_latents(latents, self.latents_shape(num_images, height, width))

        with self._calls.begin(one_at_a_time=self._takes_turns):
            if visual_tokens is None:
                visual_tokens = self.generate_visual_tokens(
                    prompts, num_images_per_prompt=num_images_per_prompt, generator=generator, **token_kwargs
                )
                num_images_per_prompt = 1
            conditions, mask = self.encode_visual_tokens(visual_tokens, num_images_per_prompt)
            if latents is None:
                latents = self.prepare_latents(num_images, height, width, generator)
            latents = self.denoise(latents, conditions, mask, height, width, generator, **denoising)
            images, flags = self.decode_images(latents, output_type)
            self.maybe_free_model_hooks()
        if reranker is not None:
            images, visual_tokens, flags = keep_best_candidates(
                reranker,
                num_candidates,
                prompts,
                images,  # pyright: ignore[reportArgumentType]
                visual_tokens,
                flags,
            )
        if not return_dict:
            return images, visual_tokens, flags
        return LavitPipelineOutput(images=images, visual_tokens=visual_tokens, nsfw_content_detected=flags)
