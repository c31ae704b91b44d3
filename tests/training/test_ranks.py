"""Two ranks train as one with the same global batch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import detokenizer_sizes, sizes, write_parts
from ranks import FSDP, arguments, assert_same_curves, run_on_two_ranks
from safetensors.torch import load_file

from modeling_lavit.training.run import main


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def rows(parts: Path, **more) -> str:
    return "data=" + json.dumps({"path": "parquet", "data_files": str(parts / "rows.parquet"), **more})


def stage_two(parts: Path) -> list[str]:
    return ["finetune", rows(parts), f"start={parts / 'lavit'}", "lora=null", "early_stopping_patience=null"]


def test_stage_two(parts, tmp_path):
    # into a second epoch, in which its samples are others
    more = [*stage_two(parts), "augmentation={share: 0.9}", "data.validation=train[:4]"]
    steps = {"max_steps": 3, "eval_steps": 3, "load_best_model_at_end": False}
    main([*more, *arguments(tmp_path / "one", **steps)])
    done = run_on_two_ranks([*more, *arguments(tmp_path / "two", **steps, per_device_train_batch_size=3)])
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 3)


def test_stage_three(parts, tmp_path):
    more = ["paper_pixel_decoder", rows(parts), f"tokenizer={parts / 'lowres'}", "language_model=null"]
    more += [f"start={parts / 'diffusion_lowres'}", "resolution=32", "objective.condition_dropout=0.5"]
    main([*more, *arguments(tmp_path / "one")])
    done = run_on_two_ranks([*more, *arguments(tmp_path / "two", per_device_train_batch_size=3)])
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 4)


def test_shards_train_as_one_whole_and_come_together_again(parts, tmp_path):
    """FSDP: each rank holds a half of every parameter; a cut run goes on, and the result is that of one rank."""
    steps = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": False}
    main([*stage_two(parts), *arguments(tmp_path / "one", **steps)])
    sharded = arguments(tmp_path / "two", **steps, per_device_train_batch_size=3, fsdp=True)
    done = run_on_two_ranks([*stage_two(parts), *sharded], FSDP)
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 4)
    for folder in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "two" / folder)
    done = run_on_two_ranks([*stage_two(parts), *sharded], FSDP)  # from checkpoint-2
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 4)
    expected = load_file(tmp_path / "one" / "final" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "two" / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4, msg=key)


def test_a_stage_that_cannot_be_sharded_says_so(parts, tmp_path):
    more = ["paper_tokenizer", rows(parts), f"encoder={parts / 'lowres'}", f"model={sizes()}"]
    more += [f"detokenizer={detokenizer_sizes('lowres')}", *arguments(tmp_path, fsdp=True)]
    done = run_on_two_ranks(more, FSDP)
    assert done.returncode
    assert "run it by DDP, without FSDP" in done.stderr
