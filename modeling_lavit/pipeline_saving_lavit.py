"""Saving and uploading a pipeline as one folder, see hub_lavit."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers

from .atomic_lavit import replaced_together
from .hub_lavit import AT_ROOT, BLOCKS_CLASS, BLOCKS_CONFIG, INDEX, component_names
from .pushing_lavit import README
from .saving_lavit import (
    DIFFUSERS_CODE,
    MODULAR_INDEX,
    PUSH_OPTIONS,
    REPOSITORY,
    copy_own_class,
    file_of,
    is_ours,
    make_card,
    name_classes,
    publisher,
    upload,
    write_code,
    write_json,
)


# in `config.json`: the task of transformers that draws
TEXT_TO_IMAGE = {
    "text-to-image": {
        "impl": f"{DIFFUSERS_CODE}.LavitTextToImagePipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}


class LavitSavingMixin(diffusers.DiffusionPipeline if TYPE_CHECKING else object):
    """Saves and uploads a pipeline as one folder."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Saves everything as one folder that loads with the package and, by `trust_remote_code=True`, without it.

        All files appear together. Files of others in the folder stay, and so does what was changed in its README.

        Args:
            save_directory: created if it does not exist.
            safe_serialization: always true: weights are saved as safetensors only.
            variant: goes into the names of the weight files ("fp16"): those of other variants stay beside them.
            max_shard_size: largest weight file ("5GB").
            push_to_hub: also upload the folder; `kwargs` are those of [`push_to_hub`], `repo_id` is the
                folder's name by default.
        """
        if not safe_serialization:
            raise ValueError("weights are saved as safetensors only, safe_serialization=False is not possible")
        options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs} if push_to_hub else {}
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} have no meaning here, or with push_to_hub=True only")
        if self.model and self.model.config.generation_only:
            raise ValueError("the model was loaded with generation_only=True: a pipeline is saved with all its parts")
        with replaced_together(save_directory) as folder:
            self._save_components(folder, variant, max_shard_size)
            write_pipeline(self, folder)
            card = make_card(folder, options.get("tags"), place=Path(save_directory))
            (folder / README).write_text(card, encoding="utf-8")
        if push_to_hub:
            repo_id = options.pop("repo_id", None) or Path(save_directory).absolute().name
            upload(save_directory, repo_id, **options)

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
        """Uploads everything as one repository, see [`save_pretrained`] and [`push_folder`].

        Args:
            repo_id: "organisation/name"; created if it does not exist.
            saving: `variant`, `max_shard_size`.

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

    def _save_components(self, folder: Path, variant: str | None, max_shard_size: int | str | None) -> None:
        for name, component in self.components.items():
            if component is None:
                continue
            component = getattr(component, "_orig_mod", component)
            options = {}
            if hasattr(component, "state_dict"):
                options["max_shard_size"] = max_shard_size or "10GB"
                options["variant"] = variant
            component.save_pretrained(folder if name in AT_ROOT else folder / name, **options)


def write_pipeline(pipe, folder: Path) -> None:
    """Writes what makes a folder of saved components a pipeline (`model_index.json`, the code), and what runs it
    elsewhere."""
    file = None if is_ours(type(pipe)) else file_of(type(pipe))
    code = file.stem if file else DIFFUSERS_CODE
    index = {"_class_name": [code, type(pipe).__name__], "_diffusers_version": diffusers.__version__}
    for name, component in pipe.components.items():
        if component is None:
            index[name] = [None, None]
            continue
        component = getattr(component, "_orig_mod", component)
        index[name] = [_library_of(component), type(component).__name__]
        copy_own_class(type(component), folder)
    copy_own_class(type(pipe), folder)
    parameters = {name: value for name, value in pipe.config.items() if name not in index and not name.startswith("_")}
    write_json(folder / INDEX, {**index, **parameters})
    write_modular_index(folder, index)
    is_whole = None not in (pipe.processor, pipe.model, pipe.detokenizer, pipe.unet, pipe.scheduler)
    at_root = filter(None, (pipe.components[name] for name in AT_ROOT))
    write_code(folder, *at_root, pipeline=TEXT_TO_IMAGE if is_whole else {})
    if pipe.detokenizer:
        name_classes(folder / "detokenizer", pipe.detokenizer)
    for name, text in publisher.deploying().items() if is_whole else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def write_modular_index(folder: Path, index: dict) -> None:
    """Writes what makes a folder one of diffusers' `ModularPipeline`, too.

    Args:
        index: of `model_index.json`: name -> [library, class] of the components.
    """
    parts = {}
    for name, (library, class_name) in ((name, index[name]) for name in component_names(index)):
        where = {"pretrained_model_name_or_path": REPOSITORY, "subfolder": "" if name in AT_ROOT else name}
        where |= {"revision": None, "type_hint": [library, class_name], "variant": None}
        parts[name] = [library, class_name, where]
    versions = {"_diffusers_version": index["_diffusers_version"]}
    named = {"_class_name": "ModularPipeline", "_blocks_class_name": BLOCKS_CLASS}
    write_json(folder / MODULAR_INDEX, {**named, **versions, **parts})
    auto_map = {"ModularPipelineBlocks": f"{DIFFUSERS_CODE}.{BLOCKS_CLASS}"}
    write_json(folder / BLOCKS_CONFIG, {"_class_name": BLOCKS_CLASS, **versions, "auto_map": auto_map})


def _library_of(component) -> str:
    """Where diffusers looks a component's class up: a library, a pipeline of its own ("stable_diffusion"), or the
    module of a user, who imports it before loading."""
    module = type(component).__module__.split(".")
    if module[:2] == ["diffusers", "pipelines"]:
        return module[2]
    if not is_ours(type(component)) and module[0] not in ("diffusers", "transformers"):
        return type(component).__module__
    return "diffusers" if isinstance(component, diffusers.ConfigMixin) else "transformers"
