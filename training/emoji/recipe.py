"""What the recipes of the emoji's stages may hold; defaults are those of the embedded checkpoint."""

from typing import Literal

from pydantic import Field

from modeling_lavit.training.recipe import (
    Arguments,
    Augmentation,
    Checkpoint,
    DetokenizerSizes,
    LanguageModelObjective,
    LanguageModelRecipe,
    NotNegative,
    PixelDecoderObjective,
    PixelDecoderRecipe,
    Recipe,
    Section,
    Share,
    TokenizerObjective,
    TokenizerRecipe,
    VisualTokenizerSizes,
)


# --- what several stages have ----------------------------------------------------------------------------------------


class NamedData(Section):
    """An image folder with names and styles, see [`NamedImages`]."""

    path: str = Field("data/emoji_all", description="Folder that `prepare_images` wrote, or one like it.")
    splits: list[str] = Field(["train"], description="Values of the column `split` that are trained on.")
    repeat: dict[str, int] = Field({}, description="How often images of a category come in an epoch.")
    more: str | None = Field(None, description="Folder of images in further styles, of which only names are learnt.")
    validation: str | None = Field("held_out", description="Value of `split` that is validated on.")


class RedrawnAugmentation(Augmentation):
    """The core's, and changes of how a thing is drawn, see [`redraw`]."""

    redraw: Share = Field(0.0, description="Probability of other colours, flat areas and outlines.")


MORE = "data/emoji_more"
STRONG = RedrawnAugmentation(share=1.0, scale=0.2, shift=0.12, rotation=0.2, tint=0.2, flip=0.5, redraw=0.35)
WEAK = Augmentation(share=0.8, scale=0.05, shift=0.04, rotation=0.03, tint=0.0, flip=0.3)
FOOD_AND_ANIMALS = ("Animals & Nature", "Food & Drink")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 4,
    "stem": "convolutional",
}


class EmojiArguments(Arguments):
    """Small runs."""

    max_steps: int = 1000
    per_device_train_batch_size: int = 128
    adam_beta2: float = 0.98
    logging_steps: float = 50
    save_total_limit: int | None = 1
    dataloader_drop_last: bool | None = True
    seed: int = 0


class EmojiRecipe(Recipe):
    """One thread each, several runs at once."""

    data: NamedData = NamedData()
    threads: int | None = 1


# --- the classifier and the teachers ---------------------------------------------------------------------------------


class ClassifierSizes(Section):
    image_size: int = 48
    strides: list[int] = [2, 2, 2, 2]
    width: int = 1


class ClassifierObjective(Section):
    name: NotNegative = 1.0
    style: NotNegative = 0.5
    corrupted: Share = 0.0


class ClassifierArguments(EmojiArguments):
    output_dir: str = "runs/classifier"
    per_device_train_batch_size: int = 256
    learning_rate: float = 2e-3
    warmup_steps: float = 100
    weight_decay: float = 0.1
    adam_beta2: float = 0.999


class ClassifierRecipe(EmojiRecipe):
    """A convolutional classifier of names and styles: a teacher of stage 0, or what evaluates drawn images."""

    stage: Literal["classifier"] = "classifier"
    model: ClassifierSizes = ClassifierSizes()
    objective: ClassifierObjective = ClassifierObjective()
    augmentation: RedrawnAugmentation = STRONG
    weak_augmentation: Augmentation | None = None
    training_arguments: ClassifierArguments = ClassifierArguments()


# --- stage 0 ---------------------------------------------------------------------------------------------------------


class EncoderWeights(Section):
    name: NotNegative = 1.0
    style: NotNegative = 1.0
    pixel: NotNegative = 4.0
    place: NotNegative = 1.0
    teacher: NotNegative = 2.0
    map: NotNegative = 1.0
    style_teacher: NotNegative = 1.0


class EncoderObjective(Section):
    patch_dropout: Share = 0.5
    dropout_until: Share = 0.5
    weights: EncoderWeights = EncoderWeights()


class EncoderArguments(EmojiArguments):
    output_dir: str = "runs/encoder"
    max_steps: int = 3000
    learning_rate: float = 1.2e-3
    warmup_steps: float = 200
    weight_decay: float = 0.05


