"""Blocks of diffusers' ModularPipeline: together, alone, and with one of them replaced."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import InputParam, ModularPipeline, ModularPipelineBlocks, OutputParam
from packaging.version import Version
from tiny import an_image, codes, latents_of, seeded, tiny_pipeline

from modeling_lavit import LavitBlocks
from modeling_lavit.blocks_lavit import LavitConditions, LavitDecode, LavitDenoise, LavitImageToTokens, LavitLatents


@pytest.fixture(scope="module", params=["highres", "lowres"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return str(folder)


def load(folder, blocks=None, **kwargs):
    loaded = blocks.init_pipeline(folder) if blocks else ModularPipeline.from_pretrained(folder, **kwargs)
    # before 0.42 a folder's index is taken at its word: the repository that it will be
    here = {} if Version(diffusers.__version__) >= Version("0.42") else {"pretrained_model_name_or_path": folder}
    loaded.load_components(**here)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def modular(folder):
    return load(folder)


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


CALLS = {
    "text": ({"prompt": "a red apple"}, 1),
    "a batch": ({"prompt": ["a red apple", "two cats"], "num_images_per_prompt": 2, "guidance_scale": 2.0}, 4),
    "an image and text": ({"prompt": [an_image(), "in snow"], "top_k": 5, "decoder_guidance_scale": 3.0}, 1),
    "a size": ({"prompt": "dogs", "height": 24, "width": 32, "num_inference_steps": 2, "eta": 0.5}, 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_blocks_draw_byte_for_byte_what_the_pipeline_draws(pipe, modular, call):
    arguments, count = CALLS[call]
    generators = [seeded(i) for i in range(count)]
    drawn = modular(**arguments, generator=generators)
    expected = pipe(**arguments, generator=[seeded(i) for i in range(count)])
    assert torch.equal(drawn.get("visual_tokens").codes, expected.visual_tokens.codes)
    assert np.array_equal(arrays(drawn.get("images")), arrays(expected.images))


def test_images_are_reconstructed_and_visual_tokens_decoded_as_by_the_pipeline(pipe, modular):
    reconstructed = modular(image=an_image(), keep_ratio=0.5, generator=seeded(1), output="images")
    assert np.array_equal(
        arrays(reconstructed), arrays(pipe.reconstruct(an_image(), keep_ratio=0.5, generator=seeded(1)).images)
    )
    tokens = codes(5, 12)
    decoded = modular(
        visual_tokens=tokens, num_images_per_tokens=2, generator=seeded(1), output_type="latent", output="images"
    )
    expected = latents_of(pipe, visual_tokens=tokens, num_images_per_prompt=2, generator=seeded(1))
    assert torch.equal(decoded, expected)


def test_blocks_are_of_use_alone(pipe, folder):
    to_tokens = load(folder, LavitImageToTokens())
    assert set(to_tokens.components) == {"processor", "model"}
    tokens = to_tokens(image=[an_image(), an_image("green")], output="visual_tokens")
    assert torch.equal(tokens.codes, pipe.tokenize([an_image(), an_image("green")]).codes)
    conditions = load(folder, LavitConditions())
    assert set(conditions.components) == {"detokenizer"}
    embeds = conditions(visual_tokens=tokens, output="prompt_embeds")
    assert torch.equal(embeds, pipe.encode_visual_tokens(tokens)[0]["prompt_embeds"])


def test_a_workflow_has_the_components_that_it_needs(pipe, folder):
    decoding = load(folder, workflow="decoding")
    assert not {"model", "processor"} & set(decoding.components)
    images = decoding(visual_tokens=codes(5), generator=seeded(0), output="images")
    assert np.array_equal(arrays(images), arrays(pipe(visual_tokens=codes(5), generator=seeded(0)).images))
    assert LavitBlocks().available_workflows == ["text2image", "reconstruction", "decoding"]


class LatentsOfOnes(ModularPipelineBlocks):
    """A user's own block."""

    @property
    def inputs(self):
        return [InputParam("prompt_embeds", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam(name) for name in ("latents", "height", "width")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.latents = torch.ones(len(block_state.prompt_embeds), 4, 8, 8)
        block_state.height = block_state.width = 16
        self.set_block_state(state, block_state)
        return components, state


def test_a_block_is_replaced_by_a_users_own(pipe, folder, modular):
    blocks = modular.blocks
    blocks.sub_blocks["latents"] = LatentsOfOnes()
    images = load(folder, blocks)(prompt="a red apple", generator=seeded(0), output="images")
    expected = pipe("a red apple", generator=seeded(0), latents=torch.ones(1, 4, 8, 8)).images
    assert np.array_equal(arrays(images), arrays(expected))
    assert not np.array_equal(arrays(images), arrays(pipe("a red apple", generator=seeded(0)).images))


def test_what_is_wrong_is_said_by_the_block_that_is_given_it(modular, folder):
    refused = {
        "either prompt or image": {"prompt": "a", "image": an_image()},
        "Required input 'visual_tokens' is missing": {},
        "height must be a positive multiple": {"visual_tokens": codes(5), "height": 13},
        "num_inference_steps must be": {"visual_tokens": codes(5), "num_inference_steps": 0},
        "output_type must be": {"visual_tokens": codes(5), "output_type": "jpeg"},
        "generators given": {"visual_tokens": codes(5), "generator": [seeded(0)] * 3},
        "num_images_per_tokens must be": {"visual_tokens": codes(5), "num_images_per_tokens": 0},
    }
    for message, given in refused.items():
        with pytest.raises(ValueError, match=message):
            modular(**given)
    with pytest.raises(ValueError, match="which this pipeline was made without"):
        LavitConditions().init_pipeline(folder)(visual_tokens=codes(5))
    for block in (LavitImageToTokens(), LavitConditions(), LavitLatents(), LavitDenoise(), LavitDecode()):
        assert block.description and all(param.name for param in block.inputs)
