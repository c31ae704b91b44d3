"""Everything in a folder but the weights and the card: written for models on the meta device."""

from pathlib import Path

import diffusers
import transformers

from modeling_lavit.hub_lavit import AT_ROOT
from modeling_lavit.pipeline_saving_lavit import write_pipeline
from modeling_lavit.saving_lavit import write_code


def describe_folder(pipe, folder: Path):
    """Writes everything that [`LavitPipeline.save_pretrained`] writes but the weights.

    Args:
        pipe: its models may be on the meta device.
        folder: exists.
    """
    for name, component in pipe.components.items():
        if component is not None:
            describe_component(component, folder if name in AT_ROOT else folder / name)
    write_pipeline(pipe, folder)


def describe_reader(model, processor, folder: Path):
    """As [`describe_folder`], for a model and its processor without a pixel decoder."""
    for component in (model, processor):
        describe_component(component, folder)
    write_code(folder, model, processor)


def describe_component(component, folder: Path):
    """Everything that a component's `save_pretrained` writes but weights and code."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(component, transformers.PreTrainedModel):
        component.config.architectures = [type(component).__name__]
        component.config.save_pretrained(folder)
        if component.can_generate():
            component.generation_config.save_pretrained(folder)
    elif isinstance(component, diffusers.ModelMixin):
        component.save_config(folder)
    else:
        component.save_pretrained(folder)
