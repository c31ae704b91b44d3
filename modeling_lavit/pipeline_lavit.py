"""LavitPipeline: prompts to visual tokens (the language model), visual tokens to pixels (detokenizer, UNet, VAE)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .denoising_lavit import IntervalUNet, LavitDenoiser, MaskedUNet, TokenObserver
from .hub_lavit import LavitSavingMixin
from .modeling_lavit_detokenizer import LavitDetokenizer
from .modeling_lavit_visual_tokenizer import LavitVisualTokens
from .prompts_lavit import Prompt, as_batch


# (height, width) of the official high-resolution decoder
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "2:3": (1216, 832),
    "3:4": (1152, 896),
}

LOADING_OPTIONS = (
    "cache_dir",
    "dtype",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "torch_dtype",
)


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


class LavitPipeline(LavitSavingMixin, DiffusionPipeline, StableDiffusionMixin, StableDiffusionXLLoraLoaderMixin):
    """Draws pictures from prompts of text and pictures, in two stages that can be used apart.

    ```python
    pipe = LavitPipeline.from_pretrained(path)
    pipe("a red apple").images[0]
    pipe([picture, "it is running in the snow"]).images[0]     # one multimodal prompt
    pipe(["a cat", "a dog"], num_images_per_prompt=4)          # a batch; of multimodal prompts: a list of lists
    tokens = pipe.generate_visual_tokens("a red apple")        # the language model's part alone
    pipe(visual_tokens=tokens)                                 # the decoder's part alone
    pipe.reconstruct(picture)                                  # picture -> visual tokens -> picture
    ```

    The denoising loop is that of `StableDiffusionXLPipeline`: callbacks, schedulers, offload, slicing, tiling, LoRA on
    the UNet, `guidance_rescale` and `output_type` behave as there.

    Args:
        processor: a [`LavitProcessor`].
        model: a [`LavitForConditionalGeneration`].
        detokenizer: a [`LavitDetokenizer`]: visual tokens to the UNet's conditions.
        unet: a `UNet2DConditionModel` of SDXL's shape ("highres" detokenizer) or of SD 1.5's ("lowres").
        vae: an `AutoencoderKL` or [`LavitPatchAutoencoder`].
        scheduler: any scheduler of Stable Diffusion.
        safety_checker, feature_extractor: a `StableDiffusionSafetyChecker` and its `CLIPImageProcessor`; flagged
            images come back black.
        aspect_ratios: name -> (height, width). By default those of the official decoder where the UNet is of that
            size, else "1:1" alone.
        default_...: what a call uses when it does not say: properties of the checkpoint.
    """

    model_cpu_offload_seq = "model->detokenizer->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = LavitDenoiser._callback_tensor_inputs
    _lora_loadable_modules = ["unet"]
    text_encoder = text_encoder_2 = None

    def __init__(
        self,
        processor: ProcessorMixin,
        model: PreTrainedModel,
        detokenizer: PreTrainedModel,
        unet,
        vae,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        aspect_ratios: dict | None = None,
        default_num_inference_steps: int = 25,
        default_decoder_guidance_scale: float = 7.0,
        default_guidance_scale: float = 4.0,
        default_multimodal_guidance_scale: float = 5.0,
        default_top_k: int = 50,
        default_temperature: float = 1.0,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs the feature_extractor that prepares its input")
        if processor.boi_token_id != model.config.vocabulary.boi_token_id:
            raise ValueError(
                f"the processor's [IMG] has the id {processor.boi_token_id}, the model's is "
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
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        sample_size = unet.config.sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.default_size = (height * self.vae_scale_factor, width * self.vae_scale_factor)
        if aspect_ratios is None:
            aspect_ratios = ASPECT_RATIOS if self.default_size == (1024, 1024) else {"1:1": self.default_size}
        self.register_to_config(
            aspect_ratios={name: list(size) for name, size in aspect_ratios.items()},
            default_num_inference_steps=default_num_inference_steps,
            default_decoder_guidance_scale=default_decoder_guidance_scale,
            default_guidance_scale=default_guidance_scale,
            default_multimodal_guidance_scale=default_multimodal_guidance_scale,
            default_top_k=default_top_k,
            default_temperature=default_temperature,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # A saved folder names its own copy of this class, for those who do not have it. Here it is at hand.
        return {**super()._dict_from_json_file(json_file), "_class_name": cls.__name__}

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
            forwarded = {name: kwargs[name] for name in LOADING_OPTIONS if name in kwargs}
            classes = {
                "detokenizer": LavitDetokenizer,
                "unet": UNet2DConditionModel,
                "vae": AutoencoderKL,
                "scheduler": DDIMScheduler,
            }
            for name, component_class in classes.items():
                is_model = component_class is not DDIMScheduler
                options = {k: v for k, v in forwarded.items() if is_model or k not in ("dtype", "torch_dtype")}
                subfolder = f"{pixel_decoder}/{name}"
                if name not in kwargs:
                    kwargs[name] = component_class.from_pretrained(
                        pretrained_model_name_or_path, subfolder=subfolder, **options
                    )
            # the sizes of the main decoder are not this one's
            kwargs.setdefault("aspect_ratios", None)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def check_inputs(
        self,
        prompt: Prompt | None,
        visual_tokens: LavitVisualTokens | list | None,
        height: int | None,
        width: int | None,
        aspect_ratio: str | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        decoder_guidance_interval: tuple[float, float] = (0.0, 1.0),
    ):
        """Refuses contradictory arguments before any model runs.

        Raises:
            ValueError: with what was wrong and what is allowed.
        """
        if (prompt is None) == (visual_tokens is None):
            raise ValueError("give either prompt or visual_tokens" + ("" if prompt is None else ", not both"))
        if aspect_ratio is not None:
            if height is not None or width is not None:
                raise ValueError("give either aspect_ratio or height and width, not both")
            if aspect_ratio not in self.config.aspect_ratios:
                raise ValueError(
                    f"aspect_ratio must be one of {list(self.config.aspect_ratios)}, got {aspect_ratio!r}"
                )
        for name, size in (("height", height), ("width", width)):
            if size is not None and (size <= 0 or size % 8 or size % self.vae_scale_factor):
                raise ValueError(f"{name} must be a positive multiple of {max(8, self.vae_scale_factor)}, got {size}")
        start, stop = decoder_guidance_interval
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"decoder_guidance_interval must be (start, stop) with 0 <= start < stop <= 1, got {(start, stop)}"
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )

    @torch.no_grad()
    def generate_visual_tokens(
        self,
        prompt: Prompt,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        max_image_tokens: int | None = None,
        reference_compat: bool = False,
        callback_on_token: Callable[[int, torch.Tensor], None] | None = None,
        **generate_kwargs,
    ) -> LavitVisualTokens:
        """The first stage alone: the language model writes the visual tokens of every image.

        Args:
            prompt: a string, a picture, or a list of both: one multimodal prompt. A list of strings only, or a list of
                lists, is a batch.
            num_images_per_prompt: distinct draws for each prompt.
            generator: one, or one for each image (prompts * num_images_per_prompt, a prompt's images together).
            guidance_scale: of the language model; 1 switches guidance off. By default that of the checkpoint for text
                prompts, or for prompts with pictures.
            temperature, top_k, top_p: of the sampling.
            max_image_tokens: at most so many tokens; by default 200, or what the detokenizer takes if that is less.
            reference_compat: the reference's quirks, see [`LavitForConditionalGeneration.generate`].
            callback_on_token: called as `callback(step, ids)` with the newest ids (images,) after every step.
            generate_kwargs: of [`LavitForConditionalGeneration.generate`]: `min_image_tokens`, `do_sample`, ...

        Returns:
            The visual tokens of all images, each prompt's together.

        Raises:
            ValueError: an empty prompt, a wrong number of generators, a prompt longer than the context.
        """
        prompts = as_batch(prompt)
        self._check_generators(generator, len(prompts) * num_images_per_prompt)
        if guidance_scale is None:
            scales = [
                self.config.default_guidance_scale
                if all(isinstance(part, str) for part in parts)
                else self.config.default_multimodal_guidance_scale
                for parts in prompts
            ]
            if len(set(scales)) > 1:
                rows: dict[int, torch.Tensor] = {}
                for scale in sorted(set(scales)):
                    chosen = [i for i, its_scale in enumerate(scales) if its_scale == scale]
                    images = [i * num_images_per_prompt + j for i in chosen for j in range(num_images_per_prompt)]
                    part = self.generate_visual_tokens(
                        [prompts[i] for i in chosen],
                        num_images_per_prompt,
                        [generator[i] for i in images] if isinstance(generator, list) else generator,
                        scale,
                        temperature,
                        top_k,
                        top_p,
                        max_image_tokens,
                        reference_compat,
                        callback_on_token,
                        **generate_kwargs,
                    )
                    rows |= dict(zip(images, part.split(), strict=True))
                return LavitVisualTokens.join([rows[i] for i in range(len(rows))])
            guidance_scale = scales[0]
        inputs = self._encode_prompts(prompts, reference_compat).to(self._execution_device)
        max_image_tokens = max_image_tokens or min(200, self.detokenizer.config.num_queries)
        if max_image_tokens > self.detokenizer.config.num_queries:
            raise ValueError(
                f"max_image_tokens is {max_image_tokens}, but the detokenizer takes "
                f"{self.detokenizer.config.num_queries} visual tokens at most"
            )
        if hasattr(self.model, "_hf_hook"):
            self.model._hf_hook.pre_forward(self.model)
        with self.progress_bar(total=max_image_tokens + 1) as progress_bar:
            progress_bar.set_description("visual tokens")
            ids = self.model.generate(
                **inputs,
                generation_mode="image",
                num_return_sequences=num_images_per_prompt,
                generator=generator,
                guidance_scale=guidance_scale,
                temperature=self.config.default_temperature if temperature is None else temperature,
                top_k=self.config.default_top_k if top_k is None else top_k,
                top_p=top_p,
                max_image_tokens=max_image_tokens,
                reference_compat=reference_compat,
                stopping_criteria=[TokenObserver(progress_bar, callback_on_token)],
                **generate_kwargs,
            )
        vocabulary = self.model.config.vocabulary
        codes = ids - vocabulary.visual_offset
        is_code = (codes >= 0) & (codes < vocabulary.codebook_size)
        return LavitVisualTokens(codes=codes[is_code], lengths=is_code.sum(1), keep_mask=None, keep_logprobs=None)

    def encode_visual_tokens(
        self, visual_tokens: LavitVisualTokens, num_images_per_prompt: int = 1
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The detokenizer: visual tokens to the UNet's conditions.

        Returns:
            `prompt_embeds` (images, conditions, width), `pooled_prompt_embeds` (images, width) and their `negative_`
            counterparts; and the mask (2 * images, conditions) over [unconditional; conditional], or `None` where all
            conditions count.
        """
        rows = [codes for codes in visual_tokens.split() for _ in range(num_images_per_prompt)]
        device = self._execution_device
        lengths = torch.tensor([len(codes) for codes in rows], device=device)
        cond = self.detokenizer(torch.cat(rows).to(device), lengths)
        if hasattr(self.detokenizer, "_hf_hook"):
            self.detokenizer._hf_hook.pre_forward(self.detokenizer)
        uncond = self.detokenizer.unconditional(len(rows), device)
        mask = None
        if uncond.attention_mask is not None:
            mask = torch.cat([uncond.attention_mask, cond.attention_mask]).to(device)

        conditions = {
            "prompt_embeds": cond.prompt_embeds,
            "negative_prompt_embeds": uncond.prompt_embeds,
            # SDXL's loop wants a pooled condition; an SD-1.5-shaped UNet ignores it
            "pooled_prompt_embeds": cond.prompt_embeds[:, 0] if mask is not None else cond.pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": uncond.prompt_embeds[:, 0]
            if mask is not None
            else uncond.pooled_prompt_embeds,
        }
        return {name: value.to(device, self.unet.dtype) for name, value in conditions.items()}, mask

    def prepare_latents(
        self, batch_size: int, height: int, width: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """Noise (batch, channels, height, width) / vae_scale_factor, drawn in float32 whatever the UNet's dtype."""
        shape = (
            batch_size,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return noise.to(self.unet.dtype)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE: latents to pixels (batch, 3, height, width) in -1..1."""
        vae = self.vae
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            # It overflows in half precision. The component itself stays as it is: others may share it.
            vae = type(vae).from_config(vae.config).to(self._execution_device).eval()
            vae.load_state_dict(self.vae.state_dict())
            vae.use_slicing, vae.use_tiling = self.vae.use_slicing, self.vae.use_tiling
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    def run_safety_checker(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Blackens flagged images, (batch, 3, height, width) in -1..1; flags are `None` without a safety checker."""
        if self.safety_checker is None:
            return images, None
        pictures = self.image_processor.postprocess(images, output_type="pil")
        clip_input = self.feature_extractor(pictures, return_tensors="pt").pixel_values
        array = images.float().permute(0, 2, 3, 1).cpu().numpy()
        checker = self.safety_checker
        _, flags = checker(images=array, clip_input=clip_input.to(self._execution_device, checker.dtype))
        flagged = torch.tensor(flags, device=images.device)[:, None, None, None]
        return images.masked_fill(flagged, -1.0), flags

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        visual_tokens: LavitVisualTokens | list[torch.Tensor] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        decoder_guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        **token_kwargs,
    ) -> LavitPipelineOutput | tuple:
        """Draws.

        Args:
            prompt: see [`~LavitPipeline.generate_visual_tokens`].
            visual_tokens: in place of a prompt: what `generate_visual_tokens` or the visual tokenizer returned, or a
                list of 1-D tensors of codes, one for each image.
            height, width, aspect_ratio: in pixels, or one of `config.aspect_ratios`; by default the UNet's own size.
            num_images_per_prompt: of a prompt: distinct visual tokens; of given visual tokens: distinct decodings.
            num_inference_steps, timesteps, sigmas, eta, guidance_rescale, latents, cross_attention_kwargs,
                original_size, crops_coords_top_left, target_size: as in `StableDiffusionXLPipeline`.
            decoder_guidance_scale: of the UNet, 1 switches guidance off. The language model's is `guidance_scale`.
            decoder_guidance_interval: shares of the denoising steps between which the UNet is guided; the others cost
                half.
            generator: one, or one for each image: it drives the visual tokens first and then the noise, so that an
                image of a batch is the image drawn alone with its generator.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return a [`LavitPipelineOutput`] or a tuple with its entries.
            callback_on_step_end: `callback(pipe, step, timestep, tensors)` -> dict, after every denoising step; `pipe`
                is the `StableDiffusionXLPipeline` that runs the loop (`pipe._interrupt = True` stops it).
            token_kwargs: of `generate_visual_tokens`: `guidance_scale`, `temperature`, `top_k`, `top_p`,
                `max_image_tokens`, `reference_compat`, `callback_on_token`, ...

        Raises:
            ValueError: contradictory or unknown arguments, empty prompts, more visual tokens than can be decoded.
        """
        self.check_inputs(
            prompt,
            visual_tokens,
            height,
            width,
            aspect_ratio,
            callback_on_step_end_tensor_inputs,
            decoder_guidance_interval,
        )
        if visual_tokens is None:
            visual_tokens = self.generate_visual_tokens(
                prompt, num_images_per_prompt=num_images_per_prompt, generator=generator, **token_kwargs
            )
            num_images_per_prompt = 1
        elif token_kwargs:
            raise ValueError(f"{sorted(token_kwargs)} are of the stage that visual_tokens replace")
        elif isinstance(visual_tokens, list):
            visual_tokens = LavitVisualTokens.join(visual_tokens)
        batch_size = len(visual_tokens.lengths) * num_images_per_prompt
        self._check_generators(generator, batch_size)

        default_height, default_width = self.config.aspect_ratios[aspect_ratio] if aspect_ratio else self.default_size
        height, width = height or default_height, width or default_width
        if decoder_guidance_scale is None:
            decoder_guidance_scale = self.config.default_decoder_guidance_scale
        conditions, mask = self.encode_visual_tokens(visual_tokens, num_images_per_prompt)
        if latents is None:
            latents = self.prepare_latents(batch_size, height, width, generator)

        unet = self.unet if mask is None else MaskedUNet(self.unet, mask)
        if decoder_guidance_scale > 1 and tuple(decoder_guidance_interval) != (0, 1):
            unet = IntervalUNet(unet, self.scheduler, decoder_guidance_interval)
        denoiser = LavitDenoiser(
            vae=self.vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=self.scheduler,
            add_watermarker=False,
        )
        denoiser.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        latents = denoiser(
            **conditions,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps or self.config.default_num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=decoder_guidance_scale,
            guidance_rescale=guidance_rescale,
            generator=generator,
            eta=eta,
            latents=latents,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            output_type="latent",
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        ).images

        flags = None
        if output_type == "latent":
            images = latents
        else:
            images, flags = self.run_safety_checker(self.decode_latents(latents))
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, visual_tokens, flags
        return LavitPipelineOutput(images=images, visual_tokens=visual_tokens, nsfw_content_detected=flags)

    @torch.no_grad()
    def reconstruct(
        self,
        image: Image.Image | list[Image.Image],
        selection: str | None = None,
        keep_ratio: float | None = None,
        reference_compat: bool = False,
        **decode_kwargs,
    ) -> LavitPipelineOutput | tuple:
        """Pictures to visual tokens and back: what the tokens keep.

        Args:
            image: a picture or a list of them.
            selection, keep_ratio: which patches are kept, see [`LavitVisualTokenizer.tokenize`].
            reference_compat: convert pictures to RGB as the reference does, see [`LavitImageProcessor`].
            decode_kwargs: of a call with `visual_tokens`.
        """
        prepared = self.processor.image_processor(image, reference_compat=reference_compat, return_tensors="pt")
        pixel_values = prepared.pixel_values
        if hasattr(self.model, "_hf_hook"):
            self.model._hf_hook.pre_forward(self.model)
        visual_tokens = self.model.get_image_tokens(
            pixel_values.to(self._execution_device), selection=selection, keep_ratio=keep_ratio
        )
        return self(visual_tokens=visual_tokens, **decode_kwargs)

    def _encode_prompts(self, prompts: list[list[str | Image.Image]], reference_compat: bool):
        mark = self.processor.image_token
        texts = ["".join(part if isinstance(part, str) else mark for part in parts) for parts in prompts]
        images = [[part for part in parts if not isinstance(part, str)] for parts in prompts]
        return self.processor(
            text=texts,
            images=images if any(images) else None,
            generation_mode="image",
            reference_compat=reference_compat,
            return_tensors="pt",
        )

    def _check_generators(self, generator: torch.Generator | list[torch.Generator] | None, count: int):
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{count} images are drawn, but {len(generator)} generators given: one for each image")
