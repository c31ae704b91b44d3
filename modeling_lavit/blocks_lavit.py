"""[`LavitPipeline`] in pieces: blocks for diffusers' `ModularPipeline`, each of which runs one step of that pipeline.

LavitBlocks
    tokens
        prompt      text and images to visual tokens, by the language model
        image       images to their own visual tokens, by the visual tokenizer
    conditions      visual tokens to the UNet's conditions, by the detokenizer
    latents         noise
    denoise         noise and conditions to latents of images, by the UNet
    decode          latents to images, by the VAE
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ComponentSpec,
    ConditionalPipelineBlocks,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    SchedulerMixin,
    SequentialPipelineBlocks,
    UNet2DConditionModel,
)
from transformers import ProcessorMixin

from .checks_lavit import (
    as_generators,
    as_visual_tokens,
    check_components,
    check_count,
    check_latents,
    check_output_type,
)
from .modeling_lavit import LavitForConditionalGeneration
from .modeling_lavit_detokenizer import LavitDetokenizer
from .pipeline_lavit import LavitPipeline
from .visual_tokens_lavit import LavitVisualTokens


# classes that a component has unless a checkpoint says otherwise
COMPONENTS = {
    "processor": ProcessorMixin,
    "model": LavitForConditionalGeneration,
    "detokenizer": LavitDetokenizer,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "scheduler": SchedulerMixin,
    "safety_checker": None,
    "feature_extractor": None,
}
CONDITIONS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
# of `LavitPipeline.check_denoising`
DENOISING = {
    "num_inference_steps": None,
    "decoder_guidance_scale": None,
    "decoder_guidance_interval": (0.0, 1.0),
    "guidance_rescale": 0.0,
    "cross_attention_kwargs": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ("latents",),
    "timesteps": None,
    "sigmas": None,
    "eta": 0.0,
    "original_size": None,
    "crops_coords_top_left": (0, 0),
    "target_size": None,
}
SELECTING = ("selection", "keep_ratio", "keep", "target_quality")
SAMPLING = ("negative_prompt", "temperature", "top_k", "top_p", "max_image_tokens", "callback_on_token")


class LavitBlock(ModularPipelineBlocks):
    """A step of [`LavitPipeline`], run on the components that the modular pipeline has.

    A subclass gives the names of the components that it needs, its inputs and outputs, and `run(pipe, given)`, which
    returns the outputs. Inputs and outputs have the names and meanings that they have there.
    """

    model_name = "lavit"
    needs: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self._progress_bar_options: dict[str, Any] = {}

    def set_progress_bar_config(self, **kwargs):
        """See `DiffusionPipeline.set_progress_bar_config`."""
        self._progress_bar_options = kwargs

    @property
    def description(self) -> str:
        return (type(self).__doc__ or "").strip()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name, COMPONENTS[name]) for name in self.needs]

    def run(self, pipe: LavitPipeline, given: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, components, state):
        block_state: Any = self.get_block_state(state)
        pipe = LavitPipeline(**{name: getattr(components, name, None) for name in COMPONENTS})
        pipe.set_progress_bar_config(**self._progress_bar_options)
        for name, value in self.run(pipe, block_state.as_dict()).items():
            block_state[name] = value
        self.set_block_state(state, block_state)
        return components, state


class LavitPromptToTokens(LavitBlock):
    """Prompts of text and images to visual tokens, by the language model."""

    needs = ("processor", "model")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt", required=True, description="See `LavitPipeline.generate_visual_tokens`."),
            InputParam("num_images_per_prompt", type_hint=int, default=1, description="Distinct draws."),
            InputParam("generator", description="One torch.Generator, or one for each image."),
            InputParam("guidance_scale", description="Of the language model, one or one for each prompt."),
            *(InputParam(name, description="See `LavitPipeline.generate_visual_tokens`.") for name in SAMPLING),
            InputParam("reference_compat", type_hint=bool, default=False, description="The reference's quirks."),
            InputParam("generate_kwargs", type_hint=dict, default={}, description="More arguments of `generate`."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("visual_tokens", type_hint=LavitVisualTokens)]

    def run(self, pipe, given):
        return {"visual_tokens": pipe.generate_visual_tokens(**given.pop("generate_kwargs"), **given)}


class LavitImageToTokens(LavitBlock):
    """Images to their visual tokens, by the visual tokenizer."""

    needs = ("processor", "model")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("image", required=True, description="One, or a list of them."),
            *(InputParam(name, description="See `LavitVisualTokenizer.select`.") for name in SELECTING),
            InputParam("reference_compat", type_hint=bool, default=False, description="The reference's quirks."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("visual_tokens", type_hint=LavitVisualTokens)]

    def run(self, pipe, given):
        return {"visual_tokens": pipe.tokenize(**given)}


class LavitTokens(ConditionalPipelineBlocks):
    """Visual tokens of a prompt or of an image, or those that are given."""

    block_classes = [LavitPromptToTokens, LavitImageToTokens]
    block_names = ["prompt", "image"]
    block_trigger_inputs = ["prompt", "image"]

    @property
    def description(self) -> str:
        return (type(self).__doc__ or "").strip()

    def select_block(self, prompt=None, image=None) -> str | None:
        if prompt is not None and image is not None:
            raise ValueError("give either prompt or image, not both; a prompt may hold images")
        return "prompt" if prompt is not None else "image" if image is not None else None


class LavitConditions(LavitBlock):
    """Visual tokens to the UNet's conditions, by the detokenizer."""

    needs = ("detokenizer",)

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "visual_tokens",
                required=True,
                type_hint=LavitVisualTokens,
                description="Of a block before, or a list with a 1-D tensor of codes for each image.",
            ),
            InputParam("num_images_per_tokens", type_hint=int, default=1, description="Distinct decodings."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            *(OutputParam(name, type_hint=torch.Tensor) for name in CONDITIONS),
            OutputParam("conditions_mask", description="(2 * images, conditions), or None where all count."),
        ]

    def run(self, pipe, given):
        check_components(pipe, "visual tokens to decode", "detokenizer")
        check_count("num_images_per_tokens", given["num_images_per_tokens"])
        visual_tokens = as_visual_tokens(given["visual_tokens"])
        conditions, mask = pipe.encode_visual_tokens(visual_tokens, given["num_images_per_tokens"])
        return conditions | {"conditions_mask": mask}


