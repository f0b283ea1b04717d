"""Markdown pages as blocks of code, with the one convention by which a block is not executed.

    <!-- not executed: needs the hub -->       a comment right before the block, with the reason
    ```yaml title="my.yaml"                    a block with a title is a file: the reader saves it, the test writes it

Blocks of `sh` and `python` are executed, in the order of the page; those of one page share a folder and a Python namespace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w-]*)(?P<info>[^`]*)$")
_REASON = re.compile(r"^\s*<!-- not executed: (?P<reason>.+) -->$")
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block: `line` is that of its first line of code, counted from 1."""

    page: Path
    line: int
    language: str
    title: str
    reason: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its commands, one a line: continued lines are joined, comments and blank lines left out."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines) if line]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    found, fence, start, before = [], None, 0, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if fence is None:
            fence = _FENCE.match(line)
            start = number + 1
            if fence is None and line.strip():
                before = line
        elif line.strip() == fence["ticks"]:
            code = "\n".join(text.removeprefix(fence["indent"]) for text in lines[start - 1 : number - 1]) + "\n"
            reason, title = _REASON.match(before), _TITLE.search(fence["info"])
            found.append(Block(page, start, fence["language"], title["title"] if title else "", reason["reason"] if reason else "", code))
            fence, before = None, ""
    assert fence is None, f"{page}:{start - 1}: a block that does not end"
    return found


def prose(page: Path) -> str:
    """The text of a page without its blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^( *)(`{3,}).*?^\1\2$", "", text, flags=re.MULTILINE | re.DOTALL)
