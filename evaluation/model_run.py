"""Has a model make the predictions that are missing: in this process, in those of accelerate, or as a Ray Data job."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from .output import OutputFolder, pending_batches, run_batches


RECORDS = ("figures.json", "held_out.json", "training.json")  # of a checkpoint, beside `evaluation/`: decide nothing
UNPINNED = ("folder", "texts")  # where a worker writes; texts whose hash is among the settings


def checkpoint_hash(source: str) -> str:
    """What decides a checkpoint's output: a hash of the folder's configurations and weights, or a Hub commit."""
    folder = Path(source)
    if not folder.is_dir():
        from transformers import AutoConfig

        return str(getattr(AutoConfig.from_pretrained(source), "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        name = path.relative_to(folder)
        if name.parts[0] == "evaluation" or str(name) in RECORDS:
            continue
        digest.update(str(name).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def run_model(
    output: str | Path,
    settings: dict,
    items: Sequence[dict],
    worker: Callable,
    unit: str,
    model: str,
    device: str | None,
    batch_size: int,
    ray_workers: int | None = None,
    **options,
) -> list[dict] | None:
    """Completes an output folder.

    Args:
        output: the folder.
        settings: what the predictions depend on, beside the model.
        items: samples with their `key`.
        worker: a class; `worker(model=, device=, **options)` is called with the items of a batch and gives their rows.
        unit: what an item is called.
        model: checkpoint folder or repository.
        device: of the model, or None.
        batch_size: samples at once; always the same ones together.
        ray_workers: run as a Ray Data job of so many workers.
        options: of the worker; all but those of `UNPINNED` are among the settings.

    Returns:
        all rows in the order of their items; None in every process but the main one.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    folder = OutputFolder(output, state.process_index, state.num_processes)
    if state.is_main_process:
        settings = settings | {"model": model, "checkpoint": checkpoint_hash(model), "batch_size": batch_size}
        folder.pin_settings(settings | {name: value for name, value in options.items() if name not in UNPINNED})
    state.wait_for_everyone()
    if ray_workers is not None:
        from .ray_run import run_with_ray

        run_with_ray(folder, items, worker, batch_size, unit, ray_workers, device, {"model": model, **options})
    else:
        if device is None and state.num_processes > 1:
            device = str(state.device)
        done = folder.rows()
        missing = any(
            number % state.num_processes == state.process_index
            for number, _ in pending_batches(items, done, batch_size)
        )
        if missing:
            run_batches(folder, items, worker(model=model, device=device, **options), batch_size, unit)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    return folder.merge([item["key"] for item in items])
