"""What needs diffusers is imported when it is asked for: reading images does without.

diffusers looks a pipeline and its components up in its own module, by name, and asks for `trust_remote_code=True`
wherever a folder names code. So whoever imports diffusers beside this package finds our classes there, and
`DiffusionPipeline.from_pretrained(folder)` uses the class that is installed, not the folder's copy. transformers' Auto
classes have this rule (a registered class wins over a repository's code); diffusers has no registry for pipelines.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .saving_lavit import DIFFUSERS_CODE


# class -> the file that has it
DIFFUSERS_CLASSES = {
    "LavitPipeline": "pipeline_lavit",
    "LavitBlocks": "blocks_lavit",
    "LavitUNet2DConditionModel": "small_decoder_lavit",
    "LavitPatchAutoencoder": "small_decoder_lavit",
}
# how a folder's `model_index.json` names the class
NAMED = [DIFFUSERS_CODE, "LavitPipeline"]


def load(name: str) -> type:
    """One of [`DIFFUSERS_CLASSES`]."""
    return getattr(import_module(f"{__package__}.{DIFFUSERS_CLASSES[name]}"), name)


class ImportedLater(MetaPathFinder):
    """Calls `actions[name](module)` as soon as the module of that name has been imported; now if it is already."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self.actions = actions
        self.searching = False
        for name in list(actions):
            if name in sys.modules:
                self.actions.pop(name)(sys.modules[name])

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if self.searching or name not in self.actions:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                # a module may put another in its place
                self.actions.pop(name)(sys.modules[name])

            spec.loader.exec_module = exec_module
        return spec


def name_classes_in(diffusers: ModuleType) -> None:
    """`diffusers.LavitPipeline` and the others: diffusers' own way of importing them when they are asked for."""

    def __getattr__(name: str):
        if name not in DIFFUSERS_CLASSES:
            raise AttributeError(name)
        return load(name)

    diffusers.__getattr__ = __getattr__


def load_without_flag(pipeline_utils: ModuleType) -> None:
    """Has `DiffusionPipeline.from_pretrained(folder)` use the pipeline of this package, where the folder names it."""
    base = pipeline_utils.DiffusionPipeline
    load_any = base.from_pretrained.__func__

    def from_pretrained(cls, source, **kwargs):
        from .hub_lavit import DOWNLOAD_OPTIONS, component_names, read_index

        if cls is base:
            try:
                index = read_index(source, **{name: kwargs[name] for name in DOWNLOAD_OPTIONS if name in kwargs})
            except OSError:
                # diffusers says what is wrong
                index = {}
            if isinstance(index.get("_class_name"), list):
                component_names(index)
            if index.get("_class_name") == NAMED:
                return load("LavitPipeline").from_pretrained(source, **kwargs)
        return load_any(cls, source, **kwargs)

    base.from_pretrained = classmethod(from_pretrained)


def load_blocks_without_flag(modular_pipeline: ModuleType) -> None:
    """As [`load_without_flag`], for `ModularPipelineBlocks.from_pretrained(folder)`."""
    base = modular_pipeline.ModularPipelineBlocks
    load_any = base.from_pretrained.__func__

    def from_pretrained(cls, source, **kwargs):
        from .hub_lavit import DOWNLOAD_OPTIONS

        if cls is base:
            where = {name: kwargs[name] for name in (*DOWNLOAD_OPTIONS, "subfolder") if name in kwargs}
            named = cls.load_config(source, **where).get("auto_map", {})
            if named.get(cls.__name__) == f"{DIFFUSERS_CODE}.LavitBlocks":
                return load("LavitBlocks")()
        return load_any(cls, source, **kwargs)

    base.from_pretrained = classmethod(from_pretrained)


def register_task(auto_pipeline: ModuleType) -> None:
    """Makes `AutoPipelineForText2Image` know the pipeline."""
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["lavit"] = load("LavitPipeline")
    auto = auto_pipeline.AutoPipelineForText2Image
    load_config = auto.load_config.__func__

    def load_plain_config(cls, *args, **kwargs):
        config = load_config(cls, *args, **kwargs)
        return {**config, "_class_name": NAMED[1]} if config.get("_class_name") == NAMED else config

    auto.load_config = classmethod(load_plain_config)


def register_with_diffusers() -> None:
    """Everything above, each as soon as diffusers has been imported so far."""
    actions = {
        "diffusers": name_classes_in,
        "diffusers.pipelines.pipeline_utils": load_without_flag,
        "diffusers.pipelines.auto_pipeline": register_task,
        "diffusers.modular_pipelines.modular_pipeline": load_blocks_without_flag,
    }
    sys.meta_path.insert(0, ImportedLater(actions))
