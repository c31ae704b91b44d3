"""Loading that never leaves a weight at random: what a checkpoint lacks is an error."""

import torch
from safetensors import SafetensorError


class StrictLoadingMixin:
    """Mixin, written before `PreTrainedModel` in the bases: `from_pretrained` raises where weights are missing.

    Plain `PreTrainedModel.from_pretrained` initialises what a checkpoint lacks at random and goes on after a report.
    Everything else is as there: `output_loading_info`, `key_mapping`, `device_map`, `quantization_config`, the Auto
    classes. `ignore_mismatched_sizes=True` still asks for fresh weights where shapes differ, and only there.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a checkpoint, see `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: the folder or repository is no checkpoint (no `config.json`, no weights file), or a weights file
                is damaged.
            ValueError: the checkpoint lacks weights of this class, or has them in another shape; the keys are named.
        """
        if "dtype" in kwargs and kwargs["dtype"] is None:
            # diffusers hands on what its user left open, and means single precision by it
            kwargs["dtype"] = torch.float32
        output_loading_info = kwargs.pop("output_loading_info", False)
        accept_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"a weights file of {pretrained_model_name_or_path!s} is damaged or truncated ({error}): get it again"
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path!s} has no weights for {_name_some(info['missing_keys'])} of "
                f"{cls.__name__}. Is it a checkpoint of another class? A part of a larger model can be loaded with "
                "key_mapping={source pattern: target}."
            )
        if info["mismatched_keys"] and not accept_mismatched:
            shapes = [f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
            raise ValueError(
                f"{pretrained_model_name_or_path!s} has weights of another shape than {cls.__name__} with this "
                f"config: {_name_some(shapes)}"
            )
        return (model, info) if output_loading_info else model


def _name_some(keys, limit: int = 5) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
