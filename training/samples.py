"""What a language model is trained on: pictures and texts as sequences of ids (paper section 3.2).

A sample is `{"position": int, "ids": list, "labels": list, "pictures": [(3, S, S) uint8], "drawn": [bool],
"close": bool}`. A picture
is an empty slot `[IMG][/IMG]` among the ids: what is read becomes continuous features there, what is drawn (or read as
codes, to draw another) becomes its codes, with a loss where the slot's `[/IMG]` has one. The pictures of a sample that
is `close` are augmented closely: it asks how they are drawn.
"""

import random
from collections import defaultdict

import torch

from ..modeling_lavit import IGNORED_LABEL
from ..processing import LavitProcessor
from .data import PictureDataset
from .guided import GuidedPictures
from .imagined import ImaginedPicture
from .text import ANSWER_PROMPT, drawing_prompt, question_prompt, restyling_prompt


class Sequences:
    """Builds the parts of samples.

    Args:
        processor: of the model.
        prompt_dropout: share of drawing prompts that are dropped, which trains the unconditional stream of guidance,
            the single token `[IMG]`.
    """

    def __init__(self, processor: LavitProcessor, prompt_dropout: float):
        self.processor, self.prompt_dropout = processor, prompt_dropout
        self.boi, self.eoi = processor.boi_token_id, processor.eoi_token_id
        self.eos = processor.tokenizer.eos_token_id

    def text(self, text: str) -> list[int]:
        """The ids of a text, in which `[IMG]` is a word like others."""
        return self.processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def codes(self, codes: torch.Tensor) -> list[int]:
        """The ids of codes (n,).

        Raises:
            ValueError: the model has no such code.
        """
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.processor.codebook_size:
            raise ValueError(
                f"the source has codes from {int(codes.min())} to {int(codes.max())}, the model's codebook has "
                f"{self.processor.codebook_size}: they are of another tokenizer"
            )
        return (codes + self.processor.visual_offset).tolist()

    @staticmethod
    def sample(position: int, parts: list[tuple[list[int], bool]], pictures=(), drawn=(), close: bool = False) -> dict:
        """Joins parts, each with whether it is learnt."""
        ids = [i for part, _ in parts for i in part]
        labels = [i if learnt else IGNORED_LABEL for part, learnt in parts for i in part]
        slots = {"pictures": list(pictures), "drawn": list(drawn), "close": close}
        return {"position": position, "ids": ids, "labels": labels, **slots}

    def reading(self, turns: list[tuple[str, str]]) -> list[tuple[list[int], bool]]:
        """A picture, then prompts and their answers; an empty prompt before a caption."""
        parts = [([self.boi, self.eoi], False)]
        for prompt, answer in turns:
            parts += [(self.text(prompt) if prompt else [], False), ([*self.text(answer), self.eos], True)]
        return parts

    def drawing(self, prompt: list[int], codes: list[int], draw: random.Random) -> list[tuple[list[int], bool]]:
        """A prompt, then a picture as codes; no codes where they are not known yet. Now and then no prompt."""
        if draw.random() < self.prompt_dropout:
            return [([self.boi], False), ([*codes, self.eoi, self.eos], True)]
        return [(prompt, False), ([self.boi, *codes, self.eoi, self.eos], True)]


def check_mixture(mixture: dict[str, float], tasks: tuple[str, ...]) -> None:
    """Refuses tasks that the data do not have.

    Raises:
        ValueError: a task is unknown, or all probabilities are zero.
    """
    if unknown := sorted(mixture.keys() - set(tasks)):
        raise ValueError(f"the mixture has unknown tasks {unknown}; these data have {list(tasks)}")
    if not sum(mixture.values()) > 0:
        raise ValueError(f"the mixture needs a probability above 0, got {mixture}")


def collate_samples(items: list[dict]) -> dict[str, torch.Tensor | None]:
    """Right-padded ids, labels and mask (B, L); the pictures (P, 3, S, S) in order, the sample that each belongs to,
    whether it is drawn, and whether closely augmented, (P,)."""
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
    pictures = [picture for item in items for picture in item["pictures"]]
    owners = [row for row, item in enumerate(items) for _ in item["pictures"]]
    return batch | {
        "owner": torch.tensor(owners, dtype=torch.long),
        "drawn": torch.tensor([drawn for item in items for drawn in item["drawn"]], dtype=torch.bool),
        "close": torch.tensor([items[row]["close"] for row in owners], dtype=torch.bool),
        "pictures": torch.stack(pictures) if pictures else None,
    }


