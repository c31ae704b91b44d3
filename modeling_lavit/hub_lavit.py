"""One folder, or repository, that transformers and diffusers load: with this package installed and without it.

    config.json model.safetensors tokenizer.json processor_config.json ...   transformers' files
    model_index.json detokenizer/ unet/ vae/ scheduler/                      diffusers' files
    *.py                                                                     the code, flat
    README.md                                                                the model card

How the code is found. transformers reads `auto_map` (and `custom_pipelines`) of its config files. diffusers runs the
entry file that `model_index.json` names. That file imports every other one, because diffusers copies only what it
imports, and makes the classes known to both libraries under their own names, as importing the package does. So no code
is needed in the components' folders, and the model and the processor can stay at the root.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import transformers
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from .compat_lavit import AutoImageProcessor


# components that live in the folder itself, not in a folder of their own
AT_ROOT = ("processor", "model")
ENTRY = "hub_entry_lavit"
CARD = "model_card_lavit"
GENERATION_AUTO_CLASSES = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")
TEXT_TO_IMAGE = {
    "impl": "pipeline_text_to_image.LavitTextToImagePipeline",
    "pt": ["AutoModelForMultimodalLM"],
    "type": "multimodal",
}


def register_classes(
    model, generation_model, visual_tokenizer, detokenizer, image_processor, processor, pipeline, unet, vae
):
    """Makes classes known to the Auto classes, to `save_pretrained` (it then copies their code) and to diffusers."""
    for model_class in (model, visual_tokenizer, detokenizer):
        config_class = model_class.config_class
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModel.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModel")
    config_class = generation_model.config_class
    for auto_class in GENERATION_AUTO_CLASSES:
        getattr(transformers, auto_class).register(config_class, generation_model, exist_ok=True)
    generation_model.register_for_auto_class(GENERATION_AUTO_CLASSES[0])
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": image_processor}, exist_ok=True)
    transformers.AutoProcessor.register(config_class, processor, exist_ok=True)
    image_processor.register_for_auto_class()
    processor.register_for_auto_class()
    # diffusers looks the components' classes up in the two libraries
    for library, classes in (
        (transformers, (generation_model, detokenizer, processor)),
        (diffusers, (pipeline, unet, vae)),
    ):
        for known in classes:
            setattr(library, known.__name__, known)


def load_without_flag(pipeline):
    """Lets diffusers' `from_pretrained(folder)` use `pipeline`, which is imported, not the folder's copy.

    transformers' Auto classes have this rule (a registered class wins over a repository's code); diffusers has no
    registry for pipelines, and asks for `trust_remote_code=True` wherever a folder names code.
    """
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING["lavit"] = pipeline
    for loader in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
        loader._dict_from_json_file = classmethod(_knowing(pipeline, loader._dict_from_json_file.__func__))


def _knowing(pipeline, read: Callable) -> Callable:
    def _dict_from_json_file(cls, *args, **kwargs):
        config = read(cls, *args, **kwargs)
        is_ours = config.get("_class_name") == [ENTRY, pipeline.__name__]
        return {**config, "_class_name": pipeline.__name__} if is_ours else config

    return _dict_from_json_file


def save_folder(pipe, folder: str | os.PathLike, variant: str | None = None, max_shard_size: int | str | None = None):
    """Writes everything a pipeline is made of, see the top of this file."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; a pipeline is saved as a folder")
    if pipe.model.config.generation_only:
        raise ValueError("the model was loaded with generation_only=True: a pipeline is saved with all its parts")
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in pipe.components.items():
        if component is None:
            continue
        component = getattr(component, "_orig_mod", component)
        options = {}
        if hasattr(component, "state_dict"):
            options["max_shard_size"] = max_shard_size or "10GB"
            # diffusers looks for variants in the components' folders only
            options["variant"] = None if name in AT_ROOT else variant
        component.save_pretrained(folder if name in AT_ROOT else folder / name, **options)
    _write_index_code_and_card(pipe, folder, {})


