"""What [`LavitPipeline`] adds to diffusers' denoising loop, and to the loop that writes visual tokens."""

from collections.abc import Callable

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import StoppingCriteria


class LavitDenoiser(StableDiffusionXLPipeline):
    """SDXL's loop for both kinds of UNet, with sizes in full precision: bfloat16 would round 1001 to 1000."""

    def _get_add_time_ids(self, original_size, crops_coords_top_left, target_size, dtype, text_encoder_projection_dim):
        if self.unet.config.addition_embed_type is None:
            return torch.tensor([[*original_size, *crops_coords_top_left, *target_size]], dtype=torch.float32)
        return super()._get_add_time_ids(
            original_size, crops_coords_top_left, target_size, torch.float32, text_encoder_projection_dim
        )


class MaskedUNet:
    """A UNet whose calls see only the conditions that `mask` (rows of [unconditional; conditional]) names."""

    def __init__(self, unet, mask: torch.Tensor):
        self._unet, self._mask = unet, mask

    def __call__(self, sample: torch.Tensor, *args, **kwargs):
        return self._unet(sample, *args, encoder_attention_mask=self._mask[-len(sample) :], **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._unet, name)


class IntervalUNet:
    """A UNet that, outside an interval of the denoising steps, computes the conditional half of its rows alone and
    gives it for both halves: guidance then changes nothing (arXiv 2404.07724).

    Args:
        unet: called with [unconditional; conditional] rows.
        scheduler: knows the number of steps.
        interval: shares of the steps, (start, stop), between which both halves are computed.
    """

    def __init__(self, unet, scheduler, interval: tuple[float, float]):
        self._unet, self._scheduler, self._interval, self._step = unet, scheduler, interval, 0

    def __call__(self, sample: torch.Tensor, timestep, encoder_hidden_states, added_cond_kwargs, **kwargs):
        start, stop = (int(share * len(self._scheduler.timesteps)) for share in self._interval)
        guided = start <= self._step < stop
        self._step += 1
        if not guided:
            half = len(sample) // 2
            sample, encoder_hidden_states = sample[half:], encoder_hidden_states[half:]
            added_cond_kwargs = {name: value[half:] for name, value in added_cond_kwargs.items()}
        kwargs["return_dict"] = False
        (output,) = self._unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **kwargs)
        return (output if guided else torch.cat([output, output]),)

    def __getattr__(self, name: str):
        return getattr(self._unet, name)


class TokenObserver(StoppingCriteria):
    """Moves the progress bar and calls the caller's function after every token; never stops."""

    def __init__(self, progress_bar, callback: Callable[[int, torch.Tensor], None] | None):
        self.progress_bar, self.callback, self.step = progress_bar, callback, 0

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.progress_bar.update()
        if self.callback is not None:
            self.callback(self.step, input_ids[:, -1])
        self.step += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
