"""Writing the converted folder: in shards, each read and released before the next, and all of it or nothing."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from modeling_lavit.atomic_lavit import replaced_together

from .source import name_some


# memory needed is up to four times this: a float32 source, its copy in another type, and the copy that is written
SHARD_BYTES = 2**30
SPARE_BYTES = 64 * 2**20
FULL_PRECISION = "codebook."

StateDict = dict[str, torch.Tensor]


@dataclass
class Plan:
    """The weights of one component.

    Args:
        name: for messages.
        read: maps the official files into memory, and gives all weights under our names.
        shapes: the same on the meta device, with the shapes and types as they will be written.
        folder: where they go, relative to the converted folder.
        stem: of the files, "model" or "diffusion_pytorch_model".
        official_name: of one of our names, for messages.
    """

    name: str
    read: Callable[[], StateDict]
    shapes: StateDict
    folder: str
    stem: str
    official_name: Callable[[str], str] = str

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.shapes.values())


def plan_weights(
    name: str,
    read: Callable[[], StateDict],
    target: StateDict,
    folder: str,
    stem: str,
    dtype: torch.dtype | None,
    official_name: Callable[[str], str] = str,
) -> Plan:
    """Checks that the weights are exactly those that a model has.

    Args:
        name, read, folder, stem, official_name: see [`Plan`].
        target: the state dict of our model, on the meta device.
        dtype: that floating-point weights are written in, but for codebooks; `None` keeps each as it is.

    Raises:
        ValueError: a weight is missing, has no place in the model, or has another shape.
    """
    weights = read()
    if target.keys() - weights.keys():
        missing = map(official_name, target.keys() - weights.keys())
        raise ValueError(f"{name}: weights are missing: {name_some(missing)}")
    if weights.keys() - target.keys():
        extra = map(official_name, weights.keys() - target.keys())
        raise ValueError(f"{name}: nothing in the model takes the weights {name_some(extra)}")
    wrong = [
        f"{official_name(key)} {tuple(weights[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in target.items()
        if weights[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{name}: weights have other shapes than the configuration says: {name_some(wrong)}")
    shapes = {key: torch.empty_like(_cast(key, weights[key], dtype, "meta")) for key in target}
    return Plan(name, read, shapes, folder, stem, official_name)


def write_weights(plan: Plan, root: Path, progress: tqdm):
    """Writes `plan`'s weights below `root` as safetensors, with an index where there are several files.

    Raises:
        OSError: they cannot be written.
        ValueError: a weight is not finite, or not any more in the type that it is written in.
    """
    folder = root / plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in plan.shapes.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    weight_map = {}
    for number, keys in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{plan.stem}{suffix}.safetensors"
        # mapped again for every shard, so that the pages of the last one are given back
        weights = plan.read()
        tensors = {}
        for key in keys:
            tensors[key] = _cast(key, weights[key], plan.shapes[key].dtype, "cpu").contiguous()
            _check_finite(plan, key, weights[key], tensors[key])
            progress.update(tensors[key].nbytes)
        del weights
        _save(tensors, folder / name)
        weight_map |= dict.fromkeys(keys, name)
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        (folder / f"{plan.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_space(num_bytes: int, folder: Path):
    """Raises `OSError` if so many bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if num_bytes + SPARE_BYTES > free:
        raise OSError(
            f"no space left: {num_bytes / 1e9:.2f} GB are to be written, but the disk of {folder} has "
            f"{free / 1e9:.2f} GB free"
        )


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it at the end, see [`replaced_together`].

    Raises:
        ValueError: `output` is a file, or a folder with something in it.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file: name a folder that does not exist")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: remove it, or name a folder that does not exist")
    with replaced_together(output) as folder:
        yield folder


def _cast(key: str, tensor: torch.Tensor, dtype: torch.dtype | None, device: str) -> torch.Tensor:
    keep = dtype is None or not tensor.is_floating_point() or FULL_PRECISION in key
    return tensor.to(device, tensor.dtype if keep else dtype, copy=True)


def _check_finite(plan: Plan, key: str, source: torch.Tensor, written: torch.Tensor):
    if written.isfinite().all():
        return
    name = f"{plan.name}: {plan.official_name(key)}"
    if source.isfinite().all():
        raise ValueError(f"{name} has values that {written.dtype} cannot hold: take --dtype bfloat16 or float32")
    raise ValueError(f"{name} holds NaN or infinite values: download the weights again")


def _save(tensors: StateDict, path: Path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path.name} could not be written, is the disk full? ({error})") from error
