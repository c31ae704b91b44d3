"""Which checkpoint of a run that was cut is whole."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals


class Damaged(ValueError):
    """A checkpoint that cannot be gone on from; the message says which file and why."""


def last_whole_checkpoint(output_dir: Path, model: nn.Module, sharded: bool = False) -> Path | None:
    """The checkpoint to go on from, None for a new run. Those that are left out are named on the terminal.

    Args:
        model: that is trained, whose tensors the checkpoint must have.
        sharded: by FSDP, whose files are not looked into.

    Raises:
        ValueError: there are complete checkpoints, but all are damaged or of another model.
    """
    damaged = []
    folders = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        if not (folder / "trainer_state.json").exists():  # it is written last
            print(f"{folder} is left out: it was being written when its run ended")
            continue
        try:
            check_checkpoint(folder, model, sharded)
        except Damaged as error:
            damaged.append(str(error))
            print(f"{folder} is left out: {error}")
        else:
            return folder
    if damaged:
        raise ValueError(
            f"none of the checkpoints in {output_dir} is whole ({'; '.join(damaged)}): remove them to start again, or "
            "name another output_dir"
        )
    return None


def check_checkpoint(folder: Path, model: nn.Module, sharded: bool) -> None:
    """
    Raises:
        Damaged: a file of the checkpoint is torn, or of another run.
    """
    try:
        steps = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder.name}/trainer_state.json cannot be read ({_first_line(error)})") from error
    if not isinstance(steps, int):
        raise Damaged(f"{folder.name}/trainer_state.json says no step")
    scheduler = load_tensors(folder / "scheduler.pt")
    if not isinstance(scheduler, dict) or "last_epoch" not in scheduler:
        raise Damaged(f"{folder.name}/scheduler.pt is no state of a scheduler")
    for path in sorted(folder.glob("rng_state*.pth")):
        state = load_tensors(path)
        if not isinstance(state, dict) or not {"python", "numpy", "cpu"} <= state.keys():
            raise Damaged(f"{folder.name}/{path.name} is no state of random numbers")
    if not sharded:
        check_weights(folder / "model.safetensors", model)
        check_optimizer(folder / "optimizer.pt", model)


def check_weights(path: Path, model: nn.Module) -> None:
    """
    Raises:
        Damaged: the file is torn, or has not the tensors of the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path.parent.name}/{path.name} is torn ({_first_line(error)})") from error
    if shapes != {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}:
        raise Damaged(f"{path.parent.name}/{path.name} is of another model")


def check_optimizer(path: Path, model: nn.Module) -> None:
    """
    Raises:
        Damaged: the file is torn, or its moments are not those of the model's parameters.
    """
    optimizer = load_tensors(path)
    moments = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(moments, dict) or not isinstance(optimizer.get("param_groups"), list):
        raise Damaged(f"{path.parent.name}/{path.name} is no state of an optimizer")
    known = {tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad}
    count = sum(parameter.requires_grad for parameter in model.parameters())
    found = [
        tuple(tensor.shape)
        for state in moments.values()
        for name, tensor in state.items()
        if name == "exp_avg" and isinstance(tensor, torch.Tensor)
    ]
    if not set(found) <= known or len(found) > count:
        raise Damaged(f"{path.parent.name}/{path.name} is of another model")


def load_tensors(path: Path):
    """A file of torch, without running what it may hold.

    Raises:
        Damaged: it is torn, or holds more than tensors and numbers.
    """
    try:
        with safe_globals():  # numpy's random state
            return torch.load(path, map_location="cpu", weights_only=True, mmap=path.stat().st_size > 2**20)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise Damaged(f"{path.parent.name}/{path.name} is torn ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
