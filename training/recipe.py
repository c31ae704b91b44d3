"""What the recipes of the three stages may hold: one pydantic model a stage, every field with default, unit, source.

A recipe file says what differs from these defaults. The tables of the documentation are made from the descriptions
below (`docs/recipe_fields.py`).
"""

import dataclasses
import inspect
from typing import Annotated, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator
from transformers import PreTrainedConfig, TrainingArguments

from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.configuration_lavit import LavitDetokenizerConfig, LavitVisualTokenizerConfig


Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
# A checkpoint; `lavit-emoji` is the embedded one, wherever the package is.
Checkpoint = Annotated[str, AfterValidator(lambda name: str(LAVIT_EMOJI) if name == LAVIT_EMOJI.name else name)]


class Section(BaseModel):
    """A part of a recipe: unknown keys, values of another type, and infinite numbers are errors. Of a section that is
    given in part the rest stays as it is by default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values):
        if not isinstance(values, dict):
            return values
        sections = {name: field.default for name, field in cls.model_fields.items() if name in values}
        return values | {
            name: _completed(default, values[name])
            for name, default in sections.items()
            if isinstance(default, Section) and isinstance(values[name], dict)
        }


def _completed(default: Section, values: dict) -> dict:
    """What a section is given, and what its default has besides."""
    completed = {name: getattr(default, name) for name in default.model_fields_set} | values
    for name in default.model_fields_set & values.keys():
        if isinstance(getattr(default, name), Section) and isinstance(values[name], dict):
            completed[name] = _completed(getattr(default, name), values[name])
    return completed


# --- data ------------------------------------------------------------------------------------------------------------


class Source(Section):
    """Rows with images, texts, codes or conversations, from anything that `datasets` reads."""

    path: str = Field(
        description="Folder with `metadata.jsonl`, builder of `datasets` (`parquet`, `json`, `webdataset`, …), or "
        "repository on the Hub."
    )
    data_files: str | list[str] | None = Field(
        None, description="Files, patterns or URLs, if `path` is a builder or has more than you want."
    )
    split: str = Field("train", description="Split of the source; slices such as `train[:90%]` are allowed.")
    image_column: str | None = Field(None, description="Default: the first of `image`, `jpg`, `jpeg`, `png`, `webp`.")
    text_column: str | None = Field(
        None,
        description="Default: the first of `text`, `caption`, `txt`. From a list of texts one is drawn each epoch.",
    )
    codes_column: str | None = Field(None, description="Visual codes, as `lavit tokenize --dataset` writes them.")
    question_column: str | None = Field(None, description="Questions; together with `answer_column`.")
    answer_column: str | None = Field(None, description="Answers; together with `question_column`.")
    messages_column: str | None = Field(None, description="Conversations: lists of `role` and `content`.")
    streaming: bool = Field(False, description="Rows are read as needed, without end: set `max_steps`.")
    shuffle_buffer: int = Field(
        0, ge=0, description="Rows of a stream held in memory; the next one is drawn from them."
    )
    num_proc: int | None = Field(
        None, ge=1, description="Processes that look for broken images (of sources that are not streamed)."
    )
    allow_local_paths: bool = Field(
        False, description="Also read images whose paths, in the rows, lie outside the folder of the data."
    )


def _share_or_split(value: float | str | None) -> float | str | None:
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError("a share must lie between 0 and 1")
    return value


class Data(Source):
    """What a stage is trained on, and validated on."""

    validation: Annotated[float | str | None, AfterValidator(_share_or_split)] = Field(
        None,
        description="Split, or share of the rows (not of a stream), not trained on; evaluated every `eval_steps`.",
    )


class Augmentation(Section):
    """Random changes of images before they are encoded; none by default, as in the paper."""

    share: Share = Field(0.0, description="Probability that an image is changed at all.")
    scale: NotNegative = Field(0.15, description="Largest relative zoom.")
    shift: NotNegative = Field(0.1, description="Largest shift, share of the side.")
    rotation: NotNegative = Field(0.15, description="Largest angle, radians.")
    tint: NotNegative = Field(0.1, description="Largest relative change of each colour's strength.")
    flip: Share = Field(0.3, description="Probability of a mirror image.")


# --- how it is trained -----------------------------------------------------------------------------------------------


Known = create_model(
    "Known",
    __base__=Section,
    **{
        field.name: (get_type_hints(TrainingArguments)[field.name] | None, None)
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    },
)


class Arguments(Known):
    """Arguments of `transformers.TrainingArguments`; those below have defaults of their own, all others may stand here
    too."""

    output_dir: str = Field(description="Folder for checkpoints, logs and the result, `final`.")
    max_steps: int = Field(-1, description="Optimizer steps; -1: `num_train_epochs` decides.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data, where `max_steps` is -1.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Samples per device and forward.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forwards for each optimizer step.")
    learning_rate: float = Field(1e-4, ge=0, description="Largest learning rate of AdamW.")
    lr_scheduler_type: str = Field("cosine", description="Schedule of the learning rate after the warm-up.")
    warmup_steps: float = Field(0, ge=0, description="Steps in which the learning rate rises; below 1: share of all.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="Of AdamW.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Norm to which gradients are clipped; 0: never.")
    bf16: bool = Field(True, description="Compute in bfloat16; weights and optimizer stay in float32.")
    gradient_checkpointing: bool | None = Field(None, description="Recompute activations instead of keeping them.")
    fsdp: bool | str | list[str] | None = Field(None, description="`true` shards the model over ranks (FSDP).")
    logging_steps: float = Field(50, gt=0, description="Steps between two records of `log.jsonl`.")
    save_steps: float = Field(1000, gt=0, description="Steps between two checkpoints.")
    save_total_limit: int | None = Field(2, ge=1, description="Checkpoints that are kept.")
    eval_strategy: str | None = Field(None, description="Default: `steps` where there is `data.validation`.")
    eval_steps: float | None = Field(None, gt=0, description="Steps between two evaluations; default: `save_steps`.")
    load_best_model_at_end: bool = Field(False, description="The result is the best checkpoint, not the last one.")
    metric_for_best_model: str | None = Field(None, description="Of the figures of `data.validation`; default: loss.")
    report_to: str | list[str] | None = Field("tensorboard", description="Where else to log; `none` for nowhere.")
    seed: int = Field(42, ge=0, description="Decides the order of samples, noise and new weights.")


class Recipe(Section):
    """What all stages have."""

    stage: str
    data: Data = Field(description="What the stage is trained on.")
    augmentation: Augmentation = Augmentation()
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Evaluations without improvement after which training stops; none: never."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: those of torch.")
    training_arguments: Arguments

    @model_validator(mode="after")
    def _validation_is_there(self):
        arguments = self.training_arguments
        needed = {
            "early_stopping_patience": self.early_stopping_patience,
            "training_arguments.load_best_model_at_end": arguments.load_best_model_at_end,
            "training_arguments.eval_strategy": arguments.eval_strategy not in (None, "no"),
        }
        if self.data.validation is None and (keys := [key for key, value in needed.items() if value]):
            raise ValueError(f"{keys[0]} needs data.validation")
        return self


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def sizes_of(config_class: type[PreTrainedConfig], name: str, **defaults) -> type[Section]:
    """A section with the fields of a configuration, all optional; `defaults` where they differ from its own."""
    fields = {
        key: (hint | None, Field(defaults.get(key), description=f"Default: `{getattr(config_class, key)!r}`."))
        for key, hint in inspect.get_annotations(config_class, eval_str=True).items()
    }
    return create_model(name, __base__=Section, **fields)


VisualTokenizerSizes = sizes_of(LavitVisualTokenizerConfig, "VisualTokenizerSizes", attention_epsilon=0.0)
DetokenizerSizes = sizes_of(LavitDetokenizerConfig, "DetokenizerSizes")


class TokenizerObjective(Section):
    """Loss and schedule of stage 1 (paper section 3.1; issues 10 and 29 of its authors' repository)."""

    keep_rate: Share = Field(1 / 3, description="ρ: share of the patches to keep (Eq. 4).")
    rate_weight: NotNegative = Field(2.0, description="λ: weight of `(ρ - mean keep)²` (Eq. 4).")
    commitment_weight: NotNegative = Field(
        0.0, description="Weight of the distance to the chosen code (VQ-VAE, arXiv 1711.00937); the paper has none."
    )
    quantize_from: Share | None = Field(
        0.5, description="Share of the run after which codes are used (authors: not at first); null: never."
    )
    freeze_selector_from: Share | None = Field(
        None, description="Share of the run after which the selector stands still; null: never."
    )
    codebook_decay: Share = Field(0.995, description="Of the codebook's moving averages, an optimizer step.")
    reset_below: NotNegative = Field(
        0.01, description="A code that is used less often than this share of the mean is reset to a vector in use."
    )


class TokenizerArguments(Arguments):
    """The paper trains 50,000 steps of 2,048 images of LAION-400M; optimizer and learning rate are those of its
    successor (arXiv 2402.03161, table 8), its own are not published."""

    output_dir: str = Field("runs/tokenizer", description=Arguments.model_fields["output_dir"].description)
    max_steps: int = Field(50_000, description="Optimizer steps; -1: `num_train_epochs` decides.")
    per_device_train_batch_size: int = Field(32, ge=1, description="Samples per device and forward.")
    warmup_steps: float = Field(5000, ge=0, description=Arguments.model_fields["warmup_steps"].description)
    weight_decay: float = Field(0.001, ge=0, description="Of AdamW.")
    adam_beta2: float = Field(0.99, gt=0, lt=1, description="Of AdamW.")
    adam_epsilon: float = Field(1e-6, gt=0, description="Of AdamW.")


class TokenizerRecipe(Recipe):
    """Stage 1: selector, merger and quantizer, with the decoder that reconstructs features (paper section 3.1)."""

    stage: Literal["tokenizer"] = "tokenizer"
    encoder: Checkpoint = Field(
        description="LaVIT checkpoint, or visual tokenizer, that provides the encoder; it stays frozen."
    )
    start: str | None = Field(None, description="Result of this stage from which training continues.")
    model: VisualTokenizerSizes = Field(
        VisualTokenizerSizes(), description="Sizes of the visual tokenizer; the official ones by default."
    )
    detokenizer: DetokenizerSizes = Field(
        DetokenizerSizes(), description="Sizes of the decoder; by default those that fit Stable Diffusion XL."
    )
    objective: TokenizerObjective = TokenizerObjective()
    training_arguments: TokenizerArguments = TokenizerArguments()


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class Lora(Section):
    """Arguments of `peft.LoraConfig`."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(32, ge=1, description="The adapters' scale is `lora_alpha / r`.")
    lora_dropout: Share = Field(0.05, description="Dropout before the adapters.")
    target_modules: str | list[str] = Field(
        ".*language_model.*_proj", description="Layers that get adapters: a regular expression, or a list of names."
    )
    modules_to_save: list[str] | None = Field(None, description="Modules that are trained as a whole.")


class Mixture(Section):
    """How often a sample has which form; relative frequencies."""

    caption: NotNegative = Field(0.5, description="`[image, text]`: the image as continuous features.")
    draw: NotNegative = Field(0.5, description="`[text; image]`: the image as codes.")
    text: NotNegative = Field(0.0, description="Text alone, from `text_data`, against forgetting (section 3.2).")
    instruct: NotNegative = Field(0.0, description="Questions and answers, from `instruction_data`.")


class LanguageModelObjective(Section):
    """Loss of stage 2 (paper section 3.2)."""

    visual_loss: Literal["classification", "regression"] = Field(
        "classification", description="`regression` of the code vectors is the paper's ablation (Table 3a)."
    )
    prompt_dropout: Share = Field(
        0.1, description="Share of drawing prompts that are left out, for guidance (Eq. 7; share of arXiv 2207.12598)."
    )
    packing: int | None = Field(
        None, ge=1, description="Ids of a row that holds several samples, none of which sees another; null: one each."
    )


class LanguageModelArguments(Arguments):
    """The paper's own are not published; optimizer and learning rate are those of its successor (arXiv 2402.03161,
    table 8)."""

    output_dir: str = Field("runs/language_model", description=Arguments.model_fields["output_dir"].description)
    max_steps: int = Field(30_000, description="Optimizer steps; -1: `num_train_epochs` decides.")
    per_device_train_batch_size: int = Field(16, ge=1, description="Samples per device and forward.")
    learning_rate: float = Field(2e-5, ge=0, description="Largest learning rate of AdamW.")
    warmup_steps: float = Field(2000, ge=0, description=Arguments.model_fields["warmup_steps"].description)
    weight_decay: float = Field(0.1, ge=0, description="Of AdamW.")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="Of AdamW.")
    adam_epsilon: float = Field(1e-6, gt=0, description="Of AdamW.")


class LanguageModelRecipe(Recipe):
    """Stage 2: the language model learns to read and to draw (paper section 3.2)."""

    stage: Literal["language-model"] = "language-model"
    text_data: Source | None = Field(None, description="Texts for `mixture.text`.")
    instruction_data: Source | None = Field(None, description="Questions and answers for `mixture.instruct`.")
    start: Checkpoint | None = Field(None, description="LaVIT checkpoint from which training continues.")
    tokenizer: str | None = Field(None, description="Result of stage 1; default: the visual tokenizer of `start`.")
    language_model: str | None = Field(None, description="Pretrained Llama that learns visual ids; without a `start`.")
    attn_implementation: str = Field("sdpa", description="`eager`, `sdpa`, `flash_attention_2`, …")
    train_understanding: bool = Field(True, description="Train the merger and the projection that read images.")
    lora: Lora | None = Field(None, description="Low-rank adapters (arXiv 2106.09685); null: all weights are trained.")
    images_per_sample: int = Field(1, ge=1, description="Pairs of image and text in a sample, each in its own form.")
    mixture: Mixture = Mixture()
    generation_presets: dict[str, dict[str, int | float | bool]] | None = Field(
        None, description="Settings of `generate` by name (`caption`, `answer`, `image`); default: those of `start`."
    )
    objective: LanguageModelObjective = LanguageModelObjective()
    training_arguments: LanguageModelArguments = LanguageModelArguments()

    @model_validator(mode="after")
    def _parts_are_there(self):
        if (self.start is None) == (self.language_model is None):
            raise ValueError("give either start (a LaVIT checkpoint) or language_model (a pretrained Llama)")
        if self.language_model is not None and self.tokenizer is None:
            raise ValueError("language_model needs tokenizer, a result of stage 1")
        if self.lora is not None and self.start is None and not self.lora.modules_to_save:
            raise ValueError(
                "adapters alone cannot learn new visual ids: set lora.modules_to_save=[embed_tokens, lm_head]"
            )
        return self


# --- stage 3 ---------------------------------------------------------------------------------------------------------


class PixelDecoderObjective(Section):
    """Loss of stage 3 (paper section 3.1, Eq. 5); the prediction type is the scheduler's."""

    condition_dropout: Share = Field(
        0.1, description="Share of images that are denoised without conditions, for guidance (arXiv 2207.12598)."
    )
    max_weight: NotNegative = Field(
        5.0, description="Largest weight `1 / σ²` of an image, where the scheduler's prediction type is `sample`."
    )
    ema_decay: Share = Field(0.9999, description="Of the moving average of weights that becomes the result.")


