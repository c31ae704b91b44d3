"""What [`LavitPipeline`] adds to diffusers' denoising loop, and to the loop that writes visual tokens."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from transformers import StoppingCriteria

from .calls_lavit import RunningCall


class LavitDenoiser(StableDiffusionXLPipeline):
    """SDXL's loop for both kinds of UNet: what one call of a [`LavitPipeline`] runs, and what its callbacks are given.

    Sizes are in full precision: bfloat16 would round 1001 to 1000. It has what SDXL's pipeline has (`guidance_scale`,
    `num_timesteps`, `interrupt`, ..., and a scheduler of its own), and everything else of the pipeline that began it.
    """

    @classmethod
    def of(cls, pipeline, call: RunningCall, unet) -> "LavitDenoiser":
        """For one call of `pipeline`, with a UNet in place of its own."""
        # the base class does without where it is given embeddings
        absent: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        denoiser = cls(
            **absent,
            vae=pipeline.vae,
            unet=unet,
            scheduler=copy.deepcopy(pipeline.scheduler),
            add_watermarker=False,
        )
        denoiser.__dict__["_pipeline"] = pipeline
        denoiser.__dict__["_call"] = call
        call.denoiser, unet.scheduler = denoiser, denoiser.scheduler
        return denoiser

    def __getattr__(self, name: str):
        if "_pipeline" in self.__dict__ and not name.startswith("_") and not hasattr(type(self), name):
            return getattr(self._pipeline, name)
        return super().__getattr__(name)

    @property
    def _execution_device(self) -> torch.device:
        return self._pipeline._execution_device

    @property
    def interrupt(self) -> bool:
        return self._interrupt or self._call.interrupted

    def __call__(self, *args, callback_on_step_end: Callable | None = None, **kwargs) -> Any:
        told: Any = callback_on_step_end
        if told is not None and not isinstance(told, PipelineCallback | MultiPipelineCallbacks):
            told = _with_dict(told)
        return super().__call__(*args, callback_on_step_end=told, **kwargs)

    def progress_bar(self, iterable=None, total: int | None = None):
        return self._pipeline.progress_bar(iterable, total)

    def _get_add_time_ids(self, original_size, crops_coords_top_left, target_size, dtype, text_encoder_projection_dim):
        if self.unet.config.addition_embed_type is None:
            return torch.tensor([[*original_size, *crops_coords_top_left, *target_size]], dtype=torch.float32)
        return super()._get_add_time_ids(
            original_size, crops_coords_top_left, target_size, torch.float32, text_encoder_projection_dim
        )


def _with_dict(callback: Callable) -> Callable:
    """A callback that may return None, as one that returns a dict."""

    def called(*given):
        return callback(*given) or {}

    return called


class DecodingUNet:
    """The UNet of a pipeline as its denoising loop calls it: with a mask, guided in an interval, one thread at a time.

    Outside the interval it computes the conditional half of its rows alone and gives it for both halves: guidance then
    changes nothing (arXiv 2404.07724).

    Args:
        unet: called with [unconditional; conditional] rows, or the conditional ones alone.
        images: number of conditional rows.
        mask: (2 * images, conditions), which conditions count, of [unconditional; conditional]; None for all.
        interval: shares of the steps, (start, stop), between which both halves are computed.
        lock: taken around every call, where a call changes the UNet for its time; None for none.
    """

    def __init__(self, unet, images: int, mask: torch.Tensor | None, interval: tuple[float, float], lock=None):
        self._unet, self._images, self._mask, self._interval = unet, images, mask, interval
        self._lock, self._step = lock or nullcontext(), 0
        self.scheduler: Any = None

    def __call__(self, sample: torch.Tensor, timestep, encoder_hidden_states, added_cond_kwargs, **kwargs):
        half = self._halves_alike() and len(sample) == 2 * self._images
        self._step += 1
        if half:
            rows = slice(self._images, None)
            sample, encoder_hidden_states = sample[rows], encoder_hidden_states[rows]
            added_cond_kwargs = {name: value[rows] for name, value in added_cond_kwargs.items()}
        if self._mask is not None:
            kwargs["encoder_attention_mask"] = self._mask[-len(sample) :]
        with self._lock:
            output, *_ = self._unet(
                sample,
                timestep,
                encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
                **{**kwargs, "return_dict": False},
            )
        return (torch.cat([output, output]) if half else output,)

    def _halves_alike(self) -> bool:
        if self._interval == (0, 1):
            return False
        start, stop = (int(share * len(self.scheduler.timesteps)) for share in self._interval)
        return not start <= self._step < stop

    def __getattr__(self, name: str):
        return getattr(self._unet, name)


class TokenObserver(StoppingCriteria):
    """After every token: moves the progress bar, calls the caller's function, and stops where the call was stopped."""

    def __init__(self, progress_bar, call: RunningCall | None, callback: Callable[[int, torch.Tensor], None] | None):
        self.progress_bar, self.call, self.callback, self.step = progress_bar, call, callback, 0

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.progress_bar.update()
        if self.callback is not None:
            self.callback(self.step, input_ids[:, -1])
        self.step += 1
        stopped = self.call is not None and self.call.interrupted
        return torch.full((len(input_ids),), stopped, dtype=torch.bool, device=input_ids.device)
