"""`tests.distributed_testing_utils` of transformers where its archive has none: one gloo process a rank."""

import importlib
import socket
import sys
import types

import torch.distributed as dist
import torch.multiprocessing as mp


NAME = "tests.distributed_testing_utils"


def run_distributed(world_size: int):
    """`run_distributed(2)(function)(*arguments)` calls `function(rank, *arguments)` in two processes."""

    def decorate(function):
        def run(*arguments):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(_rank, (world_size, port, function.__module__, function.__name__, arguments), nprocs=world_size)

        return run

    return decorate


def _rank(rank: int, world_size: int, port: int, module: str, name: str, arguments: tuple) -> None:
    stand_in()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        getattr(importlib.import_module(module), name)(rank, *arguments)
    finally:
        dist.destroy_process_group()


def stand_in() -> None:
    """Makes this module importable as transformers' own, unless that is there."""
    if importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = types.ModuleType(NAME)
        sys.modules[NAME].run_distributed = run_distributed
