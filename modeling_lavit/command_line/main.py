"""The parser of `lavit`, and how it is run.

Nothing heavy is imported before arguments are read and files are found, so that `--help` and mistakes answer at once.
"""

import argparse
import importlib
import os
import sys

from . import app, draw, read, search, serve, tokenize
from .common import Parser, one_line


EPILOG = """\
examples:
  lavit generate "red apple" -o apple.png
  lavit generate "in flat style" --style-image apple.png -o flat.png
  lavit caption apple.png
  lavit ask apple.png "which style is this?"
  lavit tokenize apple.png --show kept.png

Pictures are files (first frame of an animation) or http(s) addresses. Every subcommand has its own --help.
Errors are one line on stderr and exit code 2; LAVIT_TRACEBACK=1 shows where they come from.
"""

# subcommand -> (module with main(arguments), help); a name with a dot in front is of this package
DELEGATED = {
    "train": ("modeling_lavit.training.run", "train one stage from its recipe file"),
    "evaluate": (".evaluate", "score captions, answers, drawings, visual tokens; of a model or from files"),
    "show": ("modeling_lavit.evaluation.show", "show codes, kept patches, reconstructions"),
    "convert": (
        "modeling_lavit.conversion.__main__",
        "turn an official checkpoint directory into one that loads",
    ),
}


def build_parser() -> Parser:
    """All subcommands; `parse_args(...).run(options)` runs one."""
    parser = Parser(
        prog="lavit",
        description="LaVIT: one model that reads pictures and draws them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run, help: str, description: str, example: str) -> Parser:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{description}\n\nexample:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--model",
            metavar="PATH_OR_REPO",
            help="checkpoint folder, or repository on the Hub (default: the embedded checkpoint lavit-emoji)",
        )
        command.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
        return command

    for topic in (draw, read, tokenize, app, serve, search):
        topic.add_commands(add)
    for name, (_, help) in DELEGATED.items():
        commands.add_parser(name, help=f"{help} (lavit {name} --help)", add_help=False)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # libraries read these when they are imported; they warn about packages that are not needed here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        if arguments and arguments[0] in DELEGATED:
            return importlib.import_module(DELEGATED[arguments[0]][0], __package__).main(arguments[1:]) or 0
        options = build_parser().parse_args(arguments)
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LAVIT_TRACEBACK"):
            raise
        print(f"lavit: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0
