"""Loading that never leaves a weight at random, and looks at a checkpoint's files before it builds anything."""

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import cached_files


# of `from_pretrained`: where files come from
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

Shapes = dict[str, tuple[int, ...]]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class StrictLoadingMixin(PreTrainedModel if TYPE_CHECKING else object):
    """Mixin, written before `PreTrainedModel` in the bases: `from_pretrained` raises where weights are missing.

    Plain `PreTrainedModel.from_pretrained` initialises what a checkpoint lacks at random and goes on after a report.
    Here the shapes in the weights' headers are compared with the configuration before a single weight is allocated.
    Everything else is as there: `output_loading_info`, `key_mapping`, `device_map`, `quantization_config`, the Auto
    classes. `ignore_mismatched_sizes=True` still asks for fresh weights where shapes differ, and only there.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> Self:
        """Loads a checkpoint, see `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: the folder or repository is no checkpoint (no `config.json`, no weights file), or a weights file
                is damaged.
            ValueError: the checkpoint lacks weights of this class, or has them in another shape than `config.json`
                says (the keys are named); an index names files outside the folder.
        """
        if "dtype" in kwargs and kwargs["dtype"] is None:
            # diffusers hands on what its user left open, and means single precision by it
            kwargs["dtype"] = torch.float32
        output_loading_info = kwargs.pop("output_loading_info", False)
        accept_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        source = pretrained_model_name_or_path
        if source is not None and not model_args and not kwargs.get("key_mapping") and not kwargs.get("gguf_file"):
            cls._check_weights(source, accept_mismatched, **kwargs)
        try:
            model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                source,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise _damaged(source, error) from error
        _refuse(source, cls, info["missing_keys"], () if accept_mismatched else info["mismatched_keys"])
        return (model, info) if output_loading_info else model  # pyright: ignore[reportReturnType]

    @classmethod
    def _check_weights(
        cls, source, accept_mismatched: bool, config=None, variant: str | None = None, **kwargs
    ) -> None:
        """Compares the shapes in the weights' headers with those of a model on the meta device."""
        where = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        shapes = read_shapes(weight_files(source, variant, **where), source)
        if shapes is None or kwargs.pop("quantization_config", None):
            return
        if not isinstance(config, PreTrainedConfig):
            config = read_config(config or source, cls.config_class or AutoConfig, **where, **kwargs)
        if getattr(config, "quantization_config", None):
            return
        model = build_on_meta(lambda: cls(config), config.to_dict(), len(shapes), source)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # a checkpoint of the whole model has the base model's weights behind a prefix, and the other way round
        prefix = f"{cls.base_model_prefix}."
        shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()} | shapes
        shapes = {f"{prefix}{name}": shape for name, shape in shapes.items()} | shapes
        tied = model.all_tied_weights_keys
        tied = {name for pair in tied.items() if shapes.keys() & set(pair) for name in pair}
        mismatched = wrong_shapes(expected, shapes)
        _refuse(source, cls, expected.keys() - shapes.keys() - tied, () if accept_mismatched else mismatched)


def read_config(source, config_class: type = AutoConfig, **options) -> PreTrainedConfig:
    """The configuration of a folder or repository; `options` of `from_pretrained`.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or describes no model.
    """
    where = {name: options[name] for name in HUB_OPTIONS if name in options}
    read_json_object(fetched(source, "config.json", **where))
    with said_of(f"config.json of {source} describes no model"):
        return config_class.from_pretrained(source, return_unused_kwargs=True, **options)[0]


def weight_files(source, variant: str | None = None, **where) -> list[Path]:
    """The weights files of a model in a folder or repository, fetched if need be; none where there are none.

    Raises:
        OSError: a file that an index names is missing.
        ValueError: an index is damaged, or names files outside the folder.
    """
    for name in WEIGHTS:
        if variant is not None:
            stem, ending = name.rsplit(".", 1)
            name = f"{stem}.{variant}.{ending}"
        try:
            path = fetched(source, name, **where)
        except OSError:
            continue
        if not name.endswith(".json"):
            return [path]
        names = sorted(set(read_weight_map(path).values()))
        return [Path(shard) for shard in cached_files(str(source), names, **where) or ()]
    return []


def fetched(source, name: str, **where) -> Path:
    """A file of a folder or repository, fetched if need be.

    Raises:
        OSError: there is none.
    """
    # None comes of options that are not ours
    return Path(cached_file(str(source), name, **where))  # pyright: ignore[reportArgumentType]


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each weight that an index names.

    Raises:
        ValueError: it is no index, or names something else than files that lie beside it.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is no index of weights: its weight_map must name a file for each weight")
    outside = sorted(name for name in weight_map.values() if not is_plain_name(name))
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}: weights must lie beside the index")
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether a name from a file is that of something in the same folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def read_json_object(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, too deeply nested, or holds something else than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be one of a checkpoint's files") from error
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON, it is truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_shapes(files: list[Path], source) -> Shapes | None:
    """Shapes of the weights by name, from the headers of safetensors files; `None` for other kinds of files.

    Raises:
        OSError: a file is damaged.
        ValueError: a `.bin` file is compressed: PyTorch would map compressed bytes as if they were weights.
    """
    shapes: Shapes = {}
    for path in files:
        if path.suffix != ".safetensors":
            if is_compressed(path):
                raise ValueError(f"{path} is a compressed archive, which cannot be mapped: save it by torch.save")
            return None
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise _damaged(source, error) from error
    return shapes if files else None


def is_compressed(path: Path) -> bool:
    """Whether a weights file is a zip archive with compressed members, which `torch.save` never writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())


def build_on_meta(build: Callable[[], AnyModule], config: dict, num_weights: int, source) -> AnyModule:
    """A model without memory for its weights.

    Args:
        build: makes it.
        config: what it is made from. Depths are compared with `num_weights` first: even without memory a hundred
            thousand layers take minutes.
        num_weights: number of tensors in the checkpoint.

    Raises:
        ValueError: no model can be made of that configuration.
    """
    for name, depth in _depths(config):
        if depth > num_weights:
            raise ValueError(f"{source}: the configuration says {name}={depth}, but there are {num_weights} weights")
    with said_of(f"{source}: no model can be built from the configuration"), torch.device("meta"):
        return build()


@contextmanager
def said_of(what: str) -> Iterator[None]:
    """Whatever a library makes of a damaged or malicious file becomes a `ValueError` in one line, `what` in front."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {reason or type(error).__name__}") from error


def wrong_shapes(expected: Shapes, found: Shapes) -> list[tuple]:
    """(name, found shape, expected shape) of the weights whose shapes differ."""
    return [(name, found[name], shape) for name, shape in expected.items() if found.get(name, shape) != shape]


def _depths(config: dict):
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _depths(value)
        elif "layers" in str(name):
            for depth in value if isinstance(value, list | tuple) else [value]:
                if isinstance(depth, int):
                    yield name, depth


def _damaged(source, error: Exception) -> OSError:
    return OSError(f"a weights file of {source!s} is damaged or truncated ({error}): get it again")


def _refuse(source, cls: type, missing, mismatched) -> None:
    if missing:
        raise ValueError(
            f"{source!s} has no weights for {_name_some(missing)} of {cls.__name__}. Is it a checkpoint of another "
            "class? A part of a larger model can be loaded with key_mapping={source pattern: target}."
        )
    if mismatched:
        shapes = [f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in mismatched]
        raise ValueError(
            f"{source!s} has weights of another shape than {cls.__name__} with this config: {_name_some(shapes)}"
        )


def _name_some(keys, limit: int = 5) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
