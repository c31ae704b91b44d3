"""`lavit generate` and `lavit reconstruct`."""

import argparse
import os
import sys
from pathlib import Path

from .common import (
    add_decoding_options,
    add_keep_dial,
    check_outputs,
    decoding_options,
    generators,
    keep_options,
    load_pipeline,
    non_empty_text,
    positive_number,
    read_image,
    save_images,
    seed_number,
)


def add_commands(add) -> None:
    """Adds the subcommands of this file; `add` is that of [`build_parser`]."""
    command = add(
        "generate",
        generate,
        help="draw images from text, or from an image and text",
        description="Draws images from text, or from an image and text, and prints the names of the files.",
        example='lavit generate "red apple" -o apple.png --n 4 --seed 7',
    )
    command.add_argument("prompt", type=non_empty_text, help="what to draw")
    command.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write; with --n 4 NAME-0.png to NAME-3.png"
    )
    command.add_argument(
        "--style-image", metavar="IMG", help='an image in front of the text, for prompts like "in flat style"'
    )
    command.add_argument("--n", type=positive_number, default=1, help="number of images (default: 1)")
    command.add_argument(
        "--seed",
        type=seed_number,
        help="image i is drawn with seed + i, whatever --n is (default: a new one, which is printed)",
    )
    command.add_argument(
        "--aspect-ratio", metavar="W:H", help="such as 16:9; the checkpoint says which it has (default: its own size)"
    )
    add_decoding_options(command)
    command.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="how closely the language model follows the prompt; 1 is no guidance (default: the checkpoint's)",
    )

    command = add(
        "reconstruct",
        reconstruct,
        help="turn an image into visual tokens and back",
        description="Draws an image again from its visual tokens alone, which shows what they keep.",
        example="lavit reconstruct apple.png -o again.png",
    )
    command.add_argument("image", metavar="IMG", help="an image")
    command.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    command.add_argument("--seed", type=seed_number, default=0, help="of the noise (default: 0)")
    add_keep_dial(command)
    add_decoding_options(command)


def generate(options: argparse.Namespace):
    """`lavit generate`"""
    outputs = [options.output]
    if options.n > 1:
        outputs = [options.output.with_stem(f"{options.output.stem}-{i}") for i in range(options.n)]
    check_outputs(outputs)
    style_image = read_image(options.style_image) if options.style_image else None
    pipe = load_pipeline(options)
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    images = pipe(
        options.prompt if style_image is None else [style_image, options.prompt],
        num_images_per_prompt=options.n,
        generator=generators(seed, options.n),
        guidance_scale=options.guidance_scale,
        aspect_ratio=options.aspect_ratio,
        **decoding_options(options),
    ).images
    save_images(images, outputs, options.enlarge)
    if options.seed is None:
        print(f"drawn with --seed {seed}", file=sys.stderr)


def reconstruct(options: argparse.Namespace):
    """`lavit reconstruct`"""
    check_outputs([options.output])
    image = read_image(options.image)
    pipe = load_pipeline(options)
    images = pipe.reconstruct(
        image, generator=generators(options.seed, 1), **keep_options(options), **decoding_options(options)
    ).images
    save_images(images, [options.output], options.enlarge)
