"""What a stage of training is, and the trainer that runs it."""

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from modeling_lavit.training.data.augmentation import SampleNoise
from modeling_lavit.training.data.datasets import collate_images, stream_loader
from modeling_lavit.training.distributed import gather_dicts
from modeling_lavit.training.recipe import Recipe


class TrainingModel(nn.Module, ABC):
    """What a stage trains: models, and the stage's loss on them.

    `_no_split_modules` names the classes of modules that FSDP shards one by one; None where a stage updates weights
    outside of its optimizer and cannot be sharded.
    """

    _no_split_modules: list[str] | None = None

    @abstractmethod
    def forward(self, *, noise: SampleNoise, progress: float, **batch) -> dict:
        """
        Args:
            noise: random numbers of the batch.
            progress: share of the run that is over, 0 to 1.
            batch: what the data set's `collate` makes, without `position`.

        Returns:
            `loss` () and `metrics` {name: values of any shape}, of which the mean is reported.
        """

    def after_step(self) -> None:
        """Called after every optimizer step, for weights that move by other rules than gradients."""


@dataclass
class Parts:
    """What a recipe is built to.

    Args:
        model: what is trained.
        dataset, validation: map-style or iterable; a batch is made by their `collate` if they have one.
    """

    model: TrainingModel
    dataset: torch.utils.data.Dataset
    validation: torch.utils.data.Dataset | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)


class Stage(ABC):
    """A stage: what its recipe holds, how it is built, and what its result is."""

    recipe_class: ClassVar[type[Recipe]]

    @abstractmethod
    def build(self, recipe: Recipe) -> Parts:
        """
        Raises:
            ValueError: parts do not fit each other.
            OSError: something that the recipe names is not there.
        """

    @abstractmethod
    def finish(self, model: TrainingModel, parts: Parts, recipe: Recipe, output: Path) -> None:
        """Writes the result of a trained model, in eval mode on the CPU, into a new folder."""


class Means:
    """Means of values under names, over batches and ranks."""

    def __init__(self):
        self.sums, self.counts = defaultdict(float), defaultdict(int)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, values in metrics.items():
            values = values.detach().double()
            self.sums[name] += float(values.sum())
            self.counts[name] += values.numel()

    def take(self) -> dict[str, float]:
        """The means, names without a value left out; it starts again."""
        sums, counts = gather_dicts(dict(self.sums)), gather_dicts(dict(self.counts))
        self.sums.clear()
        self.counts.clear()
        names = dict.fromkeys(name for part in sums for name in part)
        total = {name: sum(part.get(name, 0) for part in counts) for name in names}
        return {name: sum(part.get(name, 0.0) for part in sums) / total[name] for name in names if total[name]}


class StageTrainer(Trainer):
    """A `Trainer` of [`TrainingModel`]s: gives each batch its noise and the progress of the run, and reports the
    model's metrics, in training and in evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.means = {True: Means(), False: Means()}  # by whether the model is trained

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            batch_size = self.args.train_batch_size
            return stream_loader(self.train_dataset, self.args, batch_size, collate_of(self.train_dataset))
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """Of every row: a last batch that training leaves out is evaluated too."""
        if isinstance(self.eval_dataset, torch.utils.data.IterableDataset):
            batch_size = self.args.eval_batch_size
            return stream_loader(self.eval_dataset, self.args, batch_size, collate_of(self.eval_dataset))
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        step = self.state.global_step
        noise = SampleNoise(inputs.pop("position"), step if model.training else 0, self.args.seed)
        outputs = model(**inputs, noise=noise, progress=step / max(1, self.state.max_steps))
        self.means[model.training].add(outputs["metrics"])
        return (outputs["loss"], {"loss": outputs["loss"]}) if return_outputs else outputs["loss"]

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.means[True].take()
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = {f"{metric_key_prefix}_{name}": value for name, value in self.means[False].take().items()}
        output.metrics.update(figures)
        return output


def collate_of(dataset):
    """What makes batches of a data set's items."""
    return getattr(dataset, "collate", collate_images)
