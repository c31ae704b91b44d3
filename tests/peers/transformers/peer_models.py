"""The models of this package in transformers' common tests of models, generation and training."""

import unittest

import tests.test_modeling_common as common
import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from tiny import CODEBOOK_DIM, CODEBOOK_SIZE, IMAGE_SIZE, NUM_PATCHES, tiny_config, tiny_visual_config

from modeling_lavit import (
    LavitConfig,
    LavitDetokenizer,
    LavitDetokenizerConfig,
    LavitForConditionalGeneration,
    LavitModel,
    LavitVisualTokenizer,
    LavitVisualTokenizerConfig,
)


# the common tests know by these lists which model has a loss
common.MODEL_MAPPING_NAMES = common.MODEL_MAPPING_NAMES | {
    model_class.config_class.model_type: model_class.__name__
    for model_class in (LavitModel, LavitVisualTokenizer, LavitDetokenizer)
}
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | {
    "lavit": "LavitForConditionalGeneration"
}


def text_ids(shape, vocab_size, **kwargs):
    """Random ids of texts, for tests that make up ids of their own: of all ids, some would be slots by chance."""
    return ids_tensor(shape, min(vocab_size, LavitModelTester.vocab_size), **kwargs)


common.ids_tensor = text_ids


class ModelTester:
    """What the common tests ask of a model: its configuration and inputs."""

    # so many prompts that the tests need not make up further ones, whose ids have no slots
    batch_size = 7
    hidden_size = 32
    num_hidden_layers = 2
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_config_and_inputs_for_common(self) -> tuple:
        return self.get_config(), self.get_inputs()


class ConfigTestCase(unittest.TestCase):
    """Compares configurations without `auto_map`: a saved one names the code beside it, a new one cannot."""

    def __init__(self, model_tester: ModelTester):
        super().__init__()
        self.model_tester = model_tester

    def assertEqual(self, first, second, msg=None):
        super().assertEqual(*(self._without_code(one) for one in (first, second)), msg)

    @staticmethod
    def _without_code(value):
        return {k: v for k, v in value.items() if k != "auto_map"} if isinstance(value, dict) else value


class ConfigTestMixin:
    model_tester_class: type[ModelTester]
    config_class: type

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        parent = ConfigTestCase(self.model_tester)
        self.config_tester = ConfigTester(parent, config_class=self.config_class, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class LavitModelTester(ModelTester):
    """Each prompt has one image."""

    seq_length = 12
    num_attention_heads = 4
    # of the ids that texts are made of here; a common test makes the matrices as small as 128 rows
    vocab_size = 50
    conditional_generation_class = LavitForConditionalGeneration
    base_model_class = LavitModel
    num_features = (IMAGE_SIZE // 8) ** 2

    def get_config(self) -> LavitConfig:
        # every image has as many features, whatever its pixels
        visual_config = tiny_visual_config(selection="all", patch_size=8)
        config = tiny_config(text_vocab_size=self.vocab_size + 3, visual_config=visual_config)
        config.text_config.vocab_size = config.vocabulary.size + 20
        config.text_config.pad_token_id = 0
        return config

    def get_inputs(self) -> dict:
        vocabulary = self.get_config().vocabulary
        input_ids = 3 + ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        input_ids[:, 4:6] = torch.tensor([vocabulary.boi_token_id, vocabulary.eoi_token_id])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE]),
        }


class LavitModelTest(ConfigTestMixin, ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LavitModel, LavitForConditionalGeneration)
    config_class = LavitConfig
    model_tester_class = LavitModelTester
    additional_model_inputs = ["pixel_values"]
    _is_composite = True

    def _get_trainable_model_class(self):
        return LavitForConditionalGeneration

    # attentions and caches are of the positions that the language model computes on: a filled slot's features too

    def _check_attentions_for_generate(self, batch_size, attentions, prompt_length, output_length, **kwargs):
        more = self.model_tester.num_features
        super()._check_attentions_for_generate(
            batch_size, attentions, prompt_length + more, output_length + more, **kwargs
        )

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        seq_length += self.model_tester.num_features
        super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)


class LavitTextModelTester(LavitModelTester):
    """Text alone: the model may do without its encoder."""

    num_features = 0

    def get_config(self) -> LavitConfig:
        config = super().get_config()
        config.generation_only = True
        return config

    def get_inputs(self) -> dict:
        input_ids = 3 + ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class LavitTextModelTest(LavitModelTest):
    model_tester_class = LavitTextModelTester


class LavitVisualTokenizerTester(ModelTester):
    seq_length = NUM_PATCHES + 1
    num_attention_heads = 2

    def get_config(self) -> LavitVisualTokenizerConfig:
        return tiny_visual_config()

    def get_inputs(self) -> dict:
        return {"pixel_values": floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE])}


class LavitVisualTokenizerTest(ConfigTestMixin, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LavitVisualTokenizer,)
    config_class = LavitVisualTokenizerConfig
    model_tester_class = LavitVisualTokenizerTester
    test_resize_embeddings = False


class LavitDetokenizerTester(ModelTester):
    seq_length = NUM_PATCHES
    num_attention_heads = 2

    def get_config(self) -> LavitDetokenizerConfig:
        return LavitDetokenizerConfig(
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_queries=NUM_PATCHES,
            codebook_size=CODEBOOK_SIZE,
            codebook_dim=CODEBOOK_DIM,
            feature_size=32,
            prompt_embed_dims=(8, 16),
            pooled_embed_dim=16,
        )

    def get_inputs(self) -> dict:
        lengths = torch.full((self.batch_size,), 5)
        return {"codes": ids_tensor([int(lengths.sum())], CODEBOOK_SIZE), "lengths": lengths}


class LavitDetokenizerTest(ConfigTestMixin, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LavitDetokenizer,)
    config_class = LavitDetokenizerConfig
    model_tester_class = LavitDetokenizerTester
    test_resize_embeddings = False
    # its layers' attentions are of images' codes in a pack, and no part of the output
    has_attentions = False
