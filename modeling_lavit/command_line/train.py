"""`lavit train`: one stage from a recipe, or every step of the embedded checkpoint."""

import importlib


EMOJI = "modeling_lavit.training.emoji.checkpoint"


def main(arguments: list[str]) -> None:
    """Trains; errors are those of the command `lavit`."""
    name = EMOJI if arguments[:1] == ["emoji"] else "modeling_lavit.training.run"
    importlib.import_module(name).main(arguments[1:] if name == EMOJI else arguments)
