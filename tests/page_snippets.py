"""Runs what a page of the documentation shows, as a reader would: one block after the other, in one session."""

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TITLED = re.compile(r"^```(\w+) title=\"([^\"]+)\"\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[str]:
    """The Python blocks of a page, each behind as many empty lines as make its line numbers those of the page."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in BLOCK.finditer(text)]


def run(page: Path) -> dict[str, Any]:
    """All names that the blocks of a page leave behind."""
    names: dict[str, Any] = {"__name__": page.stem}
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), names)  # the pages are part of this repository
    return names


class Titled(NamedTuple):
    """A block with a title: code of a file, or a change of it."""

    language: str
    title: str
    text: str


def titled(page: Path) -> list[Titled]:
    """The blocks of a page that have a title."""
    return [Titled(*found) for found in TITLED.findall(page.read_text(encoding="utf-8"))]
