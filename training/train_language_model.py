"""Stage 2: the language model learns to read and to draw by next-token prediction (paper section 3.2).

Each sample is drawn at random among tasks, by the recipe's mixture: captions (`[image, text]`, the image as continuous
features), drawing (`[text; image]`, the image as codes), text alone, instructions; see `data/samples.py`. The visual
tokenizer is frozen; the understanding side has a merger of its own, which starts from the tokenizer's.

The language model is that of a LaVIT checkpoint (`start`), or a pretrained one of Llama's shape (`language_model`);
all of it is trained, or low-rank adapters (`lora`).

Dimension letters: B samples, L ids, P images, E width of the language model, M positions that predict something.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from modeling_lavit.configuration_lavit import LavitConfig, LavitVisualTokenizerConfig
from modeling_lavit.modeling_lavit import IGNORED_LABEL, LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.processing import LavitImageProcessor, LavitProcessor
from modeling_lavit.slots_lavit import LavitInputs, check_slots, fill_slots, find_slots, pad, unpad
from modeling_lavit.training.data.augmentation import SampleNoise, augment, normalize_images
from modeling_lavit.training.data.datasets import SourceStream, load_data, load_source
from modeling_lavit.training.data.packing import pack
from modeling_lavit.training.data.samples import Sequences, SourceSampleList, SourceSamples, SourceSampleStream
from modeling_lavit.training.distributed import ragged_mean
from modeling_lavit.training.recipe import LanguageModelRecipe
from modeling_lavit.training.regression import RegressionHead
from modeling_lavit.training.results import is_whole, result_of, write_whole
from modeling_lavit.training.stage import Parts, Stage, TrainingModel


# What a text tokenizer gets above its own ids.
VISUAL_TOKENS = {"boi_token": "[IMG]", "eoi_token": "[/IMG]"}
# What a start and a tokenizer must have alike for one to take the other's weights and to give the same codes.
VISUAL_SIZES = (
    *("image_size", "patch_size", "hidden_size", "num_hidden_layers", "stem", "codebook_size", "codebook_dim"),
    *("merger_num_hidden_layers", "merger_num_attention_heads", "merger_is_causal", "merge_dropped"),
    *("attention_epsilon", "selection"),
)


class LanguageModelTraining(TrainingModel):
    """LaVIT with the loss of stage 2: one cross-entropy over text and codes (paper Eq. 6)."""

    def __init__(self, model: LavitForConditionalGeneration, recipe: LanguageModelRecipe):
        super().__init__()
        self.objective, self.augmentation = recipe.objective, recipe.augmentation.model_dump()
        lora = recipe.lora and LoraConfig(**recipe.lora.model_dump())
        self.wrapped = get_peft_model(model, lora) if lora else model
        model.model.visual_tokenizer.requires_grad_(False)
        model.model.understanding.requires_grad_(recipe.train_understanding)
        self._no_split_modules = model.model.language_model._no_split_modules
        self.regression_head = None
        if self.objective.visual_loss == "regression":
            self.regression_head = RegressionHead(
                model.config.text_config.hidden_size, model.config.visual_config.codebook_dim
            )
        self.register_state_dict_post_hook(untie)

    @property
    def model(self) -> LavitForConditionalGeneration:
        """The model, with its adapters in it where there are some."""
        return self.wrapped.get_base_model() if isinstance(self.wrapped, PeftModel) else self.wrapped

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Called by the trainer where its arguments ask for it."""
        self.model.model.language_model.gradient_checkpointing_enable(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.24

    # What stages of other data may do otherwise.

    def pixel_values(self, images: torch.Tensor, noise: SampleNoise, **labels: torch.Tensor) -> torch.Tensor:
        """Images (P, 3, S, S) in [0, 1] as the tokenizer's encoder takes them; `labels` (P, …): what else the data set
        has of them."""
        return normalize_images(augment(images, noise, **self.augmentation) if self.training else images)

    def read_back(self, input_ids: torch.Tensor, labels: torch.Tensor, noise: SampleNoise) -> torch.Tensor:
        """The ids (B, L) that the model is given where `labels` (B, L) are what it should write."""
        return input_ids

    def read_features(
        self, inputs: LavitInputs, noise: SampleNoise
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, E), mask and labels (B, L) of prompts whose slots are filled."""
        return inputs.inputs_embeds, inputs.attention_mask, inputs.labels

    def weights(self, is_text: torch.Tensor) -> torch.Tensor:
        """How much each target counts, (M,); `is_text` (M,): whether it is a text id."""
        return torch.ones_like(is_text, dtype=torch.float32)

    def insert_codes(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor,
        pixels: torch.Tensor,
        drawn: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fills the slots of drawn images, those of `pixels` (P, 3, S, S) where `drawn` (P,), with the ids of their
        codes, which have a loss where the slot's `[/IMG]` has one."""
        vocabulary = self.model.config.vocabulary
        rows, label_rows = unpad(input_ids, attention_mask), unpad(labels, attention_mask)
        slots = find_slots(rows, vocabulary)
        check_slots(slots, len(pixels))
        codes = iter(self.model.get_image_tokens(pixels[drawn]).split())
        nothing = input_ids.new_zeros(0)
        fills = [vocabulary.ids_of(next(codes)) if is_drawn else nothing for is_drawn in drawn.tolist()]
        ends = [label[start + 1] for label, starts in zip(label_rows, slots, strict=True) for start in starts]
        label_fills = [
            torch.full_like(ids, IGNORED_LABEL) if end == IGNORED_LABEL else ids
            for ids, end in zip(fills, ends, strict=True)
        ]
        input_ids, attention_mask = pad(fill_slots(rows, slots, fills), vocabulary.visual_offset, "right")
        labels, _ = pad(fill_slots(label_rows, slots, label_fills), IGNORED_LABEL, "right")
        return input_ids, labels, attention_mask

    def states(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded (B, L, …) to the hidden states (M, E) that predict something, and what, (M,)."""
        language_model = self.model.model.language_model
        positions = {}
        if self.objective.packing:
            embeds, position_ids, labels, attention_mask = pack(
                embeds, attention_mask, labels, self.objective.packing, IGNORED_LABEL
            )
            positions = {"position_ids": position_ids}
        states = language_model(inputs_embeds=embeds, attention_mask=attention_mask, **positions).last_hidden_state
        labelled = labels[:, 1:] != IGNORED_LABEL
        return states[:, :-1][labelled], labels[:, 1:][labelled]

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss (M,) of each hidden state (M, E) for what it should predict, (M,)."""
        vocabulary = self.model.config.vocabulary
        if self.regression_head is None:
            return F.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="none")
        is_code = vocabulary.is_code(targets)
        codes = vocabulary.codes_of(targets[is_code])
        targets = targets.masked_fill(is_code, vocabulary.boi_token_id)
        losses = F.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="none")
        vectors = self.model.model.visual_tokenizer.quantizer.codebook.weight[codes]
        return losses.index_put((is_code,), self.regression_head.loss(hidden[is_code], vectors), accumulate=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor,
        images: torch.Tensor | None,
        owner: torch.Tensor,
        drawn: torch.Tensor,
        noise: SampleNoise,
        progress: float,
        **image_labels: torch.Tensor,
    ) -> dict:
        model = self.model
        if images is not None:
            pixels = self.pixel_values(images.float() / 255, noise.of(owner), **image_labels)
            if drawn.any():
                input_ids, labels, attention_mask = self.insert_codes(input_ids, labels, attention_mask, pixels, drawn)
                pixels = pixels[~drawn]
        input_ids = self.read_back(input_ids, labels, noise)
        is_reading = images is not None and len(pixels) > 0
        if is_reading:
            expanded = model.model.expand_inputs(input_ids, pixels, attention_mask, labels, padding_side="right")
            embeds, attention_mask, labels = self.read_features(expanded, noise)
        else:
            embeds = model.get_input_embeddings()(input_ids)
        hidden, targets = self.states(embeds, attention_mask, labels)
        losses = self.losses(hidden, targets)
        is_text, is_code = targets < model.config.text_vocab_size, model.config.vocabulary.is_code(targets)
        loss = ragged_mean(losses, self.weights(is_text))
        if isinstance(self, FSDPModule) and not is_reading:
            # other ranks may be reading, and sharded gradients are exchanged for the same parameters on all of them
            loss = loss + 0 * sum(p.sum() for p in model.model.understanding.parameters() if p.requires_grad)
        return {"loss": loss, "metrics": {"text_loss": losses[is_text], "code_loss": losses[is_code]}}


