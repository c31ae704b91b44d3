"""The documents as HTML: `make docs`."""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "LaVIT"
author = "the LaVIT-HF authors"
release = version = re.search(r'version="(.*?)"', (ROOT / "setup.py").read_text()).group(1)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"LaVIT {release}"
html_show_copyright = False
html_show_sourcelink = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_param = False


def markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are Markdown: fenced code and `code` as reStructuredText has them."""
    text = re.sub(r"\[`~?(.*?)`\](?:\(.*?\))?", r"`\1`", "\n".join(lines))
    parts = re.split(r"^( *)```python\n(.*?)^ *```$", text, flags=re.S | re.M)
    result = []
    for prose, indent, code in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True):
        result.append(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", prose).replace("**", r"\*\*").replace("|", r"\|"))
        if code:
            shown = "\n".join(f"   {line}" for line in code.splitlines())
            result.append(f"{indent}.. code-block:: python\n\n{shown}\n\n")
    lines[:] = "".join(result).splitlines()


def write_recipe_fields(app) -> None:
    """Tables that training.md includes."""
    from recipe_fields import markdown

    folder = Path(app.srcdir) / "_build"
    folder.mkdir(exist_ok=True)
    (folder / "recipe_fields.md").write_text(markdown(), encoding="utf-8")


def setup(app) -> None:
    app.connect("builder-inited", write_recipe_fields)
    # before napoleon, which reads what comes out of it
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)
