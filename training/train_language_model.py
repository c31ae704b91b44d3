"""Stage 2: the language model learns to read and to draw by next-token prediction (paper section 3.2).

Each sample is drawn at random among captions and questions (`[image, text]`, the image as continuous features),
drawing from text (`[text; image]`, the image as codes), and drawing from an image and text. The visual tokenizer is
frozen; the understanding side has a merger of its own, which starts from the tokenizer's and is trained. A share of
the drawing prompts is dropped, which trains the unconditional stream of guidance, the single token `[IMG]`.
"""

import random
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig

from ..configuration_lavit import LavitConfig
from ..modeling_lavit import IGNORED_LABEL, LavitForConditionalGeneration
from ..modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from ..processing import LavitImageProcessor, LavitProcessor
from .data import PictureDataset, SampleNoise, augment, load_pictures, normalize_pictures
from .distributed import ragged_mean
from .text import drawing_prompt, question_prompt, restyling_prompt, sentences, train_text_tokenizer


class PictureSamples(torch.utils.data.Dataset):
    """Draws a task for each picture anew in every epoch, the same one for the same seed, epoch and position.

    Items are `{"position": int, "ids": list, "labels": list, "pictures": (3, S, S) uint8 or None}`; a picture that is
    read is a slot.

    Args:
        pictures: of one split.
        codes: each picture's visual codes.
        processor: of the model.
        mixture: probabilities of `caption`, `style_question`, `name_question`, `draw`, `restyle`.
        prompt_dropout: share of drawing prompts that are dropped.
        seed: of the run.
    """

    def __init__(
        self,
        pictures: PictureDataset,
        codes,
        processor: LavitProcessor,
        mixture: dict,
        prompt_dropout: float,
        seed: int = 0,
    ):
        self.pictures, self.codes, self.processor = pictures, codes, processor
        self.tasks, self.probabilities = list(mixture), list(mixture.values())
        self.prompt_dropout = prompt_dropout
        self.seed, self.epoch = seed, 0
        self.same_name = defaultdict(list)
        for index, name in enumerate(pictures.name.tolist()):
            self.same_name[name].append(index)

    def __len__(self) -> int:
        return len(self.pictures)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer's data loader before each epoch."""
        self.epoch = epoch

    def text_ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def image_ids(self, index: int) -> list[int]:
        """`codes [/IMG]` of a picture, as ids."""
        return [code + self.processor.visual_offset for code in self.codes[index].tolist()] + [
            self.processor.eoi_token_id
        ]

    def __getitem__(self, position: int) -> dict:
        index = self.pictures.order[position]
        draw = random.Random(f"{self.seed} {self.epoch} {position}")
        task = draw.choices(self.tasks, self.probabilities)[0]
        name = self.pictures.names[self.pictures.name[index]]
        style = self.pictures.styles[self.pictures.style[index]]
        boi, eos = self.processor.boi_token_id, self.processor.tokenizer.eos_token_id
        if task in ("draw", "restyle"):
            sources = [i for i in self.same_name[int(self.pictures.name[index])] if i != index]
            if task == "restyle" and sources:
                prompt = [boi, *self.image_ids(draw.choice(sources)), *self.text_ids(restyling_prompt(draw, style))]
            else:
                prompt = self.text_ids(drawing_prompt(draw, name, style))
            if draw.random() < self.prompt_dropout:
                prompt, target = [boi], self.image_ids(index)
            else:
                target = [boi, *self.image_ids(index)]
            ids, labels = prompt + target + [eos], [IGNORED_LABEL] * len(prompt) + target + [eos]
            return {"position": position, "ids": ids, "labels": labels, "pictures": None}
        question, answer = {
            "caption": ("", name),
            "style_question": (question_prompt(draw, "style"), style),
            "name_question": (question_prompt(draw, "name"), name),
        }[task]
        prompt = [boi, self.processor.eoi_token_id, *(self.text_ids(question) if question else [])]
        answer_ids = [*self.text_ids(answer), eos]
        labels = [IGNORED_LABEL] * len(prompt) + answer_ids
        return {
            "position": position,
            "ids": prompt + answer_ids,
            "labels": labels,
            "pictures": self.pictures.pictures[index],
        }

    @staticmethod
    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        """Right-padded ids, labels, mask; the pictures that are read, in order, and which samples read one."""
        longest = max(len(item["ids"]) for item in items)
        batch = {
            "position": torch.tensor([item["position"] for item in items]),
            "input_ids": torch.zeros(len(items), longest, dtype=torch.long),
            "labels": torch.full((len(items), longest), IGNORED_LABEL),
            "attention_mask": torch.zeros(len(items), longest, dtype=torch.long),
        }
        for row, item in enumerate(items):
            batch["input_ids"][row, : len(item["ids"])] = torch.tensor(item["ids"])
            batch["labels"][row, : len(item["ids"])] = torch.tensor(item["labels"])
            batch["attention_mask"][row, : len(item["ids"])] = 1
        batch["reads"] = torch.tensor([item["pictures"] is not None for item in items])
        pictures = [item["pictures"] for item in items if item["pictures"] is not None]
        return batch | {"pictures": torch.stack(pictures) if pictures else None}


