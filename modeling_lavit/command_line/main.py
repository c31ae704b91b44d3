"""The parser of `lavit`, and how it is run.

Nothing heavy is imported before arguments are read and files are found, so that `--help` and mistakes answer at once.
"""

import argparse
import importlib
import logging
import os
import select
import sys
import warnings

from . import app, draw, publish, read, search, serve, tokenize
from .common import Parser, one_line


EPILOG = """\
examples:
  lavit generate "red apple" -o apple.png
  lavit generate "in flat style" --style-image apple.png -o flat.png
  lavit caption apple.png
  lavit ask apple.png "which style is this?"
  lavit tokenize apple.png --show kept.png

Images are files (first frame of an animation), http(s) addresses, or - for stdin; file names that begin with a dash
follow --. Every subcommand has its own --help. Results go to stdout, progress to stderr.
Errors are one line on stderr and exit code 2; LAVIT_TRACEBACK=1 shows where they come from.
"""

# subcommand -> (module with main(arguments), help); a name with a dot in front is of this package
DELEGATED = {
    "train": (".train", "train one stage from a recipe; `train emoji`: the embedded checkpoint, all its steps"),
    "evaluate": (
        ".evaluate",
        "score captions, answers, drawings, visual tokens or retrieval, of a model or from files",
    ),
    "show": ("modeling_lavit.evaluation.show", "show codes, kept patches, reconstructions"),
    "convert": (
        "modeling_lavit.conversion.__main__",
        "turn an official checkpoint directory into a Hub folder",
    ),
}


def build_parser() -> Parser:
    """All subcommands; `parse_args(...).run(options)` runs one."""
    parser = Parser(
        prog="lavit",
        description="LaVIT: one model that reads images and draws them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run, help: str, description: str, example: str, loads_model: bool = True) -> Parser:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{description}\n\nexample:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        if not loads_model:
            return command
        command.add_argument(
            "--model",
            metavar="PATH_OR_REPO",
            help="checkpoint folder, or repository on the Hub (default: the embedded checkpoint lavit-emoji)",
        )
        command.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
        return command

    for topic in (draw, read, tokenize, app, serve, search, publish):
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
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            return _run(arguments)
    finally:
        _end_stdout()


def _run(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in DELEGATED:
            name = DELEGATED[arguments[0]][0]
            code = importlib.import_module(name, __package__).main(arguments[1:]) or 0
        else:
            options = build_parser().parse_args(arguments)
            code = options.run(options) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 0
        if os.environ.get("LAVIT_TRACEBACK"):
            raise
        print(f"lavit: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return code


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as in `lavit ... | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end_stdout() -> None:
    """Writes what is left; what cannot be written goes nowhere, instead of into an error at the interpreter's end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
