"""Saving and uploading with the code that loads what was saved: `save_pretrained` and `push_to_hub` of every class.

A folder carries one generated file for each library (`lavit_transformers.py`, `lavit_diffusers.py`): where this
package is not installed, `trust_remote_code=True` loads it. `auto_map` in the config files names the classes.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .atomic_lavit import is_stage, replaced_together
from .pushing_lavit import README, push_folder


logger = logging.get_logger(__name__)

# the generated files: everything that needs transformers alone, and what needs diffusers
TRANSFORMERS_CODE, DIFFUSERS_CODE = "lavit_transformers", "lavit_diffusers"
GENERATION_AUTO_CLASSES = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")
# classes of one checkpoint, and the Auto classes that find each
FAMILIES = (
    {
        "LavitConfig": ("AutoConfig",),
        "LavitModel": ("AutoModel",),
        "LavitForConditionalGeneration": GENERATION_AUTO_CLASSES,
    },
    {"LavitVisualTokenizerConfig": ("AutoConfig",), "LavitVisualTokenizer": ("AutoModel",)},
    {"LavitDetokenizerConfig": ("AutoConfig",), "LavitDetokenizer": ("AutoModel",)},
    {"LavitImageProcessor": ("AutoImageProcessor",)},
    {"LavitProcessor": ("AutoProcessor",)},
)
# in examples of a card, and in the index of diffusers' modular pipelines, until the repository has a name
REPOSITORY = "ORGANISATION/NAME"
REPOSITORY_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MODULAR_INDEX = "modular_model_index.json"
# of peft
ADAPTER_CONFIG = "adapter_config.json"
PUSH_OPTIONS = ("commit_message", "create_pr", "private", "repo_id", "revision", "tags", "token")


class SavedWithCodeMixin:
    """Mixin, written before transformers' class in the bases: what is saved loads with this package and without it,
    all its files appear together, and uploading takes the same arguments everywhere."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs):
        """Saves as transformers does, all files or none, with the code that loads them.

        Args:
            save_directory: created if it does not exist. Files of others in it stay.
            push_to_hub: also upload, see [`push_to_hub`]; `repo_id` is the folder's name by default.
            args, kwargs: of transformers' `save_pretrained`, and of [`push_to_hub`].
        """
        options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs} if push_to_hub else {}
        if kwargs.get("distributed_checkpoint") or kwargs.get("is_main_process") is False:
            # all processes write into one folder
            return super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        with replaced_together(save_directory) as folder:
            saved = super().save_pretrained(folder, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            self.save_extra_files(folder)
            if not is_stage(Path(save_directory).absolute()):
                write_code(folder, self)
        if push_to_hub:
            repo_id = options.pop("repo_id", None) or Path(save_directory).absolute().name
            upload(save_directory, repo_id, **options)
        if isinstance(saved, list):
            saved = [str(Path(save_directory) / Path(path).relative_to(folder)) for path in saved]
        return saved

    def save_extra_files(self, folder: Path) -> None:
        """Writes what transformers does not know of, into the folder that [`save_pretrained`] fills."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **saving,
    ) -> str:
        """Uploads what [`save_pretrained`] writes as a repository on the Hub, see [`push_folder`].

        Args:
            saving: of [`save_pretrained`]: `max_shard_size`, `variant`, ...

        Returns:
            The URL of the commit, or of the pull request.
        """

        return upload(
            lambda folder: self.save_pretrained(folder, **saving),
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )


@dataclass
class Publisher:
    """What a save writes beside weights and configs. The package has its own (`modeling_lavit.publishing`); the code
    in a folder knows what is here: itself, and a short card.

    Args:
        code: `code()` -> the text of the generated files, by name without ending.
        card: `card(folder, tags, extras, repository)` -> the README of what was saved in `folder`; images, results and
            notes that it may show lie in `extras`.
        merge_cards: `merge_cards(theirs, ours)` -> the README where there is one already.
        deploying: `deploying()` -> further files of a pipeline's folder, path -> text.
    """

    code: Callable[[], dict[str, str]]
    card: Callable[[Path, list[str] | None, Path, str], str]
    merge_cards: Callable[[str, str], str]
    deploying: Callable[[], dict[str, str]]


def own_code() -> dict[str, str]:
    """The files that this code runs from."""
    files = (Path(__file__).with_name(f"{name}.py") for name in (TRANSFORMERS_CODE, DIFFUSERS_CODE))
    return {file.stem: file.read_text(encoding="utf-8") for file in files if file.is_file()}


def short_card(folder: Path, tags: list[str] | None, extras: Path, repository: str) -> str:
    """A README that says how to load the repository."""
    data = ModelCardData(library_name="transformers", tags=["lavit", *(tags or [])])
    return (
        f"---\n{data.to_yaml()}\n---\n\n# LaVIT\n\nOf [LaVIT](https://arxiv.org/abs/2309.04669): "
        "`trust_remote_code=True` loads it with the code in this repository.\n"
    )


def keep_theirs(theirs: str, ours: str) -> str:
    """The card that is there stays."""
    return theirs


publisher = Publisher(own_code, short_card, keep_theirs, dict)


def make_card(folder: Path, tags: list[str] | None, place: Path, repository: str = REPOSITORY) -> str:
    """The README of what was saved in `folder`; what its owners changed in the one that is in `place` stays."""
    card = publisher.card(folder, tags, place, repository)
    there = place / README
    return publisher.merge_cards(there.read_text(encoding="utf-8"), card) if there.is_file() else card


def named_files(folder: Path, repository: str) -> dict[str, str]:
    """Files with names in them that only hold here: of diffusers' `ModularPipeline`, where its components are loaded
    from; of adapters, which folder they were trained on."""
    texts = {}
    if (folder / MODULAR_INDEX).is_file():
        index = json.loads((folder / MODULAR_INDEX).read_text(encoding="utf-8"))
        for part in index.values():
            if isinstance(part, list) and part[-1].get("pretrained_model_name_or_path") == REPOSITORY:
                part[-1]["pretrained_model_name_or_path"] = repository
        texts[MODULAR_INDEX] = as_json(index)
    for file in folder.glob(f"**/{ADAPTER_CONFIG}"):
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if base and not is_on_hub(base):
            texts[file.relative_to(folder).as_posix()] = as_json({**config, "base_model_name_or_path": None})
    return texts


def is_on_hub(name: str) -> bool:
    """Whether this is a repository's name and no folder here."""
    return REPOSITORY_NAME.fullmatch(name) is not None and not Path(name).exists()


def upload(
    source: str | os.PathLike | Callable[[Path], object], repo_id: str, tags: list[str] | None = None, **options
) -> str:
    """Uploads a folder with its card, see [`push_folder`]."""
    return push_folder(
        source,
        repo_id,
        make_card=lambda folder, repository: make_card(folder, tags, folder, repository),
        merge_cards=publisher.merge_cards,
        named_files=named_files,
        **options,
    )


def write_code(folder: Path, *saved, pipeline: dict | None = None) -> None:
    """Writes the code of what was saved in a folder, and names its classes in the config files there.

    Args:
        folder: with the config files.
        saved: models, processors, configurations.
        pipeline: what `config.json` says of a task of its own (`custom_pipelines`), where the folder is a pipeline's.
    """
    code = publisher.code()
    if pipeline is None:
        code.pop(DIFFUSERS_CODE, None)
    for stem, text in code.items():
        (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    for part in saved:
        copy_own_class(type(part), folder)
        name_classes(folder, part, pipeline)


def name_classes(folder: Path, saved, pipeline: dict | None = None) -> None:
    """Writes `auto_map` into the config files of one model, processor or configuration."""
    auto_map = find_auto_map(saved)
    if "AutoConfig" in auto_map:
        edit_json(folder / "config.json", lambda config: name_model(config, auto_map, pipeline))
    elif "AutoProcessor" in auto_map:
        auto_map |= find_auto_map(saved.image_processor)
        edit_json(folder / "processor_config.json", lambda config: name_processor(config, auto_map))
        # AutoTokenizer would ask for trust, and there is no code of a tokenizer
        edit_json(folder / "tokenizer_config.json", lambda config: config.pop("auto_map", None))
    elif auto_map:
        edit_json(folder / "preprocessor_config.json", lambda config: config.update(auto_map=auto_map))


def find_auto_map(saved) -> dict[str, str]:
    """Auto class -> "file.Class", for what was saved and what loads the same files as another class."""
    config = getattr(saved, "config", None)
    auto_map = {}
    for cls in filter(None, (type(config) if hasattr(config, "model_type") else None, type(saved))):
        names = {base.__name__ for base in cls.__mro__}
        for family in FAMILIES:
            if names & family.keys() and not auto_map:
                auto_map = {auto: f"{TRANSFORMERS_CODE}.{name}" for name, autos in family.items() for auto in autos}
            autos = [auto for name in names & family.keys() for auto in family[name]]
            if not is_ours(cls) and (file := file_of(cls)):
                auto_map |= {auto: f"{file.stem}.{cls.__name__}" for auto in autos}
    return auto_map


def is_ours(cls: type) -> bool:
    """Whether a class is of this package, or of the files that are generated from it."""
    module = cls.__module__.split(".")
    return module[0] == __name__.split(".")[0] == "modeling_lavit" or module[-1] in (TRANSFORMERS_CODE, DIFFUSERS_CODE)


def file_of(cls: type) -> Path | None:
    """Where the code of a user's class stands; `None` where nobody could import it from: a notebook, a function."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__ or file is None:
        return None
    return Path(file)


def copy_own_class(cls: type, folder: Path) -> None:
    """Copies the file of a user's class, and what it imports from beside it."""
    if is_ours(cls) or cls.__module__.split(".")[0] in ("transformers", "diffusers"):
        return
    file = file_of(cls)
    try:
        needed = [file, *get_relative_import_files(file)] if file else []
    except OSError:
        needed = []
    if not needed:
        logger.warning(f"The code of {cls.__name__} is not saved: put the class into a file that imports no packages.")
    for path in map(Path, needed):
        (folder / path.name).write_bytes(path.read_bytes())


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    """Changes a JSON file, if it is there."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        write_json(path, content)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file as the libraries do."""
    path.write_text(as_json(content), encoding="utf-8")


def as_json(content: dict) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def name_model(config: dict, auto_map: dict, pipeline: dict | None) -> None:
    config.pop("custom_pipelines", None)
    config.update({"auto_map": auto_map} | ({"custom_pipelines": pipeline} if pipeline else {}))
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:
            # of a part that was loaded from a folder of its own
            for name in ("_name_or_path", "architectures", "auto_map"):
                part.pop(name, None)


def name_processor(config: dict, auto_map: dict) -> None:
    config["auto_map"] = {"AutoProcessor": auto_map["AutoProcessor"]}
    config["image_processor"]["auto_map"] = auto_map
