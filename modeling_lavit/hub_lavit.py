"""One folder, or repository, that transformers and diffusers load: with this package installed and without it.

    config.json model.safetensors tokenizer.json processor_config.json ...   transformers' files
    model_index.json detokenizer/ unet/ vae/ scheduler/                      diffusers' files
    lavit_transformers.py lavit_diffusers.py                                 the code, generated
    README.md                                                                the model card

How the code is found. transformers reads `auto_map` (and `custom_pipelines`) of its config files. diffusers runs the
file that `model_index.json` names, which makes the classes known to both libraries under their own names, as importing
the package does. So no code is needed in the components' folders, and the model and the processor stay at the root.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from .atomic_lavit import weights_of
from .loading_lavit import (
    HUB_OPTIONS,
    build_on_meta,
    is_plain_name,
    read_config,
    read_json_object,
    read_shapes,
    read_weight_map,
    wrong_shapes,
)
from .saving_lavit import DIFFUSERS_CODE, TRANSFORMERS_CODE


INDEX = "model_index.json"
# of diffusers' modular pipelines: the file that names their blocks' class, and that class
BLOCKS_CONFIG, BLOCKS_CLASS = "modular_config.json", "LavitBlocks"
# components that live in the folder itself, not in a folder of their own, and their files there
AT_ROOT = {
    "processor": ("processor_config.json", "chat_template.jinja", "tokenizer*", "special_tokens_map.json"),
    "model": ("config.json", "generation_config.json", "model*.safetensors*", "draft_codes.safetensors"),
}
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def register_pipeline(*classes: type) -> None:
    """Lets diffusers find a pipeline and its components' classes by name: it looks in its own module."""
    for known in classes:
        setattr(diffusers, known.__name__, known)