class LavitSavingMixin:
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

        Args:
            save_directory: created if it does not exist.
            safe_serialization: always true: weights are saved as safetensors only.
            variant: goes into the names of diffusers' weight files ("fp16"); the model's are looked up without.
            max_shard_size: largest weight file ("5GB").
            push_to_hub: also upload the folder; `kwargs` are those of [`push_to_hub`], `repo_id` is the
                folder's name by default.
        """
        if not safe_serialization:
            raise ValueError("weights are saved as safetensors only, safe_serialization=False is not possible")
        if kwargs and not push_to_hub:
            raise ValueError(f"{sorted(kwargs)} have a meaning with push_to_hub=True only")
        save_folder(self, save_directory, variant=variant, max_shard_size=max_shard_size)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            push_folder(save_directory, repo_id, **kwargs)

    def push_to_hub(self, repo_id: str, variant: str | None = None, **kwargs) -> str:
        """Uploads everything as one repository, see [`save_pretrained`].

        Args:
            repo_id: "organisation/name"; created if it does not exist.
            kwargs: `commit_message`, `private`, `token`, `create_pr`, `max_shard_size`.

        Returns:
            The URL of the commit.
        """
        max_shard_size = kwargs.pop("max_shard_size", None)
        return push_folder(
            lambda folder: save_folder(self, folder, variant=variant, max_shard_size=max_shard_size), repo_id, **kwargs
        )


def describe_folder(pipe, folder: str | os.PathLike, **card):
    """Writes everything that [`save_folder`] writes but the weights: the models may be on the meta device.

    Args:
        pipe, folder: as there; the folder exists.
        card: of [`model_card`].
    """
    folder = Path(folder)
    for name, component in pipe.components.items():
        if component is not None:
            describe_component(component, folder if name in AT_ROOT else folder / name)
    _write_index_code_and_card(pipe, folder, card)


def describe_reader(model, processor, folder: str | os.PathLike, **card):
    """As [`describe_folder`], for a model and its processor without a pixel decoder."""
    folder = Path(folder)
    for component in (model, processor):
        describe_component(component, folder)
    model_card(model, **card).save(folder / "README.md")


def describe_component(component, folder: Path):
    """Everything that a component's `save_pretrained` writes but weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(component, transformers.PreTrainedModel):
        component.config.architectures = [type(component).__name__]
        if component._auto_class is not None:
            custom_object_save(component, folder, config=component.config)
        component.config.save_pretrained(folder)
        if component.can_generate():
            component.generation_config.save_pretrained(folder)
    elif isinstance(component, diffusers.ModelMixin):
        component.save_config(folder)
    else:
        component.save_pretrained(folder)


def _write_index_code_and_card(pipe, folder: Path, card: dict):
    index = {"_class_name": [ENTRY, type(pipe).__name__], "_diffusers_version": diffusers.__version__}
    code = _code_of(type(pipe))
    code.add(Path(sys.modules[type(pipe).__module__].__file__).with_name("pipeline_text_to_image.py"))
    for name, component in pipe.components.items():
        if component is None:
            index[name] = [None, None]
            continue
        component = getattr(component, "_orig_mod", component)
        index[name] = [_library_of(component), type(component).__name__]
        code |= _code_of(type(component))
    code |= _code_of(type(pipe.processor.image_processor))

    parameters = {name: value for name, value in pipe.config.items() if name not in index and not name.startswith("_")}
    _write_json(folder / "model_index.json", {**index, **parameters})
    for file in code:
        shutil.copyfile(file, folder / file.name)
    (folder / f"{ENTRY}.py").write_text(_entry(pipe, code))
    (folder / f"{CARD}.py").write_text(f'"""The template of README.md."""\n\nTEMPLATE = {card_template()!r}\n')
    config = json.loads((folder / "config.json").read_text())
    config["custom_pipelines"] = {"text-to-image": TEXT_TO_IMAGE}
    _write_json(folder / "config.json", config)
    model_card(pipe.model, pipe, **card).save(folder / "README.md")


