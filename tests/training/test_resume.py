"""A run that was cut goes on where it was; a complete one stays as it is; what cannot be gone on from is named."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from parts import detokenizer_sizes, read_log, sizes, write_parts
from safetensors.torch import load_file, save_file

from modeling_lavit.command_line import main as lavit
from modeling_lavit.training.stage import StageTrainer


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def arguments(parts: Path, output: Path, *overrides: str) -> list[str]:
    """Stage 1, which has weights that move outside of the optimizer: four steps, quantized from the third on."""
    values = "max_steps: 4, save_steps: 1, save_total_limit: 4, logging_steps: 1, warmup_steps: 0, bf16: false"
    return [
        "train",
        "paper_tokenizer",
        f"data={{path: parquet, data_files: {parts / 'rows.parquet'}}}",
        f"encoder={parts / 'lowres'}",
        f"model={sizes()}",
        f"detokenizer={detokenizer_sizes('lowres')}",
        f"training_arguments={{{values}, per_device_train_batch_size: 6, report_to: none}}",
        f"training_arguments.output_dir={output}",
        *overrides,
    ]


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """A run that nobody cut, with all its checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert lavit(arguments(parts, output)) == 0
    return output


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    """The same, cut after its third step."""
    output = tmp_path / "cut"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoint-4")
    return output


def assert_same_result(one: Path, other: Path) -> None:
    expected = load_file(one / "final" / "visual_tokenizer" / "model.safetensors")
    for key, tensor in load_file(other / "final" / "visual_tokenizer" / "model.safetensors").items():
        assert torch.equal(tensor, expected[key]), key
    assert [record["step"] for record in read_log(other)] == [1, 2, 3, 4]
    assert [record["loss"] for record in read_log(other)] == [record["loss"] for record in read_log(one)]
    assert not list(other.glob(".*"))


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uncut_one(parts, whole, tmp_path):
    output = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "modeling_lavit.training.run", *arguments(parts, output)[1:]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (output / "checkpoint-2" / "trainer_state.json").is_file():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (output / "final").is_dir()
    with (output / "log.jsonl").open("a") as log:  # behind the checkpoint, and torn
        log.write('{"step": 3, "loss": 0.0}\n{"step": 3, "lo')
    (output / "checkpoint-3").mkdir(exist_ok=True)  # as if it had been killed while it wrote the next one
    (output / "checkpoint-3" / "trainer_state.json").unlink(missing_ok=True)
    (output / ".final.partial").mkdir()
    (output / ".log.jsonl.partial").write_text("{")
    assert lavit(arguments(parts, output)) == 0
    assert_same_result(whole, output)


def test_a_complete_run_trains_nothing_and_replaces_nothing(parts, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert lavit(arguments(parts, whole)) == 0
    assert f"{whole}/final is complete: nothing is left to train" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert lavit(arguments(parts, whole, "training_arguments.max_steps=5", "objective.keep_rate=0.5")) == 2
    error = capsys.readouterr().err
    assert "is the result of another recipe (different: objective.keep_rate, training_arguments.max_steps)" in error
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_that_was_killed_after_its_last_step_writes_its_result(parts, whole, cut):
    shutil.copytree(whole / "checkpoint-4", cut / "checkpoint-4")
    assert lavit(arguments(parts, cut)) == 0
    assert_same_result(whole, cut)
    records = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    assert sum("train_runtime" in record for record in records) == 1


def damage(folder: Path, name: str, kind: str) -> None:
    """Tears a file of a checkpoint, or puts one of another run in its place."""
    path = folder / name
    if kind == "torn":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "other":
        path.write_bytes(b"not at all")
    elif kind == "list" and path.suffix == ".json":
        path.write_text("[1]")
    elif kind == "list":
        torch.save([1], path)
    elif name == "model.safetensors":
        save_file({"other": torch.zeros(3)}, path)
    elif name == "optimizer.pt":
        torch.save({"state": {0: {"exp_avg": torch.zeros(7, 7, 7)}}, "param_groups": []}, path)
    else:
        torch.save({"something": 1}, path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("optimizer.pt", kind) for kind in ("torn", "other", "list", "foreign")),
        *(("scheduler.pt", kind) for kind in ("torn", "other", "foreign")),
        *(("rng_state.pth", kind) for kind in ("torn", "list", "foreign")),
        *(("model.safetensors", kind) for kind in ("torn", "other", "foreign")),
        *(("trainer_state.json", kind) for kind in ("torn", "other", "list")),
    ],
)
def test_the_last_checkpoint_that_is_whole_is_taken_and_others_are_named(cut, name, kind):
    from modeling_lavit.training.checkpoints import last_whole_checkpoint

    model = Stored(load_file(cut / "checkpoint-3" / "model.safetensors"))
    assert last_whole_checkpoint(cut, model) == cut / "checkpoint-3"
    damage(cut / "checkpoint-3", name, kind)
    assert last_whole_checkpoint(cut, model) == cut / "checkpoint-2"
    for number in (1, 2):
        damage(cut / f"checkpoint-{number}", name, kind)
    with pytest.raises(ValueError) as error:
        last_whole_checkpoint(cut, model)
    message = str(error.value)
    assert message.startswith(f"none of the checkpoints in {cut} is whole (checkpoint-3/{name}")
    assert "\n" not in message


class Stored(torch.nn.Module):
    """A model with the tensors of a file, of which those with gradients have moments in the optimizer."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.tensors = tensors
        self.parameters_ = torch.nn.ParameterList(t for t in tensors.values() if t.is_floating_point())

    def state_dict(self, *args, **kwargs):
        return self.tensors


def test_a_damaged_run_goes_on_and_ends_as_an_uncut_one(parts, whole, cut, capsys):
    damage(cut / "checkpoint-3", "optimizer.pt", "torn")
    (cut / "log.jsonl").write_text((cut / "log.jsonl").read_text() + "no record\n[1]\n{}\n")
    assert lavit(arguments(parts, cut)) == 0
    out = capsys.readouterr().out
    assert f"{cut}/checkpoint-3 is left out: checkpoint-3/optimizer.pt is torn" in out
    assert f"{cut}/log.jsonl: 3 lines that are no records are left out" in out
    assert_same_result(whole, cut)


def test_a_run_of_another_model_is_one_line(parts, cut, capsys):
    assert lavit(arguments(parts, cut, f"model={sizes(hidden_size=48)}")) == 2
    errors = capsys.readouterr().err
    assert "does not have the recipe's size" in errors  # the encoder's
    assert lavit(arguments(parts, cut, f"model={sizes(codebook_size=23)}")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "none of the checkpoints in" in last and "checkpoint-3/model.safetensors is of another model" in last


def test_a_run_that_fails_keeps_its_traceback(parts, tmp_path, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory\nand more")
        return compute_loss(self, *args, **kwargs)

    compute_loss = StageTrainer.compute_loss
    monkeypatch.setattr(StageTrainer, "compute_loss", fail)
    assert lavit(arguments(parts, tmp_path / "run")) == 2
    log = tmp_path / "run" / "error-0.log"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"lavit: error: training failed: RuntimeError: CUDA out of memory (traceback in {log})"
    )
    text = log.read_text()
    assert text.startswith("Traceback") and "in fail" in text and "and more" in text
    assert os.path.isdir(tmp_path / "run" / "checkpoint-2") and not (tmp_path / "run" / "final").exists()