def read_index(source: str | os.PathLike, **where) -> dict:
    """`model_index.json` of a folder or repository.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        return read_json_object(Path(hf_hub_download(str(source), INDEX, **where)))
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{source} has no {INDEX}: it is no pipeline's folder")
    return read_json_object(folder / INDEX)


class LavitLoadingMixin(diffusers.DiffusionPipeline if TYPE_CHECKING else object):
    """Loads a pipeline: fetches what is used alone, and looks at the files before anything is built."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Loads a folder or repository, see `DiffusionPipeline.from_pretrained`.

        Components that are given, or given as `None` where they are optional, are not fetched.

        Raises:
            OSError: no such folder or repository, no `model_index.json`, damaged weights.
            ValueError: a file names others outside the folder; configurations and weights differ in size.
        """
        source, folder = pretrained_model_name_or_path, Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(cls.download(str(source), **kwargs))
        check_pipeline_folder(folder, kwargs.get("variant"), given=kwargs.keys())
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        if "model" not in kwargs and has_variant(folder, kwargs.get("variant")):
            kwargs["model"] = load_model_variant(folder, **kwargs)
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=str(source))
        return pipe

    @classmethod
    def load_config(cls, *args, **kwargs):
        """`model_index.json`; its folder names a copy of this class, for those who do not have it. Here it is."""
        config = super().load_config(*args, **kwargs)
        return {**config, "_class_name": cls.__name__} if isinstance(config, dict) else config

    @classmethod
    def download(cls, pretrained_model_name: str, variant: str | None = None, **kwargs) -> str:
        """Fetches the files of a repository that a pipeline needs.

        Args:
            pretrained_model_name: "organisation/name".
            variant: of the weights, where a component has it.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`; components that are given
                are not fetched.

        Returns:
            The folder in the cache.

        Raises:
            OSError: there is no such repository or revision, or no connection and nothing in the cache.
        """
        where = {name: kwargs[name] for name in DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
        try:
            index = read_index(pretrained_model_name, **where)
            if where.get("local_files_only") or is_offline_mode():
                return snapshot_download(pretrained_model_name, allow_patterns=INDEX, **where)
            api = HfApi(token=where.get("token"))
            files = api.list_repo_files(pretrained_model_name, revision=where.get("revision"))
            return snapshot_download(
                pretrained_model_name, allow_patterns=list(needed_files(index, files, variant, kwargs)), **where
            )
        except EntryNotFoundError as error:
            raise FileNotFoundError(
                f"{pretrained_model_name} has no {INDEX}: it is no pipeline's repository"
            ) from error
        except HfHubHTTPError as error:
            raise OSError(f"{pretrained_model_name} cannot be read: {str(error).splitlines()[0]}") from error


def needed_files(index: dict, files: list[str], variant: str | None, given) -> Iterator[str]:
    """Which files of a repository make up a pipeline.

    Args:
        index: its `model_index.json`.
        files: all that it has.
        variant: of the weights, where a component has it.
        given: names of components that are there already.
    """
    yield INDEX
    yield from (name for name in files if name in (f"{TRANSFORMERS_CODE}.py", f"{DIFFUSERS_CODE}.py"))
    for name in component_names(index):
        if name in given:
            continue
        patterns = AT_ROOT.get(name, (f"{name}/*",))
        found = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
        stems = {file: weights_of(file.rsplit("/", 1)[-1]) for file in found}
        in_variant = variant is not None and any(which == f".{variant}" for _, which in stems.values())
        wanted = f".{variant}" if in_variant else None
        is_json = (".json", ".jinja", ".model", ".txt", ".safetensors")
        yield from (
            file for file in found if file.endswith(is_json) and stems[file][1] == wanted or not stems[file][0]
        )


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether the model's weights are there in a variant."""
    return variant is not None and any(weights_of(file.name)[1] == f".{variant}" for file in folder.glob("model*"))


def load_model_variant(folder: Path, variant: str, dtype=None, torch_dtype=None, **kwargs):
    """The model of a pipeline's folder, which diffusers would load without its variant, as it lies at the root.

    `dtype`, also by its older name, is that of diffusers' `from_pretrained`: one, or one for each component.
    """
    library, class_name = read_index(folder)["model"]
    dtype = torch_dtype if dtype is None else dtype
    if isinstance(dtype, dict):
        dtype = dtype.get("model", dtype.get("default"))
    return getattr(import_module(library), class_name).from_pretrained(folder, variant=variant, dtype=dtype)


def component_names(index: dict) -> list[str]:
    """Names of the components that a `model_index.json` has.

    Raises:
        ValueError: it names something outside its folder, or no class.
    """
    named = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, value in {**named, "_class_name": index.get("_class_name")}.items():
        parts = value if isinstance(value, list) else [value]
        plain = all(part is None or isinstance(part, str) and is_plain_name(part) for part in parts)
        if not plain or not is_plain_name(name) or len(parts) > 2:
            raise ValueError(f"{INDEX} says {name!r}: {value!r}, which is no class of a library or of this folder")
    return [name for name, value in named.items() if name != "_class_name" and value[0] is not None]


def check_pipeline_folder(folder: Path, variant: str | None, given) -> None:
    """Compares configurations and weights of the components from diffusers; ours do so when they are loaded.

    Raises:
        OSError: a weights file is damaged.
        ValueError: a file names others outside the folder; configurations and weights differ in size.
    """
    index = read_index(folder)
    names = component_names(index)
    if "model" in names and "model" not in given:
        read_config(folder)
    for name in ("processor_config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    for name in names:
        part = folder / name
        if name in given or name in AT_ROOT or not (part / "config.json").is_file():
            continue
        config = read_json_object(part / "config.json")
        weights = [file for file in sorted(part.iterdir()) if weights_of(file.name)[0]]
        for file in weights:
            if file.suffix == ".json":
                read_weight_map(file)
        files = [file for file in weights if weights_of(file.name)[1] == (variant and f".{variant}")]
        shapes = read_shapes([file for file in files if file.suffix == ".safetensors"], part)
        build = getattr(getattr(diffusers, index[name][1], None), "from_config", None)
        if shapes is None or "quantization_config" in config or build is None:
            continue
        model = build_on_meta(partial(build, config), config, len(shapes), part)
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        wrong = wrong_shapes(expected, shapes)
        if wrong:
            key, found, wanted = wrong[0]
            raise ValueError(f"{part}: the weights have {key} {found}, the configuration says {wanted}")
