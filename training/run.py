"""Runs a stage of training from its recipe: `lavit train [STAGE] RECIPE [KEY=VALUE …]`.

A recipe is a YAML file, or the name of one that is shipped (`finetune`); dotted `key=value` pairs override single
entries. An interrupted run resumes from its last checkpoint when it is started again.
"""

import argparse
import copy
import gc
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
import yaml
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from modeling_lavit.command_line.common import Parser
from modeling_lavit.publishing.card import README, write_model_card
from modeling_lavit.training.callbacks import AfterStepCallback, EpochCallback, LogCallback
from modeling_lavit.training.checkpoints import last_whole_checkpoint
from modeling_lavit.training.recipe import Recipe
from modeling_lavit.training.recipe_file import parse_yaml, read_values, validate
from modeling_lavit.training.record import write_record
from modeling_lavit.training.stage import Parts, Stage, StageTrainer, collate_of
from modeling_lavit.training.train_language_model import LanguageModelStage
from modeling_lavit.training.train_pixel_decoder import PixelDecoderStage
from modeling_lavit.training.train_visual_tokenizer import TokenizerStage


STAGES = {
    "tokenizer": TokenizerStage(),
    "language-model": LanguageModelStage(),
    "pixel-decoder": PixelDecoderStage(),
}
RECIPES = Path(__file__).parent / "recipes"


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """
    Raises:
        ValueError: they contradict each other, or the machine.
    """
    given = recipe.training_arguments
    values = {"use_cpu": not torch.cuda.is_available()}
    values |= {k: v for k, v in given.model_dump().items() if v is not None or k in given.model_fields_set}
    if recipe.data.validation is not None:
        values["eval_strategy"] = values.get("eval_strategy") or "steps"
        if values["eval_strategy"] == "steps":
            values["eval_steps"] = values.get("eval_steps") or values["save_steps"]
    if "activation_checkpointing" in type(given).model_fields and "gradient_checkpointing" in values:
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")  # its name from transformers 5.24 on
    values |= {"remove_unused_columns": False, "label_names": ["position"]}
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"training_arguments: {error}") from error
    if "tensorboard" in arguments.report_to and not is_tensorboard_available():
        raise ValueError(
            "training_arguments.report_to: tensorboard is not installed (pip install tensorboard, or none)"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"there are {arguments.n_gpu} GPUs: start one process each (torchrun --nproc_per_node {arguments.n_gpu} "
            f"-m {__package__}.run …), or let CUDA_VISIBLE_DEVICES name one"
        )
    return arguments


def is_complete(output_dir: Path, recipe: Recipe) -> bool:
    """Whether the run of a recipe has its result.

    Raises:
        ValueError: the result is that of another recipe.
    """
    if not (output_dir / "final").is_dir():
        return False
    path = output_dir / "recipe.yaml"
    before = parse_yaml(path.read_bytes(), str(path)) if path.is_file() else None
    if not isinstance(before, dict):
        raise ValueError(f"{output_dir}/final is there, but not the recipe it was trained by, {path}: remove it first")
    different = set(_different_keys(before, written(recipe))) - {"training_arguments.output_dir"}
    if different:
        raise ValueError(
            f"{output_dir}/final is the result of another recipe (different: {', '.join(sorted(different))}): name "
            "another training_arguments.output_dir, or remove it"
        )
    return True


def written(recipe: Recipe) -> dict:
    """A recipe as `recipe.yaml` in its output folder holds it; one can train by that again."""
    return {"stage": recipe.stage} | recipe.model_dump(mode="json", exclude_unset=True)


def _different_keys(one: dict, other: dict, prefix: str = "") -> list[str]:
    keys = []
    for key in {**one, **other}:
        values = one.get(key), other.get(key)
        if values[0] != values[1] and all(isinstance(value, dict | None) for value in values):
            keys += _different_keys(values[0] or {}, values[1] or {}, f"{prefix}{key}.")
        elif values[0] != values[1]:
            keys.append(f"{prefix}{key}")
    return keys


