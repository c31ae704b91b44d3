"""Every Python snippet in README and docs/ runs, a page's snippets one after the other."""

import ast
import importlib
import shutil

import pytest
from documents import PAGES, ROOT, blocks

from modeling_lavit import LavitPipeline
from modeling_lavit.conversion.convert import convert


SNIPPETS = {page: blocks(page, "python") for page in PAGES}
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the snippets run: with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    images = FIXTURES / "emoji" / "images"
    shutil.copyfile(images / "flat" / "red-apple.png", folder / "apple.png")
    shutil.copyfile(images / "noto" / "cat-face.png", folder / "cat.png")
    my_images = folder / "my_images"
    my_images.mkdir()
    rows = []
    for name in ("red-apple", "sunflower", "pizza", "owl"):
        shutil.copyfile(images / "emojitwo" / f"{name}.png", my_images / f"{name}.png")
        rows.append(f'{{"file_name": "{name}.png", "text": "a {name.replace("-", " ")}"}}\n')
    (my_images / "metadata.jsonl").write_text("".join(rows))
    convert(FIXTURES / "e2e" / "checkpoint", folder / "lavit-7b-v2")
    return folder


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets])
def test_the_snippets_of_a_page_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(LavitPipeline, "_progress_bar_config", {"disable": True}, raising=False)
    names = {"__name__": "__main__"}
    for snippet in SNIPPETS[page]:
        # a traceback shows the line of the page
        tree = ast.parse(snippet.text)
        ast.increment_lineno(tree, int(snippet.where.split(":")[1]) - 1)
        code = compile(tree, str(ROOT / page), "exec")
        if snippet.not_run is None:
            exec(code, names)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("modeling_lavit"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), snippet.where
