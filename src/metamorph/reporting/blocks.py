"""The blocks a page is made of. Each holds plain data and knows its HTML; all text is escaped here.

Pictures go in as PIL images, encoded files or paths, and come out inline, as PNG data URIs.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from PIL import Image

from metamorph.errors import DataError
from metamorph.messages import ImagePart, Message, TextPart, VideoPart
from metamorph.reporting.tables import Cell, Interval, MetricRow, Table, format_cell, format_number, reference_names

Picture: TypeAlias = Image.Image | bytes | Path

MAX_SIDE = 768
"""Pictures with a longer side are shrunk: a page is looked at, not measured."""

SMALL_SIDE = 128
"""Pictures up to this side are shown enlarged with their pixels visible."""


@runtime_checkable
class Block(Protocol):
    """Anything that can stand on a page."""

    def html(self) -> str:
        """The block as HTML, complete and escaped."""
        ...


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 begins a section and appears in the page's list of contents."""

    text: str
    level: Literal[2, 3] = 2

    @property
    def anchor(self) -> str:
        """The id under which links reach it."""
        return re.sub(r"\W+", "-", self.text.lower()).strip("-") or "section"

    def html(self) -> str:
        """See Block."""
        return f'<h{self.level} id="{escape(self.anchor)}">{escape(self.text)}</h{self.level}>'


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str

    def html(self) -> str:
        """See Block."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be overlooked: a limit, a warning."""

    text: str

    def html(self) -> str:
        """See Block."""
        return f'<div class="note">{escape(self.text)}</div>'


@dataclass(frozen=True)
class Code:
    """Commands or output, verbatim."""

    text: str

    def html(self) -> str:
        """See Block."""
        return f"<pre><code>{escape(self.text)}</code></pre>"


@dataclass(frozen=True)
class Facts:
    """Names and values: machine, versions, times."""

    facts: Mapping[str, Cell]

    def html(self) -> str:
        """See Block."""
        pairs = (f"<dt>{escape(name)}</dt><dd>{escape(format_cell(value))}</dd>" for name, value in self.facts.items())
        return f"<dl>{''.join(pairs)}</dl>"


