"""The pages of the documentation and what stands in their code blocks."""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("docs/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md"))]
    if path.is_file()
)


@dataclass
class Block:
    """A fenced block: its page and line, its text, and why it is not run (where a comment before it says so)."""

    where: str
    text: str
    not_run: str | None


def blocks(page: str, language: str) -> list[Block]:
    content = (ROOT / page).read_text()
    pattern = rf"(?:<!-- not run: ([^\n]*?) -->\n)?^```{language}\n(.*?)^```$"
    return [
        Block(f"{page}:{content[: match.start(2)].count(chr(10)) + 1}", match[2], match[1])
        for match in re.finditer(pattern, content, re.S | re.M)
    ]


def commands(page: str) -> list[tuple[str, str]]:
    """Where each command of a page's bash blocks stands, and the command; a backslash goes on in the next line."""
    found = []
    for block in blocks(page, "bash"):
        file, line = block.where.split(":")
        for number, text in enumerate(re.sub(r"\\\n\s*", " ", block.text).splitlines()):
            command = re.sub(r"(^|\s+)#.*", "", text).strip()
            if command:
                found.append((f"{file}:{int(line) + number}", command))
    return found
