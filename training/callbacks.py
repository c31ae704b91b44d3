"""What happens beside the steps of a run: epochs, weights that move by themselves, the log."""

import json
import os
from pathlib import Path

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """Tells the data set its epoch: with several ranks the trainer's data loader does not."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class AfterStepCallback(TrainerCallback):
    """Calls the model's `after_step` after every optimizer step, before anything is logged or saved."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        getattr(model, "module", model).after_step()


class NewPhaseCallback(TrainerCallback):
    """Forgets the best checkpoint where a new phase begins, whose losses are not those of the phase before.

    Args:
        start: share of the run.
    """

    def __init__(self, start: float):
        self.start = start

    def on_step_begin(self, args, state, control, **kwargs):
        before, now = ((state.global_step - number) / max(1, state.max_steps) for number in (1, 0))
        if before < self.start <= now:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None


class LogCallback(TrainerCallback):
    """Appends every record to `log.jsonl` in the output folder: the file that a program can follow.

    Own code: `trainer_state.json` has the records too, but only up to the last checkpoint.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes away what a run that was cut logged behind the checkpoint from which it goes on."""
        path = Path(args.output_dir) / "log.jsonl"
        if not state.is_world_process_zero or not path.exists():
            return
        kept, unreadable = [], 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _read_record(line)
            unreadable += record is None
            if record and record["step"] <= state.global_step and "train_runtime" not in record:
                kept.append(json.dumps(record) + "\n")
        if unreadable:
            print(f"{path}: {unreadable} lines that are no records are left out")
        partial = path.with_name(".log.jsonl.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _read_record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