def push_folder(
    source: str | os.PathLike | Callable[[str], None],
    repo_id: str,
    commit_message: str = "Upload LaVIT",
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder, or what `source(folder)` writes into an empty one; the repository is created if there is none.

    A README that the repository has already stays as it is.

    Returns:
        The URL of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        if callable(source):
            source(temporary)
            source = temporary
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=source,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=["README.md"] if api.file_exists(repo_id, "README.md") else None,
        )
    return commit.commit_url


def card_template() -> str:
    """The text of `model_card.md`."""
    here = Path(__file__).resolve().parent
    for path in (here / "model_card.md", here.parent / "model_card.md"):
        if path.is_file():
            return path.read_text()
    # this code runs from a saved folder
    return importlib.import_module(f".{CARD}", __package__).TEMPLATE


def model_card(model, pipe=None, notice: str | None = None, lowres: bool = False, **metadata) -> ModelCard:
    """The README of a repository, from `model_card.md`.

    Args:
        model: the language model with the visual tokenizer.
        pipe: the pipeline, where there is a pixel decoder.
        notice: the section on licences.
        lowres: whether `lowres/` holds a second pixel decoder.
        metadata: more entries of the card's head: `license`, `base_model`, ...
    """
    config = model.config
    tags = ["lavit", "image-text-to-text"]
    facts = {}
    if pipe is not None:
        tags += ["text-to-image", "diffusers:LavitPipeline"]
        facts = {
            "height": pipe.default_size[0],
            "width": pipe.default_size[1],
            "steps": pipe.defaults.num_inference_steps,
            "aspect_ratios": ", ".join(pipe.defaults.aspect_ratios),
        }
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-text-to-text" if pipe is None else "any-to-any",
            tags=tags,
            **metadata,
        ),
        template_str=card_template(),
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M",
        codebook_size=config.visual_config.codebook_size,
        num_patches=config.visual_config.num_patches,
        input_size=config.visual_config.image_size,
        notice=notice,
        lowres=lowres,
        **facts,
    )


def _library_of(component) -> str:
    """Where diffusers looks a component's class up: a library, or a pipeline of its own ("stable_diffusion")."""
    module = type(component).__module__.split(".")
    if module[:2] == ["diffusers", "pipelines"]:
        return module[2]
    return "diffusers" if isinstance(component, diffusers.ConfigMixin) else "transformers"


def _code_of(cls: type) -> set[Path]:
    """The file of a class of ours and all files that it imports; nothing for classes of the libraries."""
    if cls.__module__.split(".")[0] in ("diffusers", "transformers"):
        return set()
    file = sys.modules[cls.__module__].__file__
    return {Path(path) for path in (file, *get_relative_import_files(file))}


def _entry(pipe, code: set[Path]) -> str:
    """The file that diffusers runs first in a process without the package."""
    classes = {
        "generation_model": type(pipe.model),
        "model": type(pipe.model.model),
        "visual_tokenizer": type(pipe.model.model.visual_tokenizer),
        "detokenizer": type(pipe.detokenizer),
        "image_processor": type(pipe.processor.image_processor),
        "processor": type(pipe.processor),
        "pipeline": type(pipe),
        "unet": type(pipe.unet),
        "vae": diffusers.AutoencoderKL if pipe.vae is None else type(pipe.vae),
    }
    lines = ['"""Where diffusers begins: it copies what this file imports, and finds what is registered here."""', ""]
    for stem in sorted({file.stem for file in code} | {CARD}):
        lines.append(f"from .{stem} import __doc__ as _")
    for cls in classes.values():
        library = cls.__module__.split(".")[0]
        module = library if library in ("diffusers", "transformers") else "." + cls.__module__.split(".")[-1]
        lines.append(f"from {module} import {cls.__name__}")
    lines.append("from .hub_lavit import register_classes")
    arguments = "".join(f"    {name}={cls.__name__},\n" for name, cls in classes.items())
    return "\n".join(lines) + f"\n\n\nregister_classes(\n{arguments})\n"


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