class EncoderRecipe(EmojiRecipe):
    """Stage 0: a small encoder, under teachers."""

    stage: Literal["encoder"] = "encoder"
    data: NamedData = NamedData(repeat=dict.fromkeys(FOOD_AND_ANIMALS, 12), more=MORE)
    teacher: str = "runs/teacher/final"
    name_teachers: list[str] = ["runs/wide_teacher/final"]
    style_teacher: str = "runs/style_teacher/final"
    model: VisualTokenizerSizes = VisualTokenizerSizes(**SIZES)
    objective: EncoderObjective = EncoderObjective()
    augmentation: RedrawnAugmentation = STRONG
    weak_augmentation: Augmentation = WEAK
    training_arguments: EncoderArguments = EncoderArguments()


# --- stage 1 ---------------------------------------------------------------------------------------------------------


class TermWeights(Section):
    """Of the further terms of stage 1, see `tokenizer_terms.py`."""

    scale: NotNegative = 0.2
    local: NotNegative = 0.5
    place: NotNegative = 5.0
    saliency: NotNegative = 0.6
    entropy: NotNegative = 0.05
    pixels: NotNegative = 6.0
    name: NotNegative = 0.15
    style: NotNegative = 0.5
    lookup: NotNegative = 0.4


class EmojiTokenizerObjective(TokenizerObjective):
    keep_rate: Share = 0.3333
    keep_start: Share = 0.6
    keep_ramp: Share = 0.2
    rate_weight: NotNegative = 8.0
    commitment_weight: NotNegative = 0.25
    quantize_from: Share | None = 0.25
    codebook_decay: Share = 0.98
    reset_below: NotNegative = 0.2
    saliency_until: NotNegative = 2.0
    weights: TermWeights = TermWeights()


class EmojiTokenizerArguments(EmojiArguments):
    output_dir: str = "runs/tokenizer"
    max_steps: int = 1300
    learning_rate: float = 1.4e-3
    warmup_steps: float = 100
    weight_decay: float = 0.01
    logging_steps: float = 20
    save_steps: float = 200


EMOJI_DETOKENIZER = DetokenizerSizes(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_queries=144,
    codebook_size=4096,
    codebook_dim=16,
    feature_size=128,
    variant="highres",
    prompt_embed_dims=[64, 64],
    pooled_embed_dim=128,
    initializer_range=0.06,
)


class EmojiTokenizerRecipe(EmojiRecipe, TokenizerRecipe):
    """Stage 1: 144 patches, a third of them kept, 4,096 codes."""

    stage: Literal["emoji-tokenizer"] = "emoji-tokenizer"
    data: NamedData = NamedData(repeat=dict.fromkeys(FOOD_AND_ANIMALS, 4))
    encoder: str = "runs/encoder/final"
    model: VisualTokenizerSizes = VisualTokenizerSizes(
        **SIZES,
        merger_num_hidden_layers=2,
        merger_num_attention_heads=4,
        codebook_size=4096,
        codebook_dim=16,
        selection="argmax",
        initializer_range=0.06,
    )
    detokenizer: DetokenizerSizes = EMOJI_DETOKENIZER
    objective: EmojiTokenizerObjective = EmojiTokenizerObjective()
    augmentation: Augmentation = Augmentation(share=0.7, scale=0.1, shift=0.07, rotation=0.1, tint=0.03, flip=0.3)
    training_arguments: EmojiTokenizerArguments = EmojiTokenizerArguments()


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class TextModelSizes(Section):
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    max_position_embeddings: int = 512


class NamedMixture(Section):
    """How often which task of [`NamedSamples`]; relative frequencies. `more`: captions of `data.more`, if
    there is one."""

    caption: NotNegative = 0.10
    more: NotNegative = 0.05
    style_question: NotNegative = 0.12
    name_question: NotNegative = 0.03
    code_caption: NotNegative = 0.0
    code_style_question: NotNegative = 0.0
    draw: NotNegative = 0.57
    restyle: NotNegative = 0.18


class CodeViews(Section):
    """Codes of augmented views of each image."""

    number: int = Field(0, ge=0)
    augmentation: Augmentation = Augmentation(share=1.0, scale=0.06, shift=0.04, rotation=0.05, tint=0.04, flip=0.3)


class PseudoTargets(Section):
    """Images that the start draws of pairs that have none, see `pseudo_targets.py`."""

    number: int = Field(0, ge=0)
    share: Share = 0.0
    source: Literal["image", "name"] = "image"
    guidance_scale: NotNegative = 3.0
    check_style: bool = False


