"""Command line of the conversion: `python -m modeling_lavit.conversion --help`."""

import argparse
import os
import sys

from modeling_lavit.command_line.common import Parser


DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Converts an official LaVIT checkpoint directory into a folder that transformers and diffusers load.

The directory is that of rain1011/LaVIT-7B or -7B-v2: visual_tokenizer/, language_model/, and pixel_decoding/ or
highres_pixel_decoding/. The folder appears whole at the end, or not at all. Errors are one line, exit code 2."""


def build_parser() -> argparse.ArgumentParser:
    """The arguments, see `--help`."""
    parser = Parser(
        prog="lavit convert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("official", metavar="OFFICIAL_DIR", help="the downloaded checkpoint")
    parser.add_argument("output", metavar="OUT_DIR", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision of the written weights (default: as in the checkpoint)"
    )
    parser.add_argument(
        "--pixel-decoder",
        choices=("highres", "lowres", "both", "none"),
        help="which decoders to convert; of both, the smaller one is in OUT_DIR/lowres (default: those present)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="IMAGES",
        help="a folder of images: where none of their codes changes by it, the merger computes kept patches alone",
    )
    parser.add_argument("--push-to", metavar="REPO", help="also upload the folder to this repository on the Hub")
    parser.add_argument(
        "--language-model", metavar="NAME", default="language_model", help="its folder (default: language_model)"
    )
    heads = "which weights do not tell (default: 16, or those of the language model if the width is not 1408)"
    parser.add_argument("--encoder-heads", type=int, metavar="N", help=f"attention heads of the vision tower, {heads}")
    parser.add_argument("--heads", type=int, metavar="N", help=f"of the merger and the decoders, {heads}")
    parser.add_argument(
        "--ignore-extra-keys",
        action="store_true",
        help="leave out unknown weights in tokenizer_encoder and visual_weight instead of stopping",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interrupt.
    """
    options = build_parser().parse_args(argv)
    import diffusers
    import torch
    import transformers

    from modeling_lavit.saving_lavit import upload

    from .convert import convert

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    try:
        convert(
            options.official,
            options.output,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            pixel_decoder=options.pixel_decoder,
            encoder_heads=options.encoder_heads,
            heads=options.heads,
            language_model=options.language_model,
            ignore_extra_keys=options.ignore_extra_keys,
            calibration=options.calibrate,
        )
        if options.push_to:
            print(upload(options.output, options.push_to, commit_message="Convert LaVIT"))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LAVIT_TRACEBACK"):
            raise
        print(f"lavit convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