def untie(module: torch.nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    """Copies tensors that share their memory, as tied embeddings do: safetensors refuses them."""
    seen = set()
    for key, tensor in state_dict.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            state_dict[key] = tensor.clone()
        seen.add(tensor.data_ptr())


# --- models ----------------------------------------------------------------------------------------------------------


def assemble_model(
    text_config: LlamaConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    visual_tokenizer: LavitVisualTokenizer,
    recipe: LanguageModelRecipe,
) -> tuple[LavitForConditionalGeneration, LavitProcessor]:
    """A LaVIT of a language model's and a visual tokenizer's sizes, with random weights but for the understanding's
    merger, and its processor.

    Args:
        text_config: its `vocab_size` becomes large enough for the visual ids.
        text_tokenizer: with [`VISUAL_TOKENS`] right above its text ids.
    """
    visual_config = visual_tokenizer.config
    size = {"height": visual_config.image_size, "width": visual_config.image_size}
    processor = LavitProcessor(
        LavitImageProcessor(size=size), text_tokenizer, codebook_size=visual_config.codebook_size
    )
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(text_config, key, getattr(text_tokenizer, key))
    text_config.vocab_size = max(text_config.vocab_size, processor.vocabulary.size)
    config = LavitConfig(
        text_config=text_config,
        visual_config=visual_config,
        text_vocab_size=processor.boi_token_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    model = LavitForConditionalGeneration._from_config(config, attn_implementation=recipe.attn_implementation)
    model.model.understanding.merger.load_state_dict(visual_tokenizer.merger.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    return model, processor


def from_language_model(
    recipe: LanguageModelRecipe, visual_tokenizer: LavitVisualTokenizer
) -> tuple[LavitForConditionalGeneration, LavitProcessor]:
    """A LaVIT of a pretrained language model, whose embeddings grow by the visual ids."""
    pretrained = AutoModelForCausalLM.from_pretrained(recipe.language_model, dtype=torch.float32)
    text_tokenizer = AutoTokenizer.from_pretrained(
        recipe.language_model,
        padding_side="left",
        extra_special_tokens={key: AddedToken(token, special=True) for key, token in VISUAL_TOKENS.items()},
    )
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.eos_token
    needed = text_tokenizer.convert_tokens_to_ids("[/IMG]") + 1 + visual_tokenizer.config.codebook_size
    pretrained.resize_token_embeddings(max(needed, pretrained.config.vocab_size))
    model, processor = assemble_model(pretrained.config, text_tokenizer, visual_tokenizer, recipe)
    model.model.language_model.load_state_dict(pretrained.model.state_dict())
    model.lm_head.load_state_dict(pretrained.lm_head.state_dict())
    return model, processor


def put_tokenizer(model: LavitForConditionalGeneration, visual_tokenizer: LavitVisualTokenizer) -> None:
    """Gives a model the weights of a visual tokenizer.

    Raises:
        ValueError: the two do not fit.
    """
    own, given = model.config.visual_config, visual_tokenizer.config
    for key in VISUAL_SIZES:
        if getattr(own, key) != getattr(given, key):
            raise ValueError(f"start and tokenizer have different {key}: {getattr(own, key)}, {getattr(given, key)}")
    model.model.visual_tokenizer.load_state_dict(visual_tokenizer.state_dict())


def build_model(recipe: LanguageModelRecipe) -> tuple[LavitForConditionalGeneration, LavitProcessor]:
    """The recipe's `start`, with the visual tokenizer of `tokenizer` in it if that is named too; or its
    `language_model` with that tokenizer.

    Raises:
        ValueError: the two do not fit.
    """
    visual_tokenizer = None
    if recipe.tokenizer:
        folder = result_of("tokenizer", recipe.tokenizer, "visual_tokenizer")
        visual_tokenizer = LavitVisualTokenizer.from_pretrained(folder, dtype=torch.float32)
    if recipe.start:
        model = LavitForConditionalGeneration.from_pretrained(
            recipe.start, dtype=torch.float32, attn_implementation=recipe.attn_implementation
        )
        processor = LavitProcessor.from_pretrained(recipe.start)
    else:
        model, processor = from_language_model(recipe, visual_tokenizer)
    if visual_tokenizer is not None:
        put_tokenizer(model, visual_tokenizer)
    model.model.visual_tokenizer.eval()  # it is frozen, its statistics too
    if recipe.generation_presets:
        model.generation_config.generation_presets = recipe.generation_presets
    return model, processor


def image_size(recipe: LanguageModelRecipe) -> int:
    """The side in pixels of the images that the recipe's visual tokenizer takes."""
    if recipe.tokenizer:
        folder = result_of("tokenizer", recipe.tokenizer, "visual_tokenizer")
        return LavitVisualTokenizerConfig.from_pretrained(folder).image_size
    if "/" not in recipe.start:  # no repository either
        result_of("language-model", recipe.start, "config.json")
    return LavitConfig.from_pretrained(recipe.start).visual_config.image_size


class LanguageModelStage(Stage):
    """Stage 2."""

    recipe_class = LanguageModelRecipe

    def build(self, recipe: LanguageModelRecipe) -> Parts:
        size, seed = image_size(recipe), recipe.training_arguments.seed
        dataset, validation = load_data(recipe.data, size, seed)
        if dataset.reader.columns.codes and recipe.augmentation.share:
            raise ValueError("precomputed codes are those of images as they are: set augmentation.share to 0")
        texts = load_source(recipe.text_data, size, seed, with_images=False) if recipe.text_data else None
        instructions = load_source(recipe.instruction_data, size, seed) if recipe.instruction_data else None
        model, processor = build_model(recipe)
        sequences = Sequences(processor, model.config.vocabulary, recipe.objective.prompt_dropout)
        max_length = model.config.text_config.max_position_embeddings

        def samples(images) -> SourceSamples:
            kind = SourceSampleStream if isinstance(images, SourceStream) else SourceSampleList
            more = texts, instructions, seed, max_length
            return kind(images, sequences, recipe.mixture, recipe.images_per_sample, *more)

        training = LanguageModelTraining(model, recipe)
        return Parts(training, samples(dataset), None if validation is None else samples(validation))

    def finish(self, model: LanguageModelTraining, parts: Parts, recipe: LanguageModelRecipe, output: Path) -> None:
        """Writes the model, which draws too if the start does; adapters also by themselves, with the understanding
        beside them if it was trained."""
        whole, processor = model.model, parts.dataset.sequences.processor
        if isinstance(model.wrapped, PeftModel):
            model.wrapped.save_pretrained(output / "adapter")
            if recipe.train_understanding:
                save_file(whole.model.understanding.state_dict(), output / "adapter" / "understanding.safetensors")
            whole = model.wrapped.merge_and_unload()
        if recipe.start and not recipe.tokenizer and is_whole(recipe.start):
            write_whole(whole, processor, output, base=recipe.start)
        else:
            whole.save_pretrained(output)
            processor.save_pretrained(output)
        if model.regression_head is not None:
            model.regression_head.save(output)
