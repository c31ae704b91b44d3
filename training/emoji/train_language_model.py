"""Stage 2 of the embedded checkpoint: the paper's loss, on samples of images with names and styles, and what keeps a
small model from learning few images by heart."""

from copy import copy

import torch
from transformers import LlamaConfig

from modeling_lavit.modeling_lavit import IGNORED_LABEL, LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.slots_lavit import LavitInputs
from modeling_lavit.training.data.augmentation import SampleNoise, normalize_images
from modeling_lavit.training.data.samples import Sequences
from modeling_lavit.training.distributed import process_state
from modeling_lavit.training.emoji.augmentation import augment_strongly
from modeling_lavit.training.emoji.images import NamedImages, load_more, load_named
from modeling_lavit.training.emoji.mixup import label_mixtures
from modeling_lavit.training.emoji.pseudo_targets import draw_pseudo_targets
from modeling_lavit.training.emoji.recipe import EmojiLanguageModelRecipe
from modeling_lavit.training.emoji.samples import NamedSamples, tokenize_all
from modeling_lavit.training.emoji.text import sentences, train_text_tokenizer
from modeling_lavit.training.results import result_of
from modeling_lavit.training.stage import Parts
from modeling_lavit.training.train_language_model import (
    LanguageModelStage,
    LanguageModelTraining,
    assemble_model,
    build_model,
    image_size,
    put_tokenizer,
)


class EmojiLanguageModelTraining(LanguageModelTraining):
    """LaVIT with the loss of stage 2, text weighted up as it is short."""

    def __init__(self, model: LavitForConditionalGeneration, recipe: EmojiLanguageModelRecipe):
        super().__init__(model, recipe)
        self.strong_augmentation = recipe.augmentation
        self.weak_augmentation = recipe.weak_augmentation or recipe.augmentation

    def pixel_values(self, images: torch.Tensor, noise: SampleNoise, weak: torch.Tensor) -> torch.Tensor:
        """Images that are `weak` (P,), which are asked for their style, by their own augmentation."""
        if not self.training:
            return normalize_images(images)
        views = augment_strongly(images, noise, self.strong_augmentation)
        if weak.any():
            views = torch.where(
                weak[:, None, None, None], augment_strongly(images, noise, self.weak_augmentation), views
            )
        return normalize_images(views)

    def read_back(self, input_ids: torch.Tensor, labels: torch.Tensor, noise: SampleNoise) -> torch.Tensor:
        """Replaces a share of the target codes that are read back by random codes: drawing must survive its errors."""
        if not self.training:
            return input_ids
        vocabulary = self.model.config.vocabulary
        uniform = noise.uniform(input_ids.shape[1], 2)
        chosen = (uniform[..., 0] < self.objective.code_corruption) & vocabulary.is_code(labels)
        others = vocabulary.ids_of((uniform[..., 1] * vocabulary.codebook_size).long())
        return torch.where(chosen, others, input_ids)

    def read_features(
        self, inputs: LavitInputs, noise: SampleNoise
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Takes a random share of the features, up to `feature_dropout`, from the images that a sample reads: of few
        images a language model learns by heart what it should read."""
        if not self.training or not self.objective.feature_dropout:
            return super().read_features(inputs, noise)
        # the first decides the share, each other one features of the sample
        uniform = noise.uniform(1 + self.model.config.visual_config.num_patches)
        number = (inputs.is_feature.cumsum(1) - 1).clamp_min(0) % (uniform.shape[1] - 1)
        dropped = uniform[:, 1:].gather(1, number) < uniform[:, :1] * self.objective.feature_dropout
        kept = inputs.attention_mask.bool() & ~(inputs.is_feature & dropped)
        order = (~kept).long().argsort(dim=1, stable=True)
        mask = kept.gather(1, order)
        labels = inputs.labels.gather(1, order).masked_fill(~mask, IGNORED_LABEL)
        embeds = inputs.inputs_embeds.gather(1, order[..., None].expand_as(inputs.inputs_embeds))
        return embeds, mask.long(), labels

    def weights(self, is_text: torch.Tensor) -> torch.Tensor:
        return torch.where(is_text, self.objective.text_weight, 1.0)


def new_model(
    recipe: EmojiLanguageModelRecipe, images: NamedImages
) -> tuple[LavitForConditionalGeneration, LavitProcessor]:
    """A LaVIT whose language model is new, and whose text tokenizer is trained on the sentences of the tasks."""
    folder = result_of("tokenizer", recipe.tokenizer, "visual_tokenizer")
    visual_tokenizer = LavitVisualTokenizer.from_pretrained(folder, dtype=torch.float32)
    text_config = LlamaConfig(**recipe.text_model.model_dump(), vocab_size=1)
    texts, max_length = sentences(images.names, images.styles), text_config.max_position_embeddings
    text_tokenizer = train_text_tokenizer(texts, recipe.text_vocab_size, max_length)
    model, processor = assemble_model(text_config, text_tokenizer, visual_tokenizer, recipe)
    put_tokenizer(model, visual_tokenizer)
    model.model.visual_tokenizer.eval()  # it is frozen, its statistics too
    model.generation_config.generation_presets = recipe.generation_presets
    return model, processor


class EmojiLanguageModelStage(LanguageModelStage):
    """Stage 2 on images with names and styles."""

    recipe_class = EmojiLanguageModelRecipe

    def build(self, recipe: EmojiLanguageModelRecipe) -> Parts:
        images, held_out = load_named(recipe.data, image_size(recipe))
        model, processor = build_model(recipe) if recipe.start else new_model(recipe, images)
        training = EmojiLanguageModelTraining(model, recipe)
        return Parts(training, *self.samples(recipe, images, held_out, model, processor))

    def samples(
        self,
        recipe: EmojiLanguageModelRecipe,
        images: NamedImages,
        held_out: NamedImages | None,
        model: LavitForConditionalGeneration,
        processor: LavitProcessor,
    ) -> tuple[NamedSamples, NamedSamples | None]:
        """What is trained on, and what is validated on.

        Raises:
            ValueError: pseudo-targets are asked for, but there is no model that can draw.
        """
        seed, device = recipe.training_arguments.seed, process_state().device
        sequences = Sequences(processor, model.config.vocabulary, recipe.objective.prompt_dropout)
        if recipe.pseudo_targets.number and not recipe.start:
            raise ValueError("pseudo_targets.number needs a start, a model that can draw and read")
        model.to(device)
        tokenizer = model.model.visual_tokenizer
        codes = tokenize_all(tokenizer, images, recipe.code_views, seed)
        validation = None
        if held_out is not None:
            validation = NamedSamples(held_out, tokenize_all(tokenizer, held_out), sequences, recipe.mixture, seed)
        targets, mixtures, readable, more = [], None, copy(images), None
        if recipe.data.more:
            readable.append(load_more(recipe.data, image_size(recipe)))
            more = readable.of_no_style()
        if recipe.pseudo_targets.number:
            targets = draw_pseudo_targets(model, processor, images, codes, recipe.pseudo_targets, seed)
        model.to("cpu")
        if recipe.mixup.number:
            mixtures = label_mixtures(readable, recipe.mixup.teachers, recipe.mixup.number, seed, device)
        extra = targets, recipe.pseudo_targets.share, mixtures, recipe.mixup.share, more
        return NamedSamples(images, codes, sequences, recipe.mixture, seed, *extra), validation
