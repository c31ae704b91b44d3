"""Every command in README and docs/ is accepted by the parser that would read it."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import sys
from urllib.parse import urlsplit

import pytest
from documents import PAGES, ROOT, commands

from modeling_lavit.command_line.main import main as lavit


COMMANDS = [(where, command) for page in PAGES for where, command in commands(page)]
# what other projects' documents explain
FOREIGN = {"cd", "export", "git", "hf", "mkdir", "source"}
# modules that take file names as they stand
WITHOUT_PARSER = ("modeling_lavit.evaluation.table", "modeling_lavit.evaluation.emoji.table")


class Parsed(BaseException):
    """The arguments were read: the command would begin its work."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    """Commands stop when their arguments are read, training when its recipe is."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments, **kwargs):
        options = parse_args(parser, *arguments, **kwargs)
        if parser.prog.startswith("lavit train"):
            return options
        raise Parsed

    def stop(*arguments, **kwargs):
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    training = importlib.import_module("modeling_lavit.training.run")
    monkeypatch.setattr(training, "run", stop)
    monkeypatch.chdir(ROOT)


def check_module(name: str, arguments: list[str], monkeypatch) -> None:
    if not name.startswith(("modeling_lavit", "benchmarks")):
        # vLLM has an environment of its own, in which tests/vllm_plugin starts it
        assert name.startswith("vllm.") or importlib.util.find_spec(name)
        return
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    if name in WITHOUT_PARSER:
        return
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    takes_arguments = module.main.__code__.co_argcount > 0
    with pytest.raises(Parsed):
        module.main(arguments) if takes_arguments else module.main()


def check_make(arguments: list[str]) -> None:
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] in ("install", "uninstall")
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            assert re.search(rf'^ +"{extra}": \[', (ROOT / "setup.py").read_text(), re.M), extra


def check_curl(arguments: list[str]) -> None:
    (address,) = (word for word in arguments if word.startswith("http"))
    sources = "".join(path.read_text() for path in (ROOT / "modeling_lavit" / "serving").glob("*.py"))
    routes = re.findall(r'@router\.(?:get|post)\("(.*?)"', sources)
    assert urlsplit(address).path in routes
    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag == "-d":
            assert json.loads(value)


def check_python(arguments: list[str], monkeypatch) -> None:
    if arguments[0] == "-m":
        return check_module(arguments[1], arguments[2:], monkeypatch)
    assert (ROOT / arguments[0]).is_file()


def check_launcher(program: str, arguments: list[str], monkeypatch) -> None:
    """torchrun and accelerate launch, and the module that they start."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser as launcher
    else:
        from accelerate.commands.launch import launch_command_parser as launcher

        assert arguments.pop(0) == "launch"
    options, unknown = launcher().parse_known_args(arguments)
    assert not unknown and options.module
    check_module(options.training_script, options.training_script_args, monkeypatch)


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_a_command_is_one_that_its_program_takes(where, command, stops_when_parsed, monkeypatch):
    words = shlex.split(re.split(r" (?:&|\||>) ?", command)[0])
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "lavit":
        with pytest.raises(Parsed):
            raise AssertionError(f"exit code {lavit(arguments)}")
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "curl":
        check_curl(arguments)
    elif program == "python":
        check_python(arguments, monkeypatch)
    elif program in ("torchrun", "accelerate"):
        check_launcher(program, arguments, monkeypatch)
    elif program == "serve":  # Ray Serve's own command
        if arguments[0] == "deploy":
            assert arguments[1].endswith(".yaml") and (ROOT / arguments[1]).is_file()
            return
        module, name = arguments[1].split(":")
        assert arguments[0] == "run" and hasattr(importlib.import_module(module), name)
    else:
        assert program in FOREIGN
