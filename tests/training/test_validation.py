"""Rows that are held out are evaluated as the Trainer's users know it: steps, best checkpoint, early stopping."""

import json
from pathlib import Path

import pytest
import torch
from parts import detokenizer_sizes, read_log, sizes, write_parts
from safetensors.torch import load_file

from modeling_lavit.training.run import main


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def train(output: Path, *overrides: str, **arguments) -> list[dict]:
    """Trains and returns the records of evaluations."""
    values = {"output_dir": str(output), "warmup_steps": 0, "logging_steps": 1, "bf16": False, "report_to": "none"}
    values |= {"max_steps": 4, "save_steps": 1, "save_total_limit": 9} | arguments
    main([*overrides, *(f"training_arguments.{key}={json.dumps(value)}" for key, value in values.items())])
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "eval_loss" in record]


def stage_one(parts: Path, validation: str = "0.34") -> list[str]:
    rows = f"data={{path: parquet, data_files: {parts / 'rows.parquet'}, validation: {validation}}}"
    more = f"encoder={parts / 'lowres'}", f"model={sizes()}", f"detokenizer={detokenizer_sizes('lowres')}"
    return ["paper_tokenizer", rows, *more]


def stage_two(parts: Path, validation: str = "0.34") -> list[str]:
    rows = f"data={{path: parquet, data_files: {parts / 'rows.parquet'}, validation: {validation}}}"
    return ["finetune", rows, f"start={parts / 'lavit'}", "lora=null", "early_stopping_patience=null"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_stage_one_reports_cosine_and_keep_rate_at_every_eval_step(parts, tmp_path):
    records = train(tmp_path, *stage_one(parts), eval_steps=2, per_device_train_batch_size=4)
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert 0 < record["eval_keep_rate"] <= 1 and -1 <= record["eval_cosine"] <= 1
    assert "eval_perplexity" not in records[0] and "eval_perplexity" in records[1]  # quantized from step 3 on


def test_stage_three_reports_the_denoising_loss_of_the_averaged_weights(parts, tmp_path):
    rows = f"data={{path: parquet, data_files: {parts / 'rows.parquet'}, validation: 'train[:3]'}}"
    more = f"tokenizer={parts / 'lowres'}", f"start={parts / 'diffusion_lowres'}", "language_model=null"
    still = {"learning_rate": 0.0, "eval_steps": 1, "max_steps": 2}
    records = train(tmp_path, "paper_pixel_decoder", rows, *more, "resolution=16", **still)
    # the noise of validation is the same in every evaluation, so what stands still has one loss
    assert records[0]["eval_error"] == records[1]["eval_error"] > 0


def test_evaluation_does_not_change_what_is_trained(parts, tmp_path):
    train(tmp_path / "with", *stage_two(parts, "'train[:4]'"), load_best_model_at_end=False)
    train(tmp_path / "without", *stage_two(parts, "null"), load_best_model_at_end=False)
    losses = [[record["loss"] for record in read_log(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_without_eval_steps_it_is_evaluated_when_it_is_saved_and_at_the_end(parts, tmp_path):
    records = train(tmp_path, *stage_two(parts), save_steps=3, load_best_model_at_end=False)
    assert [record["step"] for record in records] == [3, 4]


def test_the_result_is_the_best_checkpoint(parts, tmp_path):
    records = train(tmp_path, *stage_two(parts), learning_rate=0.1, lr_scheduler_type="constant", max_steps=6)
    best = min(records, key=lambda record: record["eval_text_loss"])["step"]
    assert best < 6, "this learning rate is to make it worse"
    trained = weights(tmp_path / f"checkpoint-{best}")
    for key, tensor in weights(tmp_path / "final").items():
        assert torch.equal(trained[f"wrapped.{key}"], tensor), key


def test_training_stops_where_nothing_improves(parts, tmp_path):
    more = [*stage_two(parts), "early_stopping_patience=2"]
    records = train(tmp_path, *more, learning_rate=0.1, lr_scheduler_type="constant", max_steps=9)
    steps = [record["step"] for record in records]
    losses = [record["eval_text_loss"] for record in records]
    assert steps[-1] < 9 and losses.index(min(losses)) == len(losses) - 3


def test_the_best_checkpoint_of_stage_one_is_one_of_the_phase_with_codes(parts, tmp_path):
    """Before quantization the loss is lower, but such a tokenizer has no codebook."""
    records = train(
        tmp_path,
        *stage_one(parts),
        "objective.commitment_weight=50",
        max_steps=6,
        per_device_train_batch_size=4,
        load_best_model_at_end=True,
    )
    losses = {record["step"]: record["eval_loss"] for record in records}
    with_codes = {record["step"]: record["eval_loss"] for record in records if "eval_commitment" in record}
    assert min(losses, key=losses.get) not in with_codes
    best = min(with_codes, key=with_codes.get)
    trained = weights(tmp_path / f"checkpoint-{best}")
    for key, tensor in weights(tmp_path / "final" / "visual_tokenizer").items():
        assert torch.equal(trained[f"tokenizer.{key}"], tensor), key


def test_the_log_goes_to_tensorboard(parts, tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, *stage_two(parts), max_steps=1, report_to="tensorboard", load_best_model_at_end=False)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))
