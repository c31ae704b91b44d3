"""What a language model is trained on: images and texts as sequences of ids (paper section 3.2).

A sample is `{"position": int, "ids": list, "labels": list, "images": [(3, S, S) uint8], "drawn": [bool]}`. An image
is an empty slot `[IMG][/IMG]` among the ids: what is read becomes continuous features there, what is drawn (or read
as codes, to draw another) becomes its codes, with a loss where the slot's `[/IMG]` has one."""

import itertools
import random

import torch
from pydantic import BaseModel

from modeling_lavit.modeling_lavit import IGNORED_LABEL
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data.datasets import SourceDataset, SourceStream
from modeling_lavit.training.recipe import Mixture
from modeling_lavit.vocabulary_lavit import LavitVocabulary


ANSWER_PROMPT = "Question: {} Answer:"


class Sequences:
    """Builds the parts of samples.

    Args:
        processor: of the model; its tokenizer is used.
        vocabulary: of the model.
        prompt_dropout: share of drawing prompts that are dropped, which trains the unconditional stream of guidance,
            the single token `[IMG]`.
    """

    def __init__(self, processor: LavitProcessor, vocabulary: LavitVocabulary, prompt_dropout: float):
        self.processor, self.vocabulary, self.prompt_dropout = processor, vocabulary, prompt_dropout
        self.boi, self.eoi = vocabulary.boi_token_id, vocabulary.eoi_token_id
        self.eos = processor.tokenizer.eos_token_id

    def text(self, text: str) -> list[int]:
        """The ids of a text, in which `[IMG]` is a word like others."""
        return self.processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def codes(self, codes: torch.Tensor) -> list[int]:
        """The ids of codes (n,).

        Raises:
            ValueError: the model has no such code.
        """
        try:
            return self.vocabulary.ids_of(codes).tolist()
        except ValueError as error:
            raise ValueError(f"the source's codes are of another tokenizer than the model's: {error}") from error

    @staticmethod
    def sample(position: int, parts: list[tuple[list[int], bool]], images=(), drawn=()) -> dict:
        """Joins parts, each with whether it is learnt."""
        ids = [i for part, _ in parts for i in part]
        labels = [i if learnt else IGNORED_LABEL for part, learnt in parts for i in part]
        return {"position": position, "ids": ids, "labels": labels, "images": list(images), "drawn": list(drawn)}

    def reading(self, turns: list[tuple[str, str]]) -> list[tuple[list[int], bool]]:
        """An image, then prompts and their answers; an empty prompt before a caption."""
        parts = [([self.boi, self.eoi], False)]
        for prompt, answer in turns:
            parts += [(self.text(prompt) if prompt else [], False), ([*self.text(answer), self.eos], True)]
        return parts

    def drawing(self, prompt: list[int], codes: list[int], draw: random.Random) -> list[tuple[list[int], bool]]:
        """A prompt, then an image as codes; no codes where they are not known yet. Now and then no prompt."""
        if draw.random() < self.prompt_dropout:
            return [([self.boi], False), ([*codes, self.eoi, self.eos], True)]
        return [(prompt, False), ([self.boi, *codes, self.eoi, self.eos], True)]


def tasks_of(mixture: BaseModel) -> dict[str, float]:
    """The tasks of a mixture, by their weights.

    Raises:
        ValueError: all weights are zero.
    """
    weights = {task: weight for task, weight in mixture.model_dump().items() if weight}
    if not weights:
        raise ValueError("mixture: at least one task needs a weight above 0")
    return weights


def collate_samples(items: list[dict]) -> dict[str, torch.Tensor | None]:
    """Right-padded ids, labels and mask (B, L); the images (P, 3, S, S) in order, the sample that each belongs to, and
    whether it is drawn, (P,)."""
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
    images = [image for item in items for image in item["images"]]
    owners = [row for row, item in enumerate(items) for _ in item["images"]]
    return batch | {
        "owner": torch.tensor(owners, dtype=torch.long),
        "drawn": torch.tensor([drawn for item in items for drawn in item["drawn"]], dtype=torch.bool),
        "images": torch.stack(images) if images else None,
    }


