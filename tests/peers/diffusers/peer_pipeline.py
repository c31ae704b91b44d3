"""LavitPipeline in diffusers' common tests of pipelines: with an AutoencoderKL, and of the lower resolution."""

import functools
import unittest

import torch
from diffusers import AutoencoderKL
from tests.pipelines.test_pipelines_common import (
    PipelineFromPipeTesterMixin,
    PipelineKarrasSchedulerTesterMixin,
    PipelineLatentTesterMixin,
    PipelineTesterMixin,
    SDFunctionTesterMixin,
)
from tiny import tiny_model, tiny_pipeline, tiny_text_config

from modeling_lavit import LavitPipeline


class LavitPipelineTests(
    SDFunctionTesterMixin,
    PipelineLatentTesterMixin,
    PipelineKarrasSchedulerTesterMixin,
    PipelineFromPipeTesterMixin,
    PipelineTesterMixin,
):
    pipeline_class = LavitPipeline
    original_pipeline_class = LavitPipeline
    params = frozenset(["prompt", "height", "width", "cross_attention_kwargs"])
    batch_params = frozenset(["prompt"])
    image_params = image_latents_params = frozenset()
    test_xformers_attention = False
    test_layerwise_casting = True
    test_group_offloading = True
    variant, output_type = "highres", "np"

    def setUp(self):
        super().setUp()
        save = LavitPipeline.save_pretrained

        @functools.wraps(save)
        def save_pretrained(pipe, *args, safe_serialization=True, **kwargs):
            # the tests ask for pickles, which are never written: what they test is tested with safetensors
            return save(pipe, *args, **kwargs)

        patch = unittest.mock.patch.object(LavitPipeline, "save_pretrained", save_pretrained)
        patch.start()
        self.addCleanup(patch.stop)

    def get_dummy_components(self) -> dict:
        model = tiny_model(text_config=tiny_text_config(max_position_embeddings=1024))
        parts = {"vae": self.vae(), "model": model, "default_decoder_guidance_scale": 3.0}
        return dict(tiny_pipeline(self.variant, **parts).components)

    def vae(self):
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        return AutoencoderKL(block_out_channels=[4, 8], latent_channels=4, norm_num_groups=2, **blocks).eval()

    def get_dummy_inputs(self, device, seed: int = 0) -> dict:
        return {
            "prompt": "a red apple on the table",
            "generator": torch.Generator("cpu").manual_seed(seed),
            "num_inference_steps": 2,
            "max_image_tokens": 6,
            "output_type": self.output_type,
        }

    def test_save_load_optional_components(self):
        # one of them is the autoencoder
        self.output_type = "latent"
        super().test_save_load_optional_components()

    get_dummy_inputs_for_pipe = get_dummy_inputs
    get_dummy_inputs_for_pipe_original = get_dummy_inputs


class TestHighres(LavitPipelineTests, unittest.TestCase):
    pass


class TestLowres(LavitPipelineTests, unittest.TestCase):
    variant = "lowres"
