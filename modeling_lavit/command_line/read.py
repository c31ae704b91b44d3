"""`lavit caption` and `lavit ask`."""

import argparse
import sys

from .common import load_reader, non_empty_text, one_line, read_image


def add_commands(add) -> None:
    """Adds the subcommands of this file; `add` is that of [`build_parser`]."""
    command = add(
        "caption",
        caption,
        help="describe images in words",
        description="Describes images in words, one line for each.",
        example="lavit caption apple.png cat.png",
    )
    command.add_argument("images", nargs="+", metavar="IMG", help="images")

    command = add(
        "ask",
        ask,
        help="answer a question about an image",
        description='Answers a question about an image. The model reads "Question: ... Answer:".',
        example='lavit ask apple.png "which style is this?"',
    )
    command.add_argument("image", metavar="IMG", help="an image")
    command.add_argument("question", type=non_empty_text, help="the question")


def caption(options: argparse.Namespace):
    """`lavit caption`"""
    from tqdm import tqdm

    images = [read_image(source) for source in options.images]
    model, processor = load_reader(options)
    progress = tqdm(images, disable=len(images) == 1, desc="captions")
    for source, image in zip(options.images, progress, strict=True):
        inputs = processor(images=image)
        ids = model.generate(**inputs, generation_preset="caption")
        text = one_line(processor.post_process_caption(ids, input_ids=inputs.input_ids)[0])
        tqdm.write(text if len(images) == 1 else f"{source}: {text}")
        sys.stdout.flush()


def ask(options: argparse.Namespace):
    """`lavit ask`"""
    image = read_image(options.image)
    model, processor = load_reader(options)
    inputs = processor(images=image, text=f"<image>Question: {options.question} Answer:")
    ids = model.generate(**inputs, generation_preset="answer")
    print(one_line(processor.post_process_answer(ids, input_ids=inputs.input_ids)[0]))