@dataclass(frozen=True)
class TableBlock:
    """A table; numbers are aligned right. Wide tables scroll inside the page."""

    table: Table

    def html(self) -> str:
        """See Block."""
        kinds = [' class="number"' if numeric else "" for numeric in self.table.numeric]
        head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(self.table.columns, kinds, strict=True))
        rows = (
            "".join(f"<td{kind}>{escape(format_cell(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in self.table.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return _table(self.table.caption, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


@dataclass(frozen=True)
class MetricBlock:
    """Measured quantities: value, interval as a bar between 0 and 1 with what is required as a tick, n, references."""

    rows: Sequence[MetricRow]
    caption: str = ""

    def html(self) -> str:
        """See Block."""
        names = reference_names(self.rows)
        numbers = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in ("n", "required", *names))
        head = f'<th scope="col">metric</th><th scope="col" class="number">value</th><th scope="col">95% interval</th>{numbers}'
        body = "".join(f"<tr>{self._row(row, names)}</tr>" for row in self.rows)
        return _table(self.caption, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")

    @staticmethod
    def _row(row: MetricRow, names: Sequence[str]) -> str:
        verdict = {True: ' <span class="good">✓ reached</span>', False: ' <span class="bad">✗ not reached</span>', None: ""}[row.reached]
        note = f'<div class="faint">{escape(row.note)}</div>' if row.note else ""
        references = "".join(f'<td class="number">{escape(format_cell(row.references.get(name)))}</td>' for name in names)
        required = escape(format_cell(row.required)) + verdict
        return (
            f"<td>{escape(row.name)}{note}</td>"
            f'<td class="number"><strong>{escape(format_number(row.result.value))}</strong></td>'
            f"<td>{_interval(row.result, row.ceiling if row.floor is None else row.floor)}</td>"
            f'<td class="number">{escape(format_cell(row.result.n))}</td><td class="number">{required}</td>{references}'
        )


@dataclass(frozen=True)
class Figure:
    """A drawing given as SVG, as `plots` makes it.

    Raises:
        DataError: the text is not one SVG element, or would run code or load something.
    """

    svg: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.svg.lstrip().startswith("<svg"):
            raise DataError(f"a figure that begins with {self.svg.lstrip()[:20]!r} but an <svg> element is needed.")
        if found := re.search(r"<script|<foreignObject|\son\w+\s*=|href=[\"'](?!#)|url\((?!#)|@import", self.svg, re.IGNORECASE):
            raise DataError(f"a figure with {found.group().strip()!r} but only drawing that loads and runs nothing is allowed.")

    def html(self) -> str:
        """See Block."""
        return f"<figure>{self.svg}{_caption(self.caption)}</figure>"


@dataclass(frozen=True)
class PictureCard:
    """One or more pictures side by side (prompt's drawing and its correct rendering), with a title, a caption and a verdict."""

    pictures: Sequence[Picture]
    title: str = ""
    caption: str = ""
    correct: bool | None = None
    labels: Sequence[str] = ()

    def html(self) -> str:
        """See Block."""
        labels = [*self.labels, *[""] * (len(self.pictures) - len(self.labels))]
        pictures = "".join(
            f"<figure>{picture_html(picture, label or self.title)}{_caption(label)}</figure>"
            for picture, label in zip(self.pictures, labels, strict=True)
        )
        verdict = {True: '<span class="good">✓</span> ', False: '<span class="bad">✗</span> ', None: ""}[self.correct]
        title = f"<div>{verdict}{escape(self.title)}</div>" if self.title or verdict else ""
        caption = f'<div class="faint">{escape(self.caption)}</div>' if self.caption else ""
        row = f'<div class="row">{pictures}</div>' if self.pictures else ""
        return f'<div class="card">{row}{title}{caption}</div>'


@dataclass(frozen=True)
class ImageGrid:
    """Cards in columns as many as fit; `cell` is the least width of one, in rem."""

    cards: Sequence[PictureCard]
    caption: str = ""
    cell: float = 12.0

    def html(self) -> str:
        """See Block."""
        cells = "".join(card.html() for card in self.cards)
        return f'<figure><div class="grid" style="--cell:min({self.cell:g}rem,100%)">{cells}</div>{_caption(self.caption)}</figure>'


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat. An image part that holds visual tokens shows the next of `drawn`, what a decoder made of them.

    Raises:
        DataError: there are more, or fewer, drawn pictures than parts that hold visual tokens.
    """

    messages: Sequence[Message]
    drawn: Sequence[Picture] = ()
    caption: str = ""

    def __post_init__(self) -> None:
        wanted = sum(part.image is None for message in self.messages for part in message.images)
        if wanted != len(self.drawn):
            raise DataError(
                f"{len(self.drawn)} drawn pictures but {wanted} images given as visual tokens (a conversation). Decode each once, in order."
            )

    def html(self) -> str:
        """See Block."""
        drawn = iter(self.drawn)

        def show(part: ImagePart) -> str:
            return picture_html(next(drawn) if part.image is None else part.image, "picture")

        turns = []
        for message in self.messages:
            shown = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    shown.append(f"<p>{escape(part.text.strip())}</p>" if part.text.strip() else "")
                elif isinstance(part, VideoPart):
                    shown.append(f'<div class="film">{"".join(show(frame) for frame in part.frames)}</div>')
                else:
                    shown.append(show(part))
            role = escape(message.role)
            turns.append(f'<div class="turn {role}"><div class="who">{role}</div>{"".join(shown)}</div>')
        return f'<figure class="talk">{"".join(turns)}{_caption(self.caption)}</figure>'


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until asked for."""

    summary: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """See Block."""
        return f"<details><summary>{escape(self.summary)}</summary>{''.join(block.html() for block in self.blocks)}</details>"


def picture_html(picture: Picture, alternative: str) -> str:
    """An `<img>` that carries its own pixels.

    Raises:
        DataError: the file is missing or no image.
    """
    if isinstance(picture, Image.Image):
        image = picture
    else:
        name = f"{len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
        try:
            image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
            image.load()
        except OSError as error:
            raise DataError(f"{name} but a readable image is needed. ({error})") from error
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    pixels = " pixels" if max(image.size) <= SMALL_SIDE else ""
    return (
        f'<img class="picture{pixels}" src="data:image/png;base64,{data}" alt="{escape(alternative)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _table(caption: str, content: str) -> str:
    return f'<div class="scroll"><table>{f"<caption>{escape(caption)}</caption>" if caption else ""}{content}</table></div>'


def _interval(result: Interval, bound: float | None) -> str:
    """The interval in figures, and as a bar on a scale from 0 to 1 where it fits there."""
    if result.low is None or result.high is None:
        return escape(format_cell(None))
    text = escape(f"{format_number(result.low)} to {format_number(result.high)}")
    if not 0 <= result.low <= result.high <= 1:
        return text
    tick = f'<b style="left:{bound:.1%}"></b>' if bound is not None and 0 <= bound <= 1 else ""
    return f'{text}<div class="range"><i style="left:{result.low:.1%};width:{result.high - result.low:.1%}"></i>{tick}</div>'
