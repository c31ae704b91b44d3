"""The models for small pixel decoders in diffusers' common tests of models."""

import torch
from tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
from tests.models.test_modeling_common import UNetTesterMixin
from tests.models.testing_utils import (
    AttentionTesterMixin,
    BaseModelTesterConfig,
    LoraTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TrainingTesterMixin,
)

from modeling_lavit import LavitPatchAutoencoder, LavitUNet2DConditionModel


class UNetConfig(BaseModelTesterConfig):
    model_class = LavitUNet2DConditionModel
    main_input_name = "sample"
    output_shape = (4, 16, 16)
    model_split_percents = [0.5, 0.34, 0.4]

    def get_init_dict(self) -> dict:
        return {
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "sample_size": 16,
        }

    def get_dummy_inputs(self) -> dict:
        generator = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(4, 4, 16, 16, generator=generator),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": torch.randn(4, 4, 8, generator=generator),
        }


class TestUNet(UNetConfig, ModelTesterMixin, UNetTesterMixin):
    pass


class TestUNetMemory(UNetConfig, MemoryTesterMixin):
    pass


class TestUNetLora(UNetConfig, LoraTesterMixin):
    pass


class TestUNetAttention(UNetConfig, AttentionTesterMixin):
    pass


class TestUNetTraining(UNetConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        blocks = {"CrossAttnUpBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn"}
        super().test_gradient_checkpointing_is_applied(
            expected_set=blocks | {"UpBlock2D", "Transformer2DModel", "DownBlock2D"}
        )


class AutoencoderConfig(BaseModelTesterConfig):
    model_class = LavitPatchAutoencoder
    main_input_name = "sample"
    output_shape = (3, 16, 16)

    def get_init_dict(self) -> dict:
        return {"patch_size": 4, "latent_channels": 24, "block_out_channels": (1, 1, 1)}

    def get_dummy_inputs(self) -> dict:
        return {"sample": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


class TestAutoencoder(AutoencoderConfig, ModelTesterMixin, AutoencoderTesterMixin):
    pass


class TestAutoencoderMemory(AutoencoderConfig, MemoryTesterMixin):
    pass


class TestAutoencoderTraining(AutoencoderConfig, TrainingTesterMixin):
    pass
