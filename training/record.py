"""What a run of training says of itself: `training.json` and `losses.png` in its result, which a model card shows."""

import importlib.metadata
import json
import platform
from pathlib import Path

import torch
from transformers import Trainer

from modeling_lavit.saving_lavit import is_on_hub
from modeling_lavit.training.recipe import Recipe


PACKAGES = ("lavit-hf", "torch", "transformers", "diffusers", "accelerate")


def write_record(trainer: Trainer, recipe: Recipe, output: Path) -> None:
    """Writes the record of a run that is over into the folder of its result."""
    history = trainer.state.log_history
    (output / "training.json").write_text(json.dumps(_record(trainer, recipe), indent=2) + "\n", encoding="utf-8")
    curves = {name: _curve(history, name) for name in ("loss", "eval_loss")}
    if any(curves.values()):
        _plot(curves, output / "losses.png")


def _record(trainer: Trainer, recipe: Recipe) -> dict:
    state, arguments = trainer.state, trainer.args
    record = {
        "stage": recipe.stage,
        "steps": state.global_step,
        "batch size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning rate": arguments.learning_rate,
        "seed": arguments.seed,
        "precision": "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32",
        "hardware": f"{arguments.world_size} × {_device(arguments.device)}",
    }
    for key, name in (("loss", "loss"), ("eval_loss", "validation loss")):
        curve = _curve(state.log_history, key)
        if curve:
            record[name] = f"{curve[-1][1]:.4g} at step {curve[-1][0]} ({curve[0][1]:.4g} at step {curve[0][0]})"
    if arguments.load_best_model_at_end and state.best_global_step is not None:
        record["result"] = f"of step {state.best_global_step}, the best by {arguments.metric_for_best_model}"
    record["versions"] = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    if is_on_hub(recipe.data.path):
        record["datasets"] = [recipe.data.path]
    start = getattr(recipe, "start", None)
    if start and is_on_hub(str(start)):
        record["base_model"] = str(start)
    return record


def _curve(history: list[dict], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in history if name in record]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else device.type


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, curve in curves.items():
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o" if len(curve) < 30 else None, label=name)
    axes.legend()
    figure.savefig(path)
