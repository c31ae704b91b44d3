"""`lavit search`: the images of a folder, the most fitting ones first."""

import argparse
from pathlib import Path

from .common import model_source, non_empty_text, positive_number


def add_commands(add) -> None:
    """Adds the subcommand; `add` is that of [`build_parser`]."""
    command = add(
        "search",
        search,
        help="rank the images of a folder for a text",
        description="Prints the images of a folder that a text describes best, each with the log-likelihood of the "
        "text as its caption.",
        example='lavit search "a red apple" images --top 5',
    )
    command.add_argument("text", type=non_empty_text, help="what to look for")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images, subfolders included")
    command.add_argument("--top", type=positive_number, default=10, metavar="N", help="images to print (default: 10)")


def search(options: argparse.Namespace):
    """`lavit search`"""
    if not options.folder.is_dir():
        raise ValueError(f"there is no folder at {options.folder}")
    from modeling_lavit.evaluation.retrieval import TextScorer
    from modeling_lavit.evaluation.retrieval import search as rank
    from modeling_lavit.evaluation.tokens import token_items

    paths = [Path(item["image"]) for item in token_items(options.folder)]
    reader = TextScorer(model_source(options), options.device, texts=[options.text])
    ranked = rank(paths, reader)
    if not ranked:
        raise ValueError(f"no image of {options.folder} can be read")
    for score, path in ranked[: options.top]:
        print(f"{score:.2f}\t{path}")
