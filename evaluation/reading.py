"""A model that describes images and answers questions about them, batch by batch."""

import argparse
import re

import torch
from PIL import Image

from modeling_lavit.command_line.common import load_reader
from modeling_lavit.processing import load_image

from .answers import UNANSWERABLE


QUESTION_MARKS = re.compile(r"[.!\"()*#:;~]")
QUESTION_WORDS = 50


def open_images(items: list[dict]) -> tuple[list[Image.Image], list[int], dict[int, str]]:
    """The images that can be read, the places of their items, and what is wrong with the others."""
    images, usable, errors = [], [], {}
    for i, item in enumerate(items):
        try:
            images.append(load_image(item["image"]))
            usable.append(i)
        except (ValueError, OSError) as error:
            errors[i] = str(error)
    return images, usable, errors


class Reader:
    """Loads a checkpoint; a call gives one row for each item, `{"error": ...}` where its image is broken.

    Args:
        model: checkpoint folder or repository; the embedded checkpoint when None.
        device: of the model; a GPU where there is one when None.
        options: of the kind of reader.
    """

    def __init__(self, model: str | None = None, device: str | None = None, **options):
        self.model, self.processor = load_reader(argparse.Namespace(model=model, device=device))
        self.options = options

    @torch.no_grad()
    def __call__(self, items: list[dict]) -> list[dict]:
        images, usable, errors = open_images(items)
        rows = [{"error": errors[i]} if i in errors else {} for i in range(len(items))]
        if images:
            for i, row in zip(usable, self.read(images, [items[i] for i in usable]), strict=True):
                rows[i] = row
        return rows

    def read(self, images: list[Image.Image], items: list[dict]) -> list[dict]:
        raise NotImplementedError

    def generate(self, images: list[Image.Image], texts: list[str], preset: str):
        """Generated ids and the prompts' ids."""
        inputs = self.processor(images=images, text=texts, return_tensors="pt")
        return self.model.generate(**inputs, generation_preset=preset), inputs["input_ids"]


class CaptionReader(Reader):
    """Captions with the checkpoint's preset: 2 beams and 8 to 36 new tokens in the official ones."""

    def read(self, images: list[Image.Image], items: list[dict]) -> list[dict]:
        ids, prompts = self.generate(images, ["<image>"] * len(images), "caption")
        return [{"caption": text} for text in self.processor.post_process_caption(ids, input_ids=prompts)]


class AnswerReader(Reader):
    """Answers to "Question: ... Answer:" with the checkpoint's preset: 5 beams, 2 to 10 tokens in the official ones.

    With `protocol="lavit"` questions are cleaned and answers cut as the authors do it; and where an item says
    `ask_answerable`, the model is asked that first, and "no" makes the answer "unanswerable".
    """

    def read(self, images: list[Image.Image], items: list[dict]) -> list[dict]:
        as_lavit = self.options["protocol"] == "lavit"
        questions = [item["question"] for item in items]
        answers = self.answer(images, [clean_question(text) if as_lavit else text for text in questions], as_lavit)
        rows = [{"answer": answer} for answer in answers]
        if any(item["ask_answerable"] for item in items):
            first = [f'Is the question: "{text}" answerable?' for text in questions]
            for row, reply in zip(rows, self.answer(images, first, as_lavit), strict=True):
                row["answerable"] = 0.0 if "no" in reply.lower() else 1.0
                if not row["answerable"]:
                    row["answer"] = UNANSWERABLE
        return rows

    def answer(self, images: list[Image.Image], questions: list[str], as_lavit: bool) -> list[str]:
        texts = [f"<image>Question: {question} Answer:" for question in questions]
        ids, prompts = self.generate(images, texts, "answer")
        return self.processor.post_process_answer(ids, input_ids=prompts, reference_compat=as_lavit)


def clean_question(question: str) -> str:
    """A question as the authors' scripts give it: lower case, without some marks, 50 words at most."""
    return " ".join(QUESTION_MARKS.sub("", question.lower()).rstrip(" ").split(" ")[:QUESTION_WORDS])
