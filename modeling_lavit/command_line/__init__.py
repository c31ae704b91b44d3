"""The command `lavit`: draw, caption, ask, tokenize, reconstruct, train, evaluate, convert."""

from .main import DELEGATED, build_parser, main


__all__ = ["DELEGATED", "build_parser", "main"]
