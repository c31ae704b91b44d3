"""Private names of diffusers and transformers that this package relies on: it shows here when one goes."""

import diffusers
import pytest
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin


PIPELINE, SDXL = diffusers.DiffusionPipeline, diffusers.StableDiffusionXLPipeline


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        # what diffusers' own pipelines define for their base class: LavitPipeline does
        (PIPELINE, "_optional_components"),
        (PIPELINE, "_exclude_from_cpu_offload"),
        (SDXL, "_callback_tensor_inputs"),
        (StableDiffusionXLLoraLoaderMixin, "_lora_loadable_modules"),
        # asked for or overridden
        (PIPELINE, "_execution_device"),
        (SDXL, "_get_add_time_ids"),
    ],
)
def test_the_name_is_there(owner, name):
    assert hasattr(owner, name)


def test_a_denoising_loop_is_stopped_by_the_name_that_diffusers_documents():
    assert SDXL.interrupt.fget.__code__.co_names == ("_interrupt",)