class Mixup(Section):
    """Mixtures of two images, labelled by teachers, see `mixup.py`."""

    number: int = Field(16_000, ge=0)
    share: Share = 0.6
    teachers: list[str] = ["runs/teacher/final", "runs/wide_teacher/final"]


class EmojiLanguageModelObjective(LanguageModelObjective):
    packing: int | None = 256
    code_corruption: Share = 0.08
    feature_dropout: Share = 0.8
    text_weight: NotNegative = 3.0


class EmojiLanguageModelArguments(EmojiArguments):
    output_dir: str = "runs/language_model"
    max_steps: int = 2300
    per_device_train_batch_size: int = 48
    learning_rate: float = 1.6e-3
    warmup_steps: float = 100
    weight_decay: float = 0.05
    logging_steps: float = 20
    save_steps: float = 200


class EmojiLanguageModelRecipe(EmojiRecipe, LanguageModelRecipe):
    """Stage 2: a Llama of 6 layers that reads and draws."""

    stage: Literal["emoji-language-model"] = "emoji-language-model"
    data: NamedData = NamedData(path="data/emoji", more=MORE)
    tokenizer: str | None = "runs/tokenizer/final"
    attn_implementation: str = "eager"
    text_vocab_size: int = Field(1536, ge=300)
    text_model: TextModelSizes = TextModelSizes()
    mixture: NamedMixture = NamedMixture()
    code_views: CodeViews = CodeViews()
    pseudo_targets: PseudoTargets = PseudoTargets()
    mixup: Mixup = Mixup()
    generation_presets: dict[str, dict[str, int | float | bool]] | None = {
        "caption": {"num_beams": 2, "min_new_tokens": 1, "max_new_tokens": 12},
        "answer": {"num_beams": 2, "min_new_tokens": 1, "max_new_tokens": 8},
        "image": {
            "guidance_scale": 1.0,
            "multimodal_guidance_scale": 1.5,
            "min_image_tokens": 8,
            "max_image_tokens": 130,
            "top_k": 50,
            "temperature": 0.4,
        },
    }
    objective: EmojiLanguageModelObjective = EmojiLanguageModelObjective()
    augmentation: RedrawnAugmentation = RedrawnAugmentation(
        share=0.9, scale=0.2, shift=0.12, rotation=0.25, tint=0.25, flip=0.3, redraw=0.5
    )
    weak_augmentation: Augmentation | None = WEAK
    training_arguments: EmojiLanguageModelArguments = EmojiLanguageModelArguments()

    def _parts_are_there(self):
        return self  # a new language model is possible here


# --- stage 3 ---------------------------------------------------------------------------------------------------------


class EmojiPixelDecoderObjective(PixelDecoderObjective):
    condition: Literal["features", "codes"] = "codes"
    train_detokenizer: bool = True
    code_corruption: Share = 0.03
    perceptual_weight: NotNegative = 0.0
    ema_decay: Share = 0.998


class UnetSizes(Section):
    block_out_channels: list[int] = [96, 160]
    attention_head_dim: list[int] = [3, 5]


class EmojiPixelDecoderArguments(EmojiArguments):
    output_dir: str = "runs/pixel_decoder"
    max_steps: int = 1500
    per_device_train_batch_size: int = 32
    learning_rate: float = 7e-4
    warmup_steps: float = 50
    weight_decay: float = 0.01
    logging_steps: float = 20
    save_steps: float = 200


class EmojiPixelDecoderRecipe(EmojiRecipe, PixelDecoderRecipe):
    """Stage 3: a small UNet, first on the encoder's features, then on what the detokenizer makes of the codes."""

    stage: Literal["emoji-pixel-decoder"] = "emoji-pixel-decoder"
    data: NamedData = NamedData(repeat=dict.fromkeys(FOOD_AND_ANIMALS, 20))
    tokenizer: Checkpoint = "runs/tokenizer/final"
    start: Checkpoint | None = None
    encoder: str = "runs/encoder/final"
    model: VisualTokenizerSizes = VisualTokenizerSizes(**SIZES)
    detokenizer: DetokenizerSizes = EMOJI_DETOKENIZER
    unet: UnetSizes = UnetSizes()
    vae_images: int = Field(10_000, ge=1)
    objective: EmojiPixelDecoderObjective = EmojiPixelDecoderObjective()
    augmentation: Augmentation = Augmentation(share=0.35, scale=0.1, shift=0.07, rotation=0.1, tint=0.08, flip=0.3)
    training_arguments: EmojiPixelDecoderArguments = EmojiPixelDecoderArguments()
