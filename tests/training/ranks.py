"""Runs on two ranks, and how they compare with one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from parts import read_log


ROOT = Path(__file__).parents[2]
FSDP = (str(Path(__file__).parent / "fsdp_on_cpus.py"),)


def run_on_two_ranks(arguments: list[str], program: tuple[str, ...] = ("-m", "modeling_lavit.training.run")):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.run([*command, *program, *arguments], cwd=ROOT, capture_output=True, text=True)


def arguments(output: Path, **more) -> list[str]:
    values = {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "warmup_steps": 0,
        "bf16": False,
        "report_to": "none",
    }
    return [f"training_arguments.{key}={json.dumps(value)}" for key, value in (values | more).items()]


def assert_same_curves(one: Path, two: Path, steps: int) -> None:
    """Losses, gradients and what the stage reports."""
    records = [read_log(run) for run in (one, two)]
    assert len(records[0]) == steps
    for first, second in zip(*records, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=5e-3)
    validated = [
        [record for record in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "eval_loss" in record]
        for run in (one, two)
    ]
    for first, second in zip(*validated, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if key.endswith(("loss", "cosine", "keep_rate")):
                assert first[key] == pytest.approx(second[key], rel=5e-3), key
