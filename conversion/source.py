"""Reading official weights: `.bin` or `.safetensors`, one file or shards. Nothing is ever unpickled but tensors."""

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_lavit.loading_lavit import is_compressed, read_json_object, read_weight_map


def find_file(folder: Path, stem: str) -> Path:
    """The weights file `stem` of a folder, `.safetensors` before `.bin`.

    Raises:
        OSError: there is none.
    """
    for ending in (".safetensors", ".bin"):
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    raise FileNotFoundError(f"{folder / stem}.bin is missing, and so is {stem}.safetensors: download it again")


def find_shards(folder: Path, *stems: str) -> dict[Path, set[str] | None]:
    """The weights files of a folder, and the keys that an index promises for each (`None`: there is no index).

    Args:
        folder: of one model, as transformers or diffusers save it.
        stems: names of its weights without ending, the first one found counts.

    Raises:
        OSError: no weights, or a file that the index names is missing.
        ValueError: the index is damaged.
    """
    for stem in stems:
        for ending in (".safetensors", ".bin"):
            index, single = folder / f"{stem}{ending}.index.json", folder / f"{stem}{ending}"
            if index.is_file():
                shards: dict[Path, set[str]] = {}
                for key, name in read_weight_map(index).items():
                    shards.setdefault(folder / name, set()).add(key)
                missing = [str(path) for path in shards if not path.is_file()]
                if missing or not shards:
                    raise FileNotFoundError(f"{index} names files that are missing: {', '.join(missing) or 'none'}")
                return {**shards}
            if single.is_file():
                return {single: None}
    names = " or ".join(f"{stem}.bin" for stem in stems)
    raise FileNotFoundError(f"{folder} has no weights: {names} (or .safetensors, or shards with an index) is missing")


def read_json(path: Path) -> dict:
    """A JSON file that holds an object, see [`read_json_object`]; `OSError` if it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: download it again")
    return read_json_object(path)


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory: pages are read when they are used.

    Raises:
        OSError: the file is truncated or damaged.
        ValueError: it holds something else than named tensors. A pickle that asks to run code is refused, not run.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # files of PyTorch before 1.6 are no zip archives, and compressed ones hold no numbers: neither can be mapped
        mapped = zipfile.is_zipfile(path) and not is_compressed(path)
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(f"{path} asks to run code when it is read: refused, nothing was run") from error
        raise OSError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    except (
        *(SafetensorError, RuntimeError, LookupError, AttributeError, EOFError, TypeError, ValueError),
        *(struct.error, zipfile.BadZipFile),
    ) as error:
        raise OSError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    if isinstance(content, torch.Tensor):
        content = {"": content}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: not a state dict")
    wrong = [key for key, value in content.items() if not isinstance(key, str) or not _is_plain(value)]
    if wrong:
        raise ValueError(f"{path} holds {', '.join(map(repr, wrong[:3]))}, which are no tensors: not a state dict")
    return content


def _is_plain(value) -> bool:
    """Whether a value is a tensor whose numbers lie in memory as they are."""
    is_tensor = isinstance(value, torch.Tensor)
    return is_tensor and value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"


def load_shards(shards: dict[Path, set[str] | None]) -> dict[str, torch.Tensor]:
    """All tensors of [`find_shards`], mapped.

    Raises:
        OSError: a shard is truncated, or lacks what the index promises.
        ValueError: a shard holds more than that.
    """
    tensors = {}
    for path, promised in shards.items():
        content = load(path)
        if promised is not None and promised - content.keys():
            raise OSError(f"{path} lacks {name_some(promised - content.keys())}, which the index promises")
        if promised is not None and content.keys() - promised:
            raise ValueError(f"{path} holds {name_some(content.keys() - promised)}, which the index does not name")
        tensors.update(content)
    return tensors


def name_some(names, limit: int = 5) -> str:
    """Some of many names, for messages."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