class LavitLatents(LavitBlock):
    """Noise of the size of the images."""

    needs = ("detokenizer", "unet")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor, description="One row for each image."),
            InputParam("height", type_hint=int, description="In pixels."),
            InputParam("width", type_hint=int, description="In pixels."),
            InputParam("aspect_ratio", type_hint=str, description='In place of them: "1:1", "16:9", ...'),
            InputParam("generator", description="One torch.Generator, or one for each image."),
            InputParam("latents", type_hint=torch.Tensor, description="In place of noise that is drawn."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name) for name in ("latents", "height", "width")]

    def run(self, pipe, given):
        count, latents = len(given["prompt_embeds"]), given["latents"]
        height, width = pipe.choose_size(given["height"], given["width"], given["aspect_ratio"])
        if latents is None:
            latents = pipe.prepare_latents(count, height, width, as_generators(given["generator"], count))
        check_latents(latents, pipe.latents_shape(count, height, width))
        return {"latents": latents, "height": height, "width": width}


class LavitDenoise(LavitBlock):
    """Noise and conditions to latents of images: SDXL's loop."""

    needs = ("detokenizer", "unet", "scheduler")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *(InputParam(name, required=True, type_hint=torch.Tensor) for name in CONDITIONS),
            InputParam("conditions_mask", type_hint=torch.Tensor),
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("height", required=True, type_hint=int, description="In pixels."),
            InputParam("width", required=True, type_hint=int, description="In pixels."),
            InputParam("generator", description="One torch.Generator, or one for each image."),
            *(
                InputParam(name, default=default, description="See `LavitPipeline`.")
                for name, default in DENOISING.items()
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor)]

    def run(self, pipe, given):
        settings = pipe.check_denoising(**{name: given[name] for name in DENOISING})
        conditions = {name: given[name] for name in CONDITIONS}
        latents, mask, generator = given["latents"], given["conditions_mask"], given["generator"]
        generator = as_generators(generator, len(latents))
        denoised = pipe.denoise(latents, conditions, mask, given["height"], given["width"], generator, **settings)
        return {"latents": denoised}


class LavitDecode(LavitBlock):
    """Latents to images, by the VAE."""

    needs = ("vae", "safety_checker", "feature_extractor")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("output_type", type_hint=str, default="pil", description='"pil", "np", "pt" or "latent".'),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("images"),
            OutputParam("nsfw_content_detected", description="A flag for each image, or None."),
        ]

    def run(self, pipe, given):
        check_output_type(given["output_type"], pipe.vae)
        images, flags = pipe.decode_images(given["latents"], given["output_type"])
        return {"images": images, "nsfw_content_detected": flags}


class LavitBlocks(SequentialPipelineBlocks):
    """Draws what [`LavitPipeline`] draws, in blocks that can be used alone and replaced.

    ```python
    pipe = ModularPipeline.from_pretrained(path, trust_remote_code=True)
    pipe.load_components(dtype=torch.float32)
    pipe(prompt="a red apple", output="images")
    pipe(image=image, output="images")                    # what LavitPipeline.reconstruct draws
    pipe(visual_tokens=tokens, output="images")
    ```

    As a workflow: "text2image", "reconstruction", "decoding", each with the blocks and the components that it needs.
    """

    block_classes = [LavitTokens, LavitConditions, LavitLatents, LavitDenoise, LavitDecode]
    block_names = ["tokens", "conditions", "latents", "denoise", "decode"]
    _workflow_map = {
        "text2image": {"prompt": True},
        "reconstruction": {"image": True},
        "decoding": {"visual_tokens": True},
    }

    @property
    def description(self) -> str:
        return (type(self).__doc__ or "").strip().splitlines()[0]
