"""Stage 2: the language model learns to read and to draw by next-token prediction (paper section 3.2).

Each sample is drawn at random among tasks, by the probabilities of the recipe's mixture: captions and questions
(`[image, text]`, the image as continuous features), drawing (`[text; image]`, the image as codes), text alone,
instructions; see `samples.py`. The visual tokenizer is frozen; the understanding side has a merger of its own, which
starts from the tokenizer's. A share of the drawing prompts is dropped, which trains the unconditional stream of
guidance, the single token `[IMG]`.

The language model is new (`text_model`), a pretrained one of Llama's shape (`language_model`), or that of a LaVIT
checkpoint (`start`); all of it is trained, or low-rank adapters (`lora`, arguments of `peft.LoraConfig`).
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from ..configuration_lavit import LavitConfig, LavitVisualTokenizerConfig
from ..modeling_lavit import IGNORED_LABEL, LavitForConditionalGeneration, LavitInputs
from ..modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from ..processing import LavitImageProcessor, LavitProcessor
from ..slots_lavit import check_slots, fill_slots, find_slots, pad, unpad
from .data import (
    PictureDataset,
    SampleNoise,
    augment,
    load_pictures,
    normalize_pictures,
    result_of,
)
from .distributed import ragged_mean
from .guided import blend_and_name
from .imagined import ImaginedPicture, imagine
from .packing import pack
from .regression import RegressionHead
from .samples import PictureSamples, SourceSampleList, SourceSamples, SourceSampleStream
from .sources import SourceStream, load_source, process_state
from .text import VISUAL_TOKENS, sentences, train_text_tokenizer


# What a start and a tokenizer must have alike for one to take the other's weights and to give the same codes.
VISUAL_SIZES = (
    *("image_size", "patch_size", "hidden_size", "num_hidden_layers", "stem", "codebook_size", "codebook_dim"),
    *("merger_num_hidden_layers", "merger_num_attention_heads", "merger_is_causal", "merge_dropped"),
    *("attention_epsilon", "selection"),
)
VISUAL_LOSSES = ("classification", "regression")


class LanguageModelTraining(nn.Module):
    """LaVIT with the loss of stage 2: one cross-entropy over text and codes, text weighted up as it is short."""

    def __init__(self, model: LavitForConditionalGeneration, recipe: dict):
        super().__init__()
        self.recipe, self.augmentation = recipe["objective"], recipe["augmentation"]
        self.close_augmentation = recipe["close_augmentation"] or self.augmentation
        if recipe["lora"] and not recipe["start"] and not recipe["lora"].get("modules_to_save"):
            raise ValueError(
                "adapters alone cannot learn new visual ids: set lora.modules_to_save=[embed_tokens, lm_head]"
            )
        self.wrapped = get_peft_model(model, LoraConfig(**recipe["lora"])) if recipe["lora"] else model
        model.model.visual_tokenizer.requires_grad_(False)
        model.model.understanding.requires_grad_(recipe["train_understanding"])
        self._no_split_modules = model.model.language_model._no_split_modules  # what FSDP shards one by one
        if self.recipe["visual_loss"] not in VISUAL_LOSSES:
            raise ValueError(
                f"objective.visual_loss must be one of {VISUAL_LOSSES}, got {self.recipe['visual_loss']!r}"
            )
        self.regression_head = None
        if self.recipe["visual_loss"] == "regression":
            self.regression_head = RegressionHead(
                model.config.text_config.hidden_size, model.config.visual_config.codebook_dim
            )

    @property
    def model(self) -> LavitForConditionalGeneration:
        """The model, with its adapters in it where there are some."""
        return self.wrapped.get_base_model() if isinstance(self.wrapped, PeftModel) else self.wrapped

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Called by the trainer where its arguments ask for it."""
        self.model.model.language_model.gradient_checkpointing_enable(**kwargs)

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.model.visual_tokenizer.eval()  # frozen, its statistics too
        return self

    def corrupt(self, input_ids: torch.Tensor, labels: torch.Tensor, noise: SampleNoise) -> torch.Tensor:
        """Replaces a share of the target codes that are read back by random codes: drawing must survive its errors."""
        vocabulary = self.model.config.vocabulary
        uniform = noise.uniform(input_ids.shape[1], 2)
        chosen = (uniform[..., 0] < self.recipe["code_corruption"]) & (labels >= vocabulary.visual_offset)
        others = vocabulary.visual_offset + (uniform[..., 1] * vocabulary.codebook_size).long()
        return torch.where(chosen, others, input_ids)

    def drop_features(
        self, inputs: LavitInputs, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Takes a random share of the features, up to `feature_dropout`, from the pictures that a sample reads: of few
        pictures a language model learns by heart what it should read.

        Args:
            inputs: right-padded, with labels.
            noise: (B, 1 + N) in [0, 1); the first decides the share, each other one features of the sample.

        Returns:
            Embeddings (B, L, E), mask and labels (B, L), right-padded.
        """
        if not self.recipe["feature_dropout"]:
            return inputs.inputs_embeds, inputs.attention_mask, inputs.labels
        number = (inputs.is_feature.cumsum(1) - 1).clamp_min(0) % (noise.shape[1] - 1)
        dropped = noise[:, 1:].gather(1, number) < noise[:, :1] * self.recipe["feature_dropout"]
        kept = inputs.attention_mask.bool() & ~(inputs.is_feature & dropped)
        order = (~kept).long().argsort(dim=1, stable=True)
        mask = kept.gather(1, order)
        labels = inputs.labels.gather(1, order).masked_fill(~mask, IGNORED_LABEL)
        embeds = inputs.inputs_embeds.gather(1, order[..., None].expand_as(inputs.inputs_embeds))
        return embeds, mask.long(), labels

    def augmented(self, pictures: torch.Tensor, noise: SampleNoise, close: torch.Tensor) -> torch.Tensor:
        """Pictures (P, 3, S, S) in [0, 1] to pixel values, those `close` (P,) by their own augmentation."""
        views = augment(pictures, noise, **self.augmentation)
        if close.any():
            views = torch.where(close[:, None, None, None], augment(pictures, noise, **self.close_augmentation), views)
        return normalize_pictures(views)

    def insert_codes(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor,
        pixels: torch.Tensor,
        drawn: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fills the slots of drawn pictures, those of `pixels` (P, 3, S, S) where `drawn` (P,), with the ids of their
        codes, which have a loss where the slot's `[/IMG]` has one."""
        vocabulary = self.model.config.vocabulary
        rows, label_rows = unpad(input_ids, attention_mask), unpad(labels, attention_mask)
        slots = find_slots(rows, vocabulary)
        check_slots(slots, len(pixels))
        codes = iter(self.model.get_image_tokens(pixels[drawn]).split())
        nothing = input_ids.new_zeros(0)
        fills = [next(codes) + vocabulary.visual_offset if is_drawn else nothing for is_drawn in drawn.tolist()]
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
        if self.recipe["packing"]:
            embeds, positions, labels, mask = pack(
                embeds, attention_mask, labels, self.recipe["packing"], IGNORED_LABEL
            )
            states = language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions
            ).last_hidden_state
            labelled = labels[:, 1:] != IGNORED_LABEL
            return states[:, :-1][labelled], labels[:, 1:][labelled]
        hidden, targets = [], []
        lengths = attention_mask.sum(1)
        for rows in lengths.argsort().chunk(self.recipe["length_groups"]):  # rows of like length: little padding
            kept = slice(int(lengths[rows].max()))
            states = language_model(
                inputs_embeds=embeds[rows, kept], attention_mask=attention_mask[rows, kept]
            ).last_hidden_state
            labelled = labels[rows, kept][:, 1:] != IGNORED_LABEL
            hidden.append(states[:, :-1][labelled])
            targets.append(labels[rows, kept][:, 1:][labelled])
        return torch.cat(hidden), torch.cat(targets)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor,
        pictures: torch.Tensor | None,
        owner: torch.Tensor,
        drawn: torch.Tensor,
        close: torch.Tensor,
        noise: SampleNoise,
        progress: float,
    ):
        model = self.model
        offset = model.config.vocabulary.visual_offset
        if pictures is not None:
            pixels = self.augmented(pictures.float() / 255, noise.of(owner), close)
            if drawn.any():
                input_ids, labels, attention_mask = self.insert_codes(input_ids, labels, attention_mask, pixels, drawn)
                pixels = pixels[~drawn]
        dropout_noise = noise.uniform(1 + model.config.visual_config.num_patches)
        input_ids = self.corrupt(input_ids, labels, noise)
        is_reading = pictures is not None and len(pixels) > 0
        if is_reading:
            expanded = model.model.expand_inputs(input_ids, pixels, attention_mask, labels, padding_side="right")
            embeds, attention_mask, labels = self.drop_features(expanded, dropout_noise)
        else:
            embeds = model.get_input_embeddings()(input_ids)
        hidden, targets = self.states(embeds, attention_mask, labels)
        is_text, is_code = targets < model.config.text_vocab_size, targets >= offset
        if self.regression_head is not None:
            codes, targets = (
                targets[is_code] - offset,
                targets.masked_fill(is_code, model.config.vocabulary.boi_token_id),
            )
        losses = F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")
        if self.regression_head is not None:
            vectors = model.model.visual_tokenizer.quantizer.codebook.weight[codes]
            losses = losses.index_put((is_code,), self.regression_head.loss(hidden[is_code], vectors), accumulate=True)
        weights = torch.where(is_text, self.recipe["text_weight"], 1.0)
        kinds = {"code_loss": is_code, "text_loss": is_text}
        metrics = {key: losses[kind].mean().detach() for key, kind in kinds.items() if kind.any()}
        loss = ragged_mean(losses, weights)
        if isinstance(self, FSDPModule) and not is_reading:
            # other ranks may be reading, and sharded gradients are exchanged for the same parameters on all of them
            loss = loss + 0 * sum(p.sum() for p in model.model.understanding.parameters() if p.requires_grad)
        return {"loss": loss, "metrics": metrics}


