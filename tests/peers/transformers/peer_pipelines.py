"""The model of this package in transformers' common tests of the tasks that read images."""

import copy
import random

import pytest
import torch
from tests.pipelines import test_pipelines_any_to_any, test_pipelines_image_text_to_text
from tiny import tiny_model, tiny_processor
from transformers import set_seed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "suite",
    [test_pipelines_any_to_any.AnyToAnyPipelineTests, test_pipelines_image_text_to_text.ImageTextToTextPipelineTests],
)
def test_pipeline(suite, dtype):
    # as `PipelineTesterMixin.run_pipeline_test` does with models of the Hub
    set_seed(0)
    processor, tests = tiny_processor(), suite()
    processor.tokenizer.image_token = processor.image_token
    parts = {"tokenizer": processor.tokenizer, "processor": processor, "image_processor": processor.image_processor}
    pipe, examples = tests.get_test_pipeline(tiny_model().to(getattr(torch, dtype)), **parts, dtype=dtype)
    tests.run_pipeline_test(pipe, examples)
    rows = (copy.deepcopy(random.choice(examples)) for _ in range(10))
    assert len(list(pipe(rows, batch_size=4))) == 10
