"""`python fsdp_on_cpus.py RECIPE …`: a training run with accelerate's FSDP on CPUs.

torch shards there too, but accelerate takes FSDP for accelerators alone: it is told that this is one.
"""

import sys

from accelerate.state import DistributedType, PartialState

from modeling_lavit.training.run import main


original = PartialState.__init__


def as_accelerator(self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU


PartialState.__init__ = as_accelerator
main(sys.argv[1:])
