"""The classifier that evaluates drawn images, trained on all of them, held-out ones included; and the teachers of
stage 0, classifiers like it that never see held-out images."""

from pathlib import Path

import torch
import torch.nn.functional as F

from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.training.data.augmentation import SampleNoise
from modeling_lavit.training.emoji.augmentation import augment_halves
from modeling_lavit.training.emoji.images import load_more, load_named
from modeling_lavit.training.emoji.recipe import ClassifierRecipe
from modeling_lavit.training.stage import Parts, Stage, TrainingModel


class ClassifierTraining(TrainingModel):
    """The classifier on augmented images, some of them blurred and noisy (`corrupted`), so that it looks at what is
    shown and not at its texture. Styles are learnt from images that are augmented weakly, see [`augment_halves`]."""

    def __init__(self, classifier: Classifier, recipe: ClassifierRecipe):
        super().__init__()
        self.classifier, self.objective = classifier, recipe.objective
        self.augmentations = recipe.augmentation, recipe.weak_augmentation

    def corrupt(self, images: torch.Tensor, noise: SampleNoise) -> torch.Tensor:
        """Blurs a share of images (B, 3, S, S), and adds noise to a share of them."""
        side = images.shape[-1]
        small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
        blurred = F.interpolate(small, size=side, mode="bilinear")
        uniform = noise.uniform(4, 1, 1, 1)
        share = uniform[:, 0] * (uniform[:, 1] < self.objective.corrupted)
        images = images + share * (blurred - images)
        amount = 0.1 * uniform[:, 2] * (uniform[:, 3] < self.objective.corrupted)
        return images + amount * noise.normal(*images.shape[1:])

    def forward(self, images, name, style, noise: SampleNoise, progress: float) -> dict:
        images = images.float() / 255
        weak = torch.ones_like(name, dtype=torch.bool)
        if self.training:
            images, weak = augment_halves(images, noise, *self.augmentations)
            if self.objective.corrupted:
                images = self.corrupt(images, noise)
        weak = weak & (style >= 0)
        name_logits, style_logits = self.classifier(images)
        style_loss = F.cross_entropy(style_logits.float(), style, label_smoothing=0.1, reduction="none")
        loss = self.objective.name * F.cross_entropy(name_logits.float(), name, label_smoothing=0.1)
        loss = loss + self.objective.style * (weak * style_loss).sum() / weak.sum().clamp_min(1)
        metrics = {
            "name_top1": (name_logits.argmax(-1) == name).float(),
            "style_top1": (style_logits.argmax(-1) == style)[weak].float(),
        }
        return {"loss": loss, "metrics": metrics}


class ClassifierStage(Stage):
    """A classifier of names and styles."""

    recipe_class = ClassifierRecipe

    def build(self, recipe: ClassifierRecipe) -> Parts:
        dataset, validation = load_named(recipe.data, recipe.model.image_size)
        if more := load_more(recipe.data, recipe.model.image_size):
            dataset.append(more)
        classifier = Classifier(dataset.names, dataset.styles, **recipe.model.model_dump())
        return Parts(ClassifierTraining(classifier, recipe), dataset, validation)

    def finish(self, model: ClassifierTraining, parts: Parts, recipe: ClassifierRecipe, output: Path) -> None:
        """Writes the classifier."""
        model.classifier.save(output)
