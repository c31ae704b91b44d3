"""Images that explain a checkpoint, as PNG files: `lavit show KIND`."""

import argparse
from pathlib import Path

from PIL import Image

from ..command_line.common import (
    Parser,
    check_outputs,
    load_pipeline,
    load_reader,
    positive_number,
    save_images,
    seed_number,
)


COLOURS = 256  # of a sheet, which keeps its file small


def build_parser() -> Parser:
    """`parse_args(...).run(options)` returns the image."""
    parser = Parser(prog="lavit show", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    def add(name: str, run, description: str, example: str) -> Parser:
        kind = kinds.add_parser(
            name,
            help=description,
            description=f"Shows {description}.\n\nexample:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        kind.set_defaults(run=run)
        kind.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="PNG file to write")
        kind.add_argument(
            "--model",
            metavar="PATH_OR_REPO",
            help="checkpoint folder, or repository on the Hub (default: the embedded checkpoint lavit-emoji)",
        )
        return kind

    def add_of_images(name: str, run, description: str, example: str, count: int | None, size: int) -> Parser:
        kind = add(name, run, description, example)
        kind.add_argument(
            "--data", nargs="+", required=True, metavar="FOLDER_OR_IMG", help="images, or folders of them"
        )
        kind.add_argument(
            "--count",
            type=positive_number,
            default=count,
            help=f"number of images, chosen at random (default: {count or 'all'})",
        )
        kind.add_argument("--seed", type=seed_number, default=0, help="of the random choices (default: 0)")
        kind.add_argument(
            "--size", type=positive_number, default=size, help=f"side of an image in pixels (default: {size})"
        )
        kind.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
        return kind

    kind = add_of_images(
        "codebook",
        codebook,
        "what codes stand for: the patches closest to each, with their surroundings",
        "lavit show codebook --data data/emoji -o codes.png --top 12",
        count=None,
        size=70,
    )
    which = kind.add_mutually_exclusive_group()
    which.add_argument("--codes", nargs="+", type=int, metavar="CODE", help="codes to show")
    which.add_argument(
        "--top", type=positive_number, default=12, help="show this many, the most used ones (default: 12)"
    )
    add_of_images(
        "reconstructions",
        reconstructions,
        "images beside what is drawn from their visual tokens alone",
        "lavit show reconstructions --data data/emoji -o reconstructions.png --count 12",
        count=12,
        size=96,
    )
    kind = add_of_images(
        "kept",
        kept,
        "images beside their kept patches",
        "lavit show kept --data data/emoji -o kept.png --count 12",
        count=12,
        size=96,
    )
    kind.add_argument(
        "--keep-ratio",
        type=float,
        metavar="R",
        help="keep this share of the patches, the most probable ones (default: what the checkpoint's selector keeps)",
    )
    return parser


def codebook(options: argparse.Namespace) -> Image.Image:
    """`lavit show codebook`"""
    from .sheets import codebook_sheet, find_images

    paths = find_images(options.data, options.count, options.seed)
    model, processor = load_reader(options)
    tokenizer, prepare = model.model.visual_tokenizer, processor.image_processor
    return codebook_sheet(tokenizer, prepare, paths, options.codes, options.top, size=options.size).quantize(COLOURS)


def reconstructions(options: argparse.Namespace) -> Image.Image:
    """`lavit show reconstructions`"""
    from .sheets import find_images, reconstructions_sheet

    paths = find_images(options.data, options.count, options.seed)
    return reconstructions_sheet(load_pipeline(options), paths, options.seed, options.size).quantize(COLOURS)


def kept(options: argparse.Namespace) -> Image.Image:
    """`lavit show kept`"""
    from .sheets import find_images, kept_sheet

    paths = find_images(options.data, options.count, options.seed)
    model, processor = load_reader(options)
    tokenizer, prepare = model.model.visual_tokenizer, processor.image_processor
    return kept_sheet(tokenizer, prepare, paths, options.keep_ratio, options.size).quantize(COLOURS)


def main(arguments: list[str] | None = None) -> None:
    """Makes one image; errors are those of the command `lavit`."""
    options = build_parser().parse_args(arguments)
    if options.output.suffix.lower() != ".png":
        raise ValueError(f"{options.output} has not the ending .png")
    check_outputs([options.output])
    save_images([options.run(options)], [options.output])