class PixelDecoderArguments(Arguments):
    """20,000 steps, as in the paper; learning rate and batch are those of Stable Diffusion's fine-tunings."""

    output_dir: str = Field("runs/pixel_decoder", description=Arguments.model_fields["output_dir"].description)
    max_steps: int = Field(20_000, description="Optimizer steps; -1: `num_train_epochs` decides.")
    per_device_train_batch_size: int = Field(16, ge=1, description="Samples per device and forward.")
    learning_rate: float = Field(1e-5, ge=0, description="Largest learning rate of AdamW.")
    lr_scheduler_type: str = Field(
        "constant_with_warmup", description=Arguments.model_fields["lr_scheduler_type"].description
    )
    warmup_steps: float = Field(500, ge=0, description=Arguments.model_fields["warmup_steps"].description)
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")


class PixelDecoderRecipe(Recipe):
    """Stage 3: a denoising UNet on the detokenizer's conditions (paper section 3.1, Eq. 5)."""

    stage: Literal["pixel-decoder"] = "pixel-decoder"
    tokenizer: Checkpoint = Field(description="Result of stage 1, or a LaVIT checkpoint with a detokenizer.")
    start: Checkpoint = Field(description="Folder of Stable Diffusion 1.5 or XL, or a result of this stage.")
    language_model: Checkpoint | None = Field(
        None, description="Result of stage 2: the result is then a whole checkpoint, which reads and draws."
    )
    resolution: int | None = Field(None, ge=1, description="Side of the images, pixels; default: the tokenizer's.")
    objective: PixelDecoderObjective = PixelDecoderObjective()
    training_arguments: PixelDecoderArguments = PixelDecoderArguments()
