"""Stage 1 of the embedded checkpoint: the paper's loss and the terms that a small data set needs."""

from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.training.emoji.images import NamedImages, load_named
from modeling_lavit.training.emoji.pretrain_encoder import load_pretrained
from modeling_lavit.training.emoji.recipe import EmojiTokenizerRecipe
from modeling_lavit.training.emoji.tokenizer_terms import (
    RECORDED_ATTENTION,
    DecisiveSelector,
    FeatureScale,
    FrozenHeads,
    LocalCodes,
    Lookup,
    ramped,
)
from modeling_lavit.training.stage import Parts
from modeling_lavit.training.train_visual_tokenizer import (
    LossTerm,
    TokenizerStage,
    VisualTokenizerTraining,
    new_parts,
)


class EmojiTokenizerTraining(VisualTokenizerTraining):
    """Stage 1 that begins with more patches."""

    def keep_rate(self, progress: float) -> float:
        """Linear from `keep_start` to `keep_rate` over `keep_ramp` of the run."""
        start = self.objective.keep_start
        return start + ramped(progress, self.objective.keep_ramp) * (self.objective.keep_rate - start)


def loss_terms(
    recipe: EmojiTokenizerRecipe, tokenizer: LavitVisualTokenizer, detokenizer: LavitDetokenizer, data: NamedImages
) -> list[LossTerm]:
    """The further terms of the loss, and the encoder's weights, which come with the heads."""
    weights, config = recipe.objective.weights.model_dump(), tokenizer.config

    def of(*names: str) -> dict[str, float]:
        return {name: weights[name] for name in names}

    heads, known = load_pretrained(recipe.encoder, tokenizer, data.styles)
    return [
        FeatureScale(of("scale")),
        LocalCodes(of("local", "place"), config),
        DecisiveSelector(of("saliency", "entropy"), config.patch_size, recipe.objective.saliency_until),
        FrozenHeads(of("pixels", "name", "style"), heads, known, data.names, config.patch_size),
        Lookup(of("lookup"), detokenizer, config.image_size // config.patch_size),
    ]


class EmojiTokenizerStage(TokenizerStage):
    """Stage 1 on images with names and styles."""

    recipe_class = EmojiTokenizerRecipe

    def build(self, recipe: EmojiTokenizerRecipe) -> Parts:
        tokenizer, detokenizer = new_parts(recipe, RECORDED_ATTENTION)
        dataset, validation = load_named(recipe.data, tokenizer.config.image_size)
        terms = loss_terms(recipe, tokenizer, detokenizer, dataset)
        model = EmojiTokenizerTraining(tokenizer, detokenizer, recipe, terms)
        return self.parts(model, recipe, dataset, validation)
