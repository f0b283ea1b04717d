"""A report as one HTML file that needs nothing else: styles and pictures inside, no script, no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from metamorph.reporting.blocks import (
    Block,
    Code,
    Conversation,
    Details,
    Facts,
    Figure,
    Heading,
    ImageGrid,
    MetricBlock,
    Note,
    Paragraph,
    Picture,
    PictureCard,
    TableBlock,
)

__all__ = [
    "Block",
    "Code",
    "Conversation",
    "Details",
    "Facts",
    "Figure",
    "Heading",
    "ImageGrid",
    "MetricBlock",
    "Note",
    "Page",
    "Paragraph",
    "Picture",
    "PictureCard",
    "TableBlock",
    "render",
    "write",
]


@dataclass(frozen=True)
class Page:
    """A title and blocks, read from top to bottom."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    subtitle: str = ""
    footer: str = ""


def render(page: Page) -> str:
    """The page as one HTML document."""
    style = files("metamorph.reporting").joinpath("page.css").read_text(encoding="utf-8")
    sections = [block for block in page.blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{escape(block.anchor)}">{escape(block.text)}</a>' for block in sections)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(page.title)}</title><style>{style}</style></head><body><main>",
        f"<header><h1>{escape(page.title)}</h1>",
        f'<p class="subtitle">{escape(page.subtitle)}</p>' if page.subtitle else "",
        f"<nav>{links}</nav>" if len(sections) > 1 else "",
        "</header>",
        *(block.html() for block in page.blocks),
        f"<footer>{escape(page.footer)}</footer>" if page.footer else "",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def write(page: Page, path: Path) -> Path:
    """Render the page to `path`, whole or not at all, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(render(page), encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes
    os.replace(unfinished, path)
    return path