class PictureSamples(torch.utils.data.Dataset):
    """Draws a task for each picture with a name and a style anew in every epoch, the same one for the same seed, epoch
    and position.

    Args:
        pictures: of one split.
        codes: each picture's visual codes: those of itself, and of views of it that are as good.
        processor: of the model.
        mixture: probabilities of `caption`, `style_question`, `name_question`, which read a picture as features;
            `code_caption`, `code_style_question`, which read it as codes; `draw`; `restyle`, which reads codes and
            draws.
        prompt_dropout: see [`Sequences`].
        seed: of the run.
        imagined: pictures that a model drew, see [`imagine`].
        imagined_share: of the samples that draw, how many have one of them as their target.
        guided: blends that guides named, see [`blend_and_name`].
        guided_share: of the captions, how many are of one of them.
    """

    collate = staticmethod(collate_samples)
    tasks = ("caption", "style_question", "name_question", "code_caption", "code_style_question", "draw", "restyle")

    def __init__(
        self,
        pictures: PictureDataset,
        codes: list[list[torch.Tensor]],
        processor: LavitProcessor,
        mixture: dict[str, float],
        prompt_dropout: float,
        seed: int = 0,
        imagined: list[ImaginedPicture] | None = None,
        imagined_share: float = 0.0,
        guided: GuidedPictures | None = None,
        guided_share: float = 0.0,
    ):
        check_mixture(mixture, self.tasks)
        self.pictures, self.codes, self.mixture = pictures, codes, mixture
        self.imagined, self.imagined_share = imagined or [], imagined_share
        self.guided, self.guided_share = guided, guided_share
        self.sequences = Sequences(processor, prompt_dropout)
        self.seed, self.epoch = seed, 0
        self.same_name = defaultdict(list)
        for index, name in enumerate(pictures.name.tolist()):
            self.same_name[name].append(index)

    def __len__(self) -> int:
        return len(self.pictures)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer's data loader before each epoch."""
        self.epoch = epoch

    def code_ids(self, index: int, draw: random.Random) -> list[int]:
        """The ids of the codes of one view of a picture."""
        return self.sequences.codes(draw.choice(self.codes[index]))

    def __getitem__(self, position: int) -> dict:
        index = self.pictures.order[position]
        draw = random.Random(f"{self.seed} {self.epoch} {position}")
        task = draw.choices(list(self.mixture), self.mixture.values())[0]
        name = self.pictures.names[self.pictures.name[index]]
        style = self.pictures.styles[self.pictures.style[index]]
        sequences = self.sequences
        if task == "caption" and self.guided is not None and draw.random() < self.guided_share:
            blend = draw.randrange(len(self.guided.name))
            turn = ("", self.pictures.names[self.guided.name[blend]])
            return sequences.sample(position, sequences.reading([turn]), [self.guided.pictures[blend]], [False])
        if task in ("caption", "style_question", "name_question"):
            turn = {
                "caption": ("", name),
                "style_question": (question_prompt(draw, "style"), style),
                "name_question": (question_prompt(draw, "name"), name),
            }[task]
            picture, close = self.pictures.pictures[index], task == "style_question"
            return sequences.sample(position, sequences.reading([turn]), [picture], [False], close)
        if task in ("code_caption", "code_style_question"):
            prompt, answer = [sequences.boi, *self.code_ids(index, draw), sequences.eoi], name
            if task == "code_style_question":
                prompt, answer = prompt + sequences.text(question_prompt(draw, "style")), style
            return sequences.sample(position, [(prompt, False), ([*sequences.text(answer), sequences.eos], True)])
        number = int(self.pictures.name[index])
        if self.imagined and draw.random() < self.imagined_share:
            target = draw.choice(self.imagined)
            number, name, style = target.name, self.pictures.names[target.name], self.pictures.styles[target.style]
            index, codes = None, sequences.codes(target.codes)
        else:
            codes = self.code_ids(index, draw)
        prompt = sequences.text(drawing_prompt(draw, name, style))
        sources = [i for i in self.same_name[number] if i != index]
        if task == "restyle" and sources:
            source = [sequences.boi, *self.code_ids(draw.choice(sources), draw), sequences.eoi]
            prompt = source + sequences.text(restyling_prompt(draw, style))
        return sequences.sample(position, sequences.drawing(prompt, codes, draw))


