"""The core knows no emoji: arrows run only from the emoji's folders into the others."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling_lavit", "processing", "conversion", "training", "evaluation")
CORE = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "emoji" not in path.relative_to(ROOT).parts
]


def imported(path: Path) -> list[str]:
    """Everything that a file imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_nothing_of_the_emoji(path):
    assert not [name for name in imported(path) if "emoji" in name.split(".")]


def test_the_core_of_training_speaks_of_no_emoji():
    """But for the name of the embedded checkpoint."""
    files = [path for path in (ROOT / "training").rglob("*.*") if "emoji" not in path.relative_to(ROOT).parts]
    for path in files:
        if path.suffix in (".py", ".yaml"):
            text = path.read_text().replace("lavit-emoji", "").replace("LAVIT_EMOJI", "")
            assert "emoji" not in text.lower(), path


def test_imports_are_absolute():
    for path in (ROOT / "training").rglob("*.py"):
        relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, path