def run(stage: Stage, recipe: Recipe, arguments: TrainingArguments) -> None:
    """Trains one stage to the end and writes its result to `<output_dir>/final`, unless it is there.

    Args:
        arguments: of [`training_arguments`].

    Raises:
        ValueError: the recipe's parts do not fit each other, or training failed: then the message names a file with
            the traceback.
        OSError: something that the recipe names is not there.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    output_dir = Path(arguments.output_dir)
    if is_complete(output_dir, recipe):
        print(f"{output_dir}/final is complete: nothing is left to train")
        return
    set_seed(arguments.seed)
    parts = stage.build(recipe)
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(parts, recipe, arguments)
    checkpoint = last_whole_checkpoint(output_dir, parts.model, trainer.is_fsdp_enabled)
    trainer.accelerator.wait_for_everyone()
    try:
        if trainer.is_world_process_zero():
            (output_dir / "recipe.yaml").write_text(yaml.safe_dump(written(recipe), sort_keys=False), encoding="utf-8")
        whole = train(trainer, None if checkpoint is None else str(checkpoint))
        if trainer.is_world_process_zero():
            write_result(stage, whole, trainer, parts, recipe, output_dir)
        trainer.accelerator.wait_for_everyone()
    except Exception as error:
        for callback in trainer.callback_handler.callbacks:
            if bar := getattr(callback, "training_bar", None):
                bar.close()  # or it is shown again, after the error
        path = output_dir / f"error-{arguments.process_index}.log"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ValueError(f"training failed: {type(error).__name__}: {reason} (traceback in {path})") from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # the wrapped model goes before the process group that it uses
        del trainer, parts, whole
        gc.collect()
        torch.distributed.destroy_process_group()


def make_trainer(parts: Parts, recipe: Recipe, arguments: TrainingArguments) -> StageTrainer:
    """
    Raises:
        ValueError: the stage cannot be sharded, but is asked to.
    """
    callbacks = [LogCallback(), EpochCallback(parts.dataset), AfterStepCallback(), *parts.callbacks]
    if recipe.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    trainer = StageTrainer(
        model=parts.model,
        args=arguments,
        train_dataset=parts.dataset,
        eval_dataset=parts.validation,
        data_collator=collate_of(parts.dataset),
        callbacks=callbacks,
    )
    if trainer.is_fsdp_enabled and parts.model._no_split_modules is None:
        raise ValueError(
            f"the stage {recipe.stage} updates weights outside of its optimizer: run it by DDP, without FSDP"
        )
    return trainer


def train(trainer: StageTrainer, checkpoint: str | None) -> torch.nn.Module | None:
    """Trains to the end, evaluates, and returns the whole model on rank 0, in eval mode on the CPU."""
    model = trainer.model
    frame = without_parameters(model) if trainer.is_fsdp_enabled else None
    trainer.train(resume_from_checkpoint=checkpoint)
    last = trainer.state.global_step
    evaluated = any("eval_loss" in record and record["step"] == last for record in trainer.state.log_history)
    if trainer.eval_dataset is not None and not evaluated:
        trainer.evaluate()
    if frame is None:
        return trainer.accelerator.unwrap_model(model).cpu().eval()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all ranks
    if not trainer.is_world_process_zero():
        return None
    frame.load_state_dict(state, assign=True)
    return frame.eval()


def without_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters take no memory (they are on the meta device), for those that come back from shards."""
    memo = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def write_result(stage: Stage, model, trainer: StageTrainer, parts: Parts, recipe: Recipe, output_dir: Path) -> None:
    """Puts the result in place when it is whole."""
    partial = output_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    stage.finish(model, parts, recipe, partial)
    for folder in filter(Path.is_dir, (partial, partial / "adapter")):
        write_record(trainer, recipe, folder)
        if (folder / README).is_file():
            write_model_card(folder)
    os.replace(partial, output_dir / "final")
    print(f"{output_dir}/final is complete")


def find_recipe(name: str, folders: list[Path]) -> Path:
    """The file of a recipe: that of the name among shipped ones, or the file itself.

    Raises:
        OSError: there is none.
    """
    shipped = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise OSError(f"there is no recipe {name}: give a YAML file, or one of {', '.join(shipped)}")
    return path


def main(
    arguments: list[str] | None = None,
    stages: dict[str, Stage] = STAGES,
    recipe_folders: tuple[Path, ...] = (RECIPES,),
) -> None:
    """`lavit train`; `stages` and `recipe_folders` are those that can be named."""
    parser = Parser(prog="lavit train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "lavit train [STAGE] RECIPE [KEY=VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="e.g. training_arguments.max_steps=100")
    shipped = sorted(path.stem for folder in recipe_folders for path in folder.glob("*.yaml"))
    parser.epilog = f"recipes: {', '.join(shipped)}\nstages: {', '.join(stages)} (a recipe says its own as `stage`)"
    options = parser.parse_args(arguments)
    name, overrides, stage = options.recipe, options.overrides, None
    if name in stages and overrides and "=" not in overrides[0]:
        stage, name, *overrides = name, *overrides
    path = find_recipe(name, recipe_folders)
    values = read_values(path, overrides)
    own = values.setdefault("stage", stage)
    if own not in ([stage] if stage else list(stages)):
        raise ValueError(f"{path}: stage: expected {stage or 'one of ' + ', '.join(stages)}, got {own!r}")
    recipe = validate(path, values, stages[own].recipe_class)
    try:
        settings = training_arguments(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    run(stages[own], recipe, settings)


if __name__ == "__main__":
    from modeling_lavit.command_line.main import main as lavit

    sys.exit(lavit(["train", *sys.argv[1:]]))