class SourceSamples:
    """Samples of pictures with texts from any source, of text alone, and of instructions.

    Args:
        pictures: of [`load_source`], with texts; streamed or not.
        processor: of the model.
        mixture: probabilities of `caption` (`[image, text]`), `draw` (`[text; image]`), `text` (no picture) and
            `instruct`.
        prompt_dropout: see [`Sequences`].
        images_per_sample: pairs of picture and text that one sample holds, each in its own order.
        texts, instructions: of [`load_source`], not streamed: what `text` and `instruct` take rows from, at random.
        seed: of the run.
        max_length: most ids of a text without pictures, which is cut there.

    Raises:
        ValueError: a task has a probability, but no data.
    """

    collate = staticmethod(collate_samples)
    tasks = ("caption", "draw", "text", "instruct")

    def __init__(
        self,
        pictures,
        processor: LavitProcessor,
        mixture: dict[str, float],
        prompt_dropout: float,
        images_per_sample: int = 1,
        texts=None,
        instructions=None,
        seed: int = 0,
        max_length: int = 2048,
    ):
        check_mixture(mixture, self.tasks)
        columns = pictures.reader.columns
        if columns.text is None and (mixture.get("caption") or mixture.get("draw")):
            raise ValueError("which column holds the texts? Name it as data.text_column")
        if columns.image is None and mixture.get("caption"):
            raise ValueError(
                "captions need pictures, the source has codes alone (lavit tokenize --keep-images keeps them)"
            )
        if mixture.get("instruct") and instructions is not None and not instructions.reader.columns.has_turns:
            raise ValueError("instruction_data needs question_column and answer_column, or messages_column")
        for task, key, data in (("text", "text_data", texts), ("instruct", "instruction_data", instructions)):
            if mixture.get(task) and data is None:
                raise ValueError(f"the mixture has the task {task!r}, but the recipe has no {key}")
        self.sequences = Sequences(processor, prompt_dropout)
        self.pictures, self.mixture, self.images_per_sample = pictures, mixture, images_per_sample
        self.texts, self.instructions, self.seed, self.max_length = texts, instructions, seed, max_length

    def sample(self, position: int, epoch: int, take) -> dict:
        """One sample; `take()` gives the next item of `pictures`."""
        draw = random.Random(f"{self.seed} {epoch} {position}")
        task = draw.choices(list(self.mixture), self.mixture.values())[0]
        sequences = self.sequences
        if task == "text":
            ids = sequences.text(self.texts[draw.randrange(len(self.texts))]["text"])
            end = [sequences.eos] if len(ids) < self.max_length else []
            return sequences.sample(position, [([*ids[: self.max_length], *end], True)])
        if task == "instruct":
            row = self.instructions[draw.randrange(len(self.instructions))]
            parts = sequences.reading([(ANSWER_PROMPT.format(question), answer) for question, answer in row["turns"]])
            pictures = [row["pictures"]] if "pictures" in row else []
            return sequences.sample(position, parts if pictures else parts[1:], pictures, [False] * len(pictures))
        either = {key: self.mixture.get(key, 0.0) for key in ("caption", "draw")}
        parts, pictures, drawn = [], [], []
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
                pictures.append(item["pictures"])
                drawn.append(task == "draw")
        return sequences.sample(position, parts, pictures, drawn)


class SourceSampleList(SourceSamples, torch.utils.data.Dataset):
    """[`SourceSamples`] of a source with random access; a sample is the same for the same seed, epoch and position."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer's data loader before each epoch."""
        self.pictures.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict:
        epoch = self.pictures.epoch
        others = random.Random(f"others {self.seed} {epoch} {index}")
        chosen = [index, *(others.randrange(len(self)) for _ in range(self.images_per_sample - 1))]
        items = (self.pictures[i] for i in chosen)
        return self.sample(index, epoch, lambda: next(items))


class SourceSampleStream(SourceSamples, torch.utils.data.IterableDataset):
    """[`SourceSamples`] of a streamed source."""

    def __iter__(self):
        items = iter(self.pictures)
        for item in items:
            pending = [item]
            yield self.sample(
                item["position"],
                self.pictures.epoch,
                lambda pending=pending: pending.pop() if pending else next(items),
            )