class SourceSamples:
    """Samples of images with texts from any source, of text alone, and of instructions.

    Args:
        images: of [`load_source`], with texts; streamed or not.
        sequences: builds the parts.
        mixture: how often which task.
        images_per_sample: pairs of image and text that one sample holds, each in its own order.
        texts, instructions: of [`load_source`], not streamed: what `text` and `instruct` take rows from, at random.
        seed: of the run.
        max_length: most ids of a text without images, which is cut there.

    Raises:
        ValueError: a task has a weight, but no data.
    """

    collate = staticmethod(collate_samples)

    def __init__(
        self,
        images: SourceDataset | SourceStream,
        sequences: Sequences,
        mixture: Mixture,
        images_per_sample: int = 1,
        texts: SourceDataset | None = None,
        instructions: SourceDataset | None = None,
        seed: int = 0,
        max_length: int = 2048,
    ):
        self.images, self.sequences, self.images_per_sample = images, sequences, images_per_sample
        self.texts, self.instructions, self.seed, self.max_length = texts, instructions, seed, max_length
        self.mixture = tasks_of(mixture)
        columns = images.reader.columns
        if columns.text is None and (mixture.caption or mixture.draw):
            raise ValueError("which column holds the texts? Name it as data.text_column")
        if columns.image is None and mixture.caption:
            raise ValueError(
                "captions need images, the source has codes alone (lavit tokenize --keep-images keeps them)"
            )
        if mixture.instruct and instructions is not None and not instructions.reader.columns.has_turns:
            raise ValueError("instruction_data needs question_column and answer_column, or messages_column")
        for task, key, data in (("text", "text_data", texts), ("instruct", "instruction_data", instructions)):
            if task in self.mixture and data is None:
                raise ValueError(f"the mixture has the task {task!r}, but the recipe has no {key}")
        if isinstance(texts, SourceStream) or isinstance(instructions, SourceStream):
            raise ValueError("rows of text_data and instruction_data are drawn at random: they cannot be streamed")

    def sample(self, position: int, epoch: int, take) -> dict:
        """One sample; `take()` gives the next item of `images`."""
        draw = random.Random(f"{self.seed} {epoch} {position}")
        task = draw.choices(list(self.mixture), self.mixture.values())[0]
        if task == "text":
            return self._text_sample(position, draw)
        if task == "instruct":
            return self._instruction_sample(position, draw)
        either = {key: weight for key, weight in self.mixture.items() if key in ("caption", "draw")}
        sequences, parts, images, drawn = self.sequences, [], [], []
        for number in range(self.images_per_sample):
            item = take()
            if number:
                task = draw.choices(list(either), either.values())[0]
            if task == "caption":
                parts += sequences.reading([("", item["text"])])
            else:
                codes = sequences.codes(item["codes"]) if "codes" in item else []
                parts += sequences.drawing(sequences.text(item["text"]), codes, draw)
            if task == "caption" or "codes" not in item:
                images.append(item["images"])
                drawn.append(task == "draw")
        return sequences.sample(position, parts, images, drawn)

    def _text_sample(self, position: int, draw: random.Random) -> dict:
        ids = self.sequences.text(self.texts[draw.randrange(len(self.texts))]["text"])
        end = [self.sequences.eos] if len(ids) < self.max_length else []
        return self.sequences.sample(position, [([*ids[: self.max_length], *end], True)])

    def _instruction_sample(self, position: int, draw: random.Random) -> dict:
        row = self.instructions[draw.randrange(len(self.instructions))]
        turns = [(ANSWER_PROMPT.format(question), answer) for question, answer in row["turns"]]
        parts = self.sequences.reading(turns)
        images = [row["images"]] if "images" in row else []
        return self.sequences.sample(position, parts if images else parts[1:], images, [False] * len(images))


class SourceSampleList(SourceSamples, torch.utils.data.Dataset):
    """[`SourceSamples`] of a source with random access; a sample is the same for the same seed, epoch and position."""

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        epoch = self.images.epoch
        others = random.Random(f"others {self.seed} {epoch} {index}")
        chosen = [index, *(others.randrange(len(self)) for _ in range(self.images_per_sample - 1))]
        items = (self.images[i] for i in chosen)
        return self.sample(index, epoch, lambda: next(items))


class SourceSampleStream(SourceSamples, torch.utils.data.IterableDataset):
    """[`SourceSamples`] of a streamed source."""

    def __iter__(self):
        items = iter(self.images)
        for item in items:
            following = itertools.chain([item], items, itertools.repeat(item))  # again, where the source ends
            yield self.sample(item["position"], self.images.epoch, following.__next__)