class LanguageModelTraining(nn.Module):
    """LaVIT with the loss of stage 2: one cross-entropy over text and codes, text weighted up as it is short."""

    def __init__(self, model: LavitForConditionalGeneration, recipe: dict):
        super().__init__()
        self.model = model
        self.recipe, self.augmentation = recipe["objective"], recipe["augmentation"]
        self.model.model.visual_tokenizer.requires_grad_(False)

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

    def forward(self, input_ids, labels, attention_mask, pictures, reads, noise: SampleNoise, progress: float):
        model = self.model
        offset = model.config.vocabulary.visual_offset
        input_ids = self.corrupt(input_ids, labels, noise)
        embeds = None
        if pictures is not None:
            pixels = normalize_pictures(augment(pictures.float() / 255, noise.of(reads), **self.augmentation))
            expanded = model.model.expand_inputs(input_ids, pixels, attention_mask, labels, padding_side="right")
            embeds, attention_mask, labels = expanded.inputs_embeds, expanded.attention_mask, expanded.labels
        else:
            embeds = model.get_input_embeddings()(input_ids)
        hidden, targets = [], []
        lengths = attention_mask.sum(1)
        for rows in lengths.argsort().chunk(self.recipe["length_groups"]):  # rows of like length: little padding
            kept = slice(int(lengths[rows].max()))
            states = model.model.language_model(
                inputs_embeds=embeds[rows, kept], attention_mask=attention_mask[rows, kept]
            ).last_hidden_state
            labelled = labels[rows, kept][:, 1:] != IGNORED_LABEL
            hidden.append(states[:, :-1][labelled])
            targets.append(labels[rows, kept][:, 1:][labelled])
        targets = torch.cat(targets)
        losses = F.cross_entropy(model.lm_head(torch.cat(hidden)).float(), targets, reduction="none")
        is_text = targets < model.config.text_vocab_size
        weights = torch.where(is_text, self.recipe["text_weight"], 1.0)
        metrics = {"code_loss": losses[targets >= offset].mean().detach()}
        if bool(is_text.any()):
            metrics["text_loss"] = losses[is_text].mean().detach()
        return {"loss": ragged_mean(losses, weights), "metrics": metrics}


@torch.no_grad()
def tokenize_all(tokenizer: LavitVisualTokenizer, pictures: PictureDataset) -> list[torch.Tensor]:
    """The codes of every picture."""
    codes = []
    for batch in pictures.pictures.split(64):
        codes += tokenizer.tokenize(normalize_pictures(batch.float() / 255)).split()
    return codes


def build(recipe: dict):
    visual_tokenizer = LavitVisualTokenizer.from_pretrained(
        Path(recipe["tokenizer"]) / "visual_tokenizer", attn_implementation="eager"
    )
    visual_config = visual_tokenizer.config
    pictures = load_pictures(recipe["data"], visual_config.image_size)
    text_config = LlamaConfig(**recipe["text_model"])
    text_tokenizer = train_text_tokenizer(
        sentences(pictures.names, pictures.styles), recipe["text_vocab_size"], text_config.max_position_embeddings
    )
    size = {"height": visual_config.image_size, "width": visual_config.image_size}
    processor = LavitProcessor(
        LavitImageProcessor(size=size), text_tokenizer, codebook_size=visual_config.codebook_size
    )
    text_vocab_size = processor.boi_token_id
    text_config.vocab_size = processor.visual_offset + visual_config.codebook_size
    text_config.eos_token_id = text_tokenizer.eos_token_id
    text_config.bos_token_id = text_tokenizer.bos_token_id
    text_config.pad_token_id = text_tokenizer.pad_token_id
    config = LavitConfig(text_config=text_config, visual_config=visual_config, text_vocab_size=text_vocab_size)
    model = LavitForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.model.understanding.merger.load_state_dict(visual_tokenizer.merger.state_dict())
    if recipe["start"]:
        model.load_state_dict(LavitForConditionalGeneration.from_pretrained(recipe["start"]).state_dict())
    model.model.visual_tokenizer.load_state_dict(visual_tokenizer.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        generation_presets=recipe["generation_presets"],
    )
    codes = tokenize_all(visual_tokenizer, pictures)
    dataset = PictureSamples(
        pictures,
        codes,
        processor,
        recipe["mixture"],
        recipe["objective"]["prompt_dropout"],
        recipe["training_arguments"].get("seed", 42),
    )
    return LanguageModelTraining(model, recipe), dataset, []


@torch.no_grad()
def finish(model: LanguageModelTraining, dataset: PictureSamples, recipe: dict, output: Path) -> None:
    """Writes model and processor."""
    model.model.save_pretrained(output)
    dataset.processor.save_pretrained(output)