@torch.no_grad()
def tokenize_all(
    tokenizer: LavitVisualTokenizer, pictures: PictureDataset, views: dict, seed: int
) -> list[list[torch.Tensor]]:
    """The codes of every picture and of `views["number"]` augmented views of it: of few pictures alone a language
    model learns the sequences by heart.

    Args:
        views: `number`, and the arguments of [`augment`].
    """
    augmentation = {key: value for key, value in views.items() if key != "number"}
    codes = [[] for _ in pictures.pictures]
    for view in range(views["number"] + 1):
        for rows in torch.arange(len(codes)).split(64):
            pixels = pictures.pictures[rows].float() / 255
            if view:
                pixels = augment(pixels, SampleNoise(rows, view, seed), **augmentation)
            tokens = tokenizer.tokenize(normalize_pictures(pixels).to(tokenizer.device))
            for row, own in zip(rows.tolist(), tokens.split(), strict=True):
                codes[row].append(own.cpu())
    return codes


def new_model(
    recipe: dict, visual_tokenizer: LavitVisualTokenizer, texts: list[str] | None
) -> tuple[LavitForConditionalGeneration, LavitProcessor]:
    """A model around a visual tokenizer, and its processor: with a pretrained language model, whose embeddings grow by
    the visual ids, or with a new one, whose text tokenizer is trained on `texts`.

    Raises:
        ValueError: the recipe names neither, or both; or there are no texts.
    """
    if (recipe["language_model"] is None) == (recipe["text_model"] is None):
        raise ValueError(
            "the recipe needs either language_model (a pretrained one) or text_model (sizes of a new one)"
        )
    visual_config = visual_tokenizer.config
    pretrained = None
    if recipe["language_model"]:
        pretrained = AutoModelForCausalLM.from_pretrained(recipe["language_model"], dtype=torch.float32)
        text_tokenizer = AutoTokenizer.from_pretrained(
            recipe["language_model"],
            padding_side="left",
            extra_special_tokens={key: AddedToken(token, special=True) for key, token in VISUAL_TOKENS.items()},
        )
        if text_tokenizer.pad_token is None:
            text_tokenizer.pad_token = text_tokenizer.eos_token
        text_config = pretrained.config
    else:
        if texts is None:
            raise ValueError(
                "text_model needs pictures with name and style; other data need a pretrained language_model"
            )
        text_config = LlamaConfig(**recipe["text_model"])
        text_tokenizer = train_text_tokenizer(texts, recipe["text_vocab_size"], text_config.max_position_embeddings)
    size = {"height": visual_config.image_size, "width": visual_config.image_size}
    processor = LavitProcessor(
        LavitImageProcessor(size=size), text_tokenizer, codebook_size=visual_config.codebook_size
    )
    needed = processor.visual_offset + visual_config.codebook_size
    if pretrained is not None:
        pretrained.resize_token_embeddings(max(needed, text_config.vocab_size))
    else:
        text_config.vocab_size = needed
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(text_config, key, getattr(text_tokenizer, key))
    config = LavitConfig(
        text_config=text_config,
        visual_config=visual_config,
        text_vocab_size=processor.boi_token_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    model = LavitForConditionalGeneration._from_config(config, attn_implementation=recipe["attn_implementation"])
    if pretrained is not None:
        model.model.language_model.load_state_dict(pretrained.model.state_dict())
        model.lm_head.load_state_dict(pretrained.lm_head.state_dict())
    model.model.understanding.merger.load_state_dict(visual_tokenizer.merger.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    return model, processor


def build_model(recipe: dict, texts: list[str] | None) -> tuple[LavitForConditionalGeneration, LavitProcessor]:
    """The recipe's `start`, with the visual tokenizer of `tokenizer` in it if that is named too; else [`new_model`].

    Raises:
        ValueError: the two do not fit.
    """
    visual_tokenizer = None
    if recipe["tokenizer"]:
        folder = Path(recipe["tokenizer"])
        visual_tokenizer = LavitVisualTokenizer.from_pretrained(folder / "visual_tokenizer", dtype=torch.float32)
    if recipe["start"]:
        model = LavitForConditionalGeneration.from_pretrained(
            recipe["start"], dtype=torch.float32, attn_implementation=recipe["attn_implementation"]
        )
        processor = LavitProcessor.from_pretrained(recipe["start"])
    else:
        model, processor = new_model(recipe, visual_tokenizer, texts)
    if visual_tokenizer is not None:
        own, given = model.config.visual_config, visual_tokenizer.config
        for key in VISUAL_SIZES:
            if getattr(own, key) != getattr(given, key):
                raise ValueError(
                    f"start and tokenizer have different {key}: {getattr(own, key)}, {getattr(given, key)}"
                )
        model.model.visual_tokenizer.load_state_dict(visual_tokenizer.state_dict())
    model.model.visual_tokenizer.eval()  # it is frozen, its statistics too
    if recipe["generation_presets"]:
        model.generation_config.generation_presets = recipe["generation_presets"]
    return model, processor


def imagine_for(
    recipe: dict, model: LavitForConditionalGeneration, processor: LavitProcessor, pictures, codes, seed: int
) -> list[ImaginedPicture]:
    """What [`imagine`] makes by the recipe's section, drawn by `imagined.model`, or by the recipe's start.

    Raises:
        ValueError: there is no model that can draw, or one with other codes.
    """
    section = recipe["imagined"]
    if not section["number"]:
        return []
    if section["model"]:
        start, model = model, LavitForConditionalGeneration.from_pretrained(section["model"], dtype=torch.float32)
        model.to(start.device)
        codebooks = (one.model.visual_tokenizer.quantizer.codebook.weight for one in (start, model))
        if not torch.equal(*codebooks):
            raise ValueError(f"imagined.model {section['model']} has other codes than the tokenizer of this run")
    elif not recipe["start"]:
        raise ValueError("imagined.number needs a model that can draw and read: a start, or imagined.model")
    how = section["number"], section["source"], section["guidance_scale"]
    return imagine(model, processor, pictures, codes, *how, seed, section["check_style"])


def build_samples(recipe: dict, pictures, model: LavitForConditionalGeneration, processor: LavitProcessor):
    """The data set of samples that the recipe's `mixture` describes."""
    seed = recipe["training_arguments"].get("seed", 42)
    dropout = recipe["objective"]["prompt_dropout"]
    if isinstance(pictures, PictureDataset):
        device, guided = process_state().device, None
        model.to(device)
        codes = tokenize_all(model.model.visual_tokenizer, pictures, recipe["code_views"], seed)
        imagined = imagine_for(recipe, model, processor, pictures, codes, seed)
        model.to("cpu")
        if recipe["guided"]["number"]:
            guided = blend_and_name(pictures, recipe["guided"]["guides"], recipe["guided"]["number"], seed, device)
        extra = imagined, recipe["imagined"]["share"], guided, recipe["guided"]["share"]
        return PictureSamples(pictures, codes, processor, recipe["mixture"], dropout, seed, *extra)
    size = model.config.visual_config.image_size
    texts = load_source(recipe["text_data"], size, with_pictures=False) if recipe["text_data"] else None
    instructions = load_source(recipe["instruction_data"], size) if recipe["instruction_data"] else None
    if isinstance(texts, SourceStream) or isinstance(instructions, SourceStream):
        raise ValueError("rows of text_data and instruction_data are drawn at random: they cannot be streamed")
    codes, max_length = pictures.reader.columns.codes, model.config.text_config.max_position_embeddings
    if codes and recipe["augmentation"].get("share"):
        raise ValueError("precomputed codes are those of pictures as they are: set augmentation.share to 0")
    kind: type[SourceSamples] = SourceSampleStream if isinstance(pictures, SourceStream) else SourceSampleList
    return kind(
        pictures,
        processor,
        recipe["mixture"],
        dropout,
        recipe["images_per_sample"],
        texts,
        instructions,
        seed,
        max_length,
    )


def picture_size(recipe: dict) -> int:
    """The side in pixels of the pictures that the recipe's visual tokenizer takes.

    Raises:
        ValueError: the recipe names none.
    """
    if recipe["tokenizer"]:
        folder = result_of("tokenizer", recipe["tokenizer"], "visual_tokenizer")
        return LavitVisualTokenizerConfig.from_pretrained(folder).image_size
    if recipe["start"]:
        if "/" not in recipe["start"]:  # no repository either
            result_of("language-model", recipe["start"], "config.json")
        return LavitConfig.from_pretrained(recipe["start"]).visual_config.image_size
    raise ValueError("the recipe needs a tokenizer (result of stage 1) or a start (a LaVIT checkpoint)")


def build(recipe: dict):
    pictures = load_pictures(recipe["data"], picture_size(recipe))
    texts = sentences(pictures.names, pictures.styles) if isinstance(pictures, PictureDataset) else None
    model, processor = build_model(recipe, texts)
    return LanguageModelTraining(model, recipe), build_samples(recipe, pictures, model, processor), []


@torch.no_grad()
def finish(model: LanguageModelTraining, dataset, recipe: dict, output: Path) -> None:
    """Writes model and processor; adapters by themselves, with the understanding beside them if it was trained, and
    merged into the model."""
    whole = model.model
    if isinstance(model.wrapped, PeftModel):
        model.wrapped.save_pretrained(output / "adapter")
        if recipe["train_understanding"]:
            save_file(whole.model.understanding.state_dict(), output / "adapter" / "understanding.safetensors")
        whole = model.wrapped.merge_and_unload()
    whole.save_pretrained(output)
    dataset.sequences.processor.save_pretrained(output)
    if model.regression_head is not None:
        model.regression_head.save(output)
