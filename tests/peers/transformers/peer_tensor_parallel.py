"""The language model of this package, on two processes, in transformers' common tests of tensor parallelism."""

import unittest

from tests.lavit.peer_models import LavitModelTester
from tests.lavit.processes import stand_in

from modeling_lavit import LavitForConditionalGeneration, LavitModel


stand_in()

from tests import test_tensor_parallel_mixin  # noqa: E402


# None: of every model
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class LavitTensorParallelTest(test_tensor_parallel_mixin.TensorParallelTesterMixin, unittest.TestCase):
    all_model_classes = (LavitModel, LavitForConditionalGeneration)
    model_tester = None

    def setUp(self):
        self.model_tester = LavitModelTester(self)
