"""The processor and the image processor of this package in transformers' common tests."""

import unittest

import tests.test_processing_common as common
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin
from tiny import tiny_tokenizer

from modeling_lavit import LavitImageProcessor, LavitProcessor


# instead of images on the Hub
common.MODALITY_INPUT_DATA["images"] = ["tests/fixtures/tests_samples/COCO/000000039769.png"] * 2


class LavitProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LavitProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return LavitImageProcessor(size={"height": 16, "width": 16})


class LavitImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, size={"height": 18, "width": 18}, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": LavitImageProcessor}


class LavitImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LavitImageProcessingTester
