"""Runs a stage from its recipe: `python -m modeling_lavit.training.run STAGE recipe.yaml [key=value …]`.

A recipe is a YAML file with `data`, `model` and `training_arguments`; dotted `key=value` pairs override single
entries. Everything that `transformers.TrainingArguments` knows may stand under `training_arguments`. A run that was
cut goes on from its last checkpoint when it is started again.
"""

import argparse
import copy
import gc
import importlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState

from .data import SampleNoise, collate_pictures
from .distributed import alone, gather_metrics
from .sources import stream_loader


STAGES = {
    "encoder": "pretrain_encoder",
    "tokenizer": "train_visual_tokenizer",
    "language-model": "train_language_model",
    "pixel-decoder": "train_pixel_decoder",
    "judge": "train_judge",
}


class EpochCallback(TrainerCallback):
    """Tells the data set its epoch: with several ranks the trainer's data loader does not."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class RecipeLoader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as everyone means it."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class StageTrainer(Trainer):
    """A `Trainer` for models whose forward takes a batch, its [`SampleNoise`] and the `progress` of the run from 0 to
    1, and returns `{"loss": (), "metrics": {name: ()}}`; metrics are averaged into the log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.running_metrics = defaultdict(list)

    def _save(self, output_dir=None, state_dict=None):
        # safetensors refuses tensors that share their memory, as tied embeddings do
        state_dict, seen = dict(state_dict or self.model.state_dict()), set()
        for key, value in state_dict.items():
            if value.data_ptr() in seen:
                state_dict[key] = value.clone()
            seen.add(value.data_ptr())
        super()._save(output_dir, state_dict)

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return stream_loader(self.train_dataset, self.args, self.data_collator)
        return super().get_train_dataloader()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        noise = SampleNoise(inputs.pop("position"), self.state.global_step, self.args.seed)
        outputs = model(**inputs, noise=noise, progress=self.state.global_step / max(1, self.state.max_steps))
        for name, value in outputs["metrics"].items():
            self.running_metrics[name].append(float(value))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= {name: round(sum(v) / len(v), 4) for name, v in gather_metrics(self.running_metrics).items()}
            self.running_metrics.clear()
        super().log(logs, start_time)


class JsonLinesCallback(TrainerCallback):
    """Appends every log record to `log.jsonl` in the output folder."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes away what a cut run logged behind the checkpoint from which it goes on."""
        path = Path(args.output_dir) / "log.jsonl"
        if state.is_world_process_zero and path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def load_recipe(path: str, overrides: list[str]) -> dict:
    """Reads a recipe and applies `a.b=value` overrides (values are YAML). Unknown keys are an error."""
    recipe = yaml.load(Path(path).read_text(), RecipeLoader)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        node = recipe
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                raise ValueError(f"the recipe {path} has no section {parent!r} for the override {override!r}")
            node = node[parent]
        if leaf not in node and parents[:1] not in (["training_arguments"], ["data"]):
            raise ValueError(f"the recipe {path} has no key {key!r}; known here: {sorted(node)}")
        node[leaf] = yaml.load(value, RecipeLoader)
    return recipe


def without_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters take no memory (they are on the meta device), for those that come back from shards."""
    memo = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def last_complete_checkpoint(output_dir: Path) -> str | None:
    """The checkpoint to go on from. The trainer writes its state last, so what a killed run has left without one is
    passed over."""
    complete = []
    for folder in output_dir.glob("checkpoint-*"):
        try:
            complete.append((TrainerState.load_from_json(folder / "trainer_state.json").global_step, str(folder)))
        except (OSError, ValueError):
            print(f"{folder} is incomplete: it was being written when its run ended")
    return max(complete)[1] if complete else None


def run(stage: str, recipe: dict) -> None:
    """Trains one stage to the end and writes its result to `<output_dir>/final`."""
    if "threads" in recipe:
        torch.set_num_threads(recipe["threads"])
    defaults = {"report_to": "none", "remove_unused_columns": False, "use_cpu": not torch.cuda.is_available()}
    arguments = TrainingArguments(**(defaults | recipe["training_arguments"]))
    if arguments.n_gpu > 1:
        raise ValueError(
            f"there are {arguments.n_gpu} GPUs: start one process each (torchrun --nproc_per_node {arguments.n_gpu} "
            f"-m {__package__}.run …), or let CUDA_VISIBLE_DEVICES name one"
        )
    set_seed(arguments.seed)
    module = importlib.import_module(f".{STAGES[stage]}", package=__package__)
    model, dataset, callbacks = module.build(recipe)
    os.makedirs(arguments.output_dir, exist_ok=True)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=getattr(dataset, "collate", collate_pictures),
        callbacks=[JsonLinesCallback(), EpochCallback(dataset), *callbacks],
    )
    frame = None
    if trainer.is_fsdp_enabled:
        if not hasattr(model, "_no_split_modules"):
            raise ValueError(
                f"the stage {stage} updates weights outside of its optimizer: run it by DDP, without FSDP"
            )
        frame = without_parameters(model)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(Path(arguments.output_dir)))
    state = None if frame is None else trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all ranks
    with alone():
        if trainer.is_world_process_zero():
            if frame is None:
                whole = trainer.accelerator.unwrap_model(model).cpu()
            else:
                frame.load_state_dict(state, assign=True)
                whole = frame
            module.finish(whole, dataset, recipe, Path(arguments.output_dir) / "final")
    trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # the wrapped model goes before the process group that it uses
        del trainer, model, dataset, callbacks
        gc.collect()
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="lavit train")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", help="YAML file, see the recipes folder beside this module")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. training_arguments.max_steps=100")
    options = parser.parse_args(arguments)
    run(options.stage, load_recipe(options.recipe, options.overrides))


if __name__ == "__main__":
    main()
