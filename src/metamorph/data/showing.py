"""Rows as a model would read them: tokens, targets, images as the encoder gets them, positions and packs; for people to look at.

Axes: t positions, m images that come as pixels, k visual tokens per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from metamorph.data.inspection import Run, describe, runs
from metamorph.data.lengths import UNLIMITED, lengths_of
from metamorph.data.packing import Packing, RowPacker
from metamorph.media import to_pil
from metamorph.messages import Example, Message
from metamorph.reporting.blocks import Block, Details, Facts, Heading, Note, Paragraph, TableBlock, picture_html
from metamorph.reporting.page import Page
from metamorph.reporting.tables import Table

if TYPE_CHECKING:
    from metamorph.batch import TokenSequence

TARGET_MARKS = ("⟦", "⟧")
"""Around targets, where there is no colour."""
_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere"


@runtime_checkable
class ShowsSequences(Protocol):
    """What is needed of a processor."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def encode(self, messages: Sequence[Message], *, max_length: int | None, id: str, source: str, weight: float) -> TokenSequence:
        """The conversation as a token sequence."""
        ...

    def decode(self, ids: Any) -> str:
        """Text of ids, special tokens included."""
        ...


@dataclass(frozen=True)
class View:
    """One row. `pictures` holds for each image what the encoder sees, or None where it came as visual tokens."""

    example: Example
    sequence: TokenSequence
    runs: tuple[Run, ...]
    pictures: tuple[Image.Image | None, ...]
    limit: int | None

    @property
    def summary(self) -> str:
        """Numbers, in a sentence."""
        one = self.sequence
        images = (
            f"{one.num_images} image{'' if one.num_images == 1 else 's'} of {one.tokens_per_image} visual tokens"
            if one.num_images
            else "no image"
        )
        said = f"{len(one)} positions, {images}; targets: {one.num_text_targets} text, {one.num_visual_targets} visual tokens"
        return f"{said}. {self.cut}" if self.cut else said

    @property
    def cut(self) -> str:
        """What a limit of length says to it; "" if nothing."""
        if self.limit is None or len(self.sequence) <= self.limit:
            return ""
        lost = len(lengths_of(self.sequence).images_cut_at(self.limit))
        return f"Too long: at most {self.limit} positions are allowed; {lost} image(s) lie beyond or across the limit"


@dataclass(frozen=True)
class PackedRow:
    """One row of a pack: (document's id, first position, length) from left to right, and the length of the row."""

    documents: tuple[tuple[str, int, int], ...]
    length: int

    @property
    def fill(self) -> float:
        """Share of positions that hold something."""
        return sum(length for _, _, length in self.documents) / self.length


def look(example: Example, processor: ShowsSequences, limit: int | None = None) -> View:
    """Encode a row just as training does, except that one which is too long is shown too.

    Raises:
        MetaMorphError: it cannot be encoded.
    """
    sequence = processor.encode(example.messages, max_length=UNLIMITED, id=example.id, source=example.source, weight=example.weight)
    pixels = iter(sequence.pixel_values.numpy())
    pictures = tuple(_picture(next(pixels), processor) if given else None for given in sequence.from_pixels.tolist())
    return View(example, sequence, tuple(runs(sequence, processor.decode)), pictures, limit)


def packed(views: Sequence[View], length: int, look_ahead: int | None = None) -> list[PackedRow]:
    """The rows into which training would pack these documents, in this order; one that is too long for any is left out.

    Args:
        views: the documents.
        length: positions in a row.
        look_ahead: of `Packing`, where rows are filled from draws ahead (`batch_unit: rows`); None = as a batch of these alone is packed.
    """
    from metamorph.data.collate import first_fit

    fitting = [view for view in views if len(view.sequence) <= length]
    rows = []
    lengths = [len(view.sequence) for view in fitting]
    for row in first_fit(lengths, length) if look_ahead is None else _filled(fitting, Packing(length, look_ahead)):
        documents, start = [], 0
        for number in row:
            documents.append((fitting[number].example.id, start, len(fitting[number].sequence)))
            start += len(fitting[number].sequence)
        rows.append(PackedRow(tuple(documents), length))
    return rows


def _filled(views: Sequence[View], packing: Packing) -> Iterator[list[int]]:
    numbers = {id(view.sequence): number for number, view in enumerate(views)}
    packer = RowPacker(iter([view.sequence for view in views]), packing)
    while row := packer.next_row():
        yield [numbers[id(sequence)] for sequence in row]


def pack_table(rows: Sequence[PackedRow]) -> Table:
    """A line for each document: where it lies in its row, and that its own positions begin at 0."""
    lines = [
        [number, name, f"{start} to {start + length - 1}", f"0 to {length - 1}", f"{row.fill:.0%}"]
        for number, row in enumerate(rows)
        for name, start, length in row.documents
    ]
    return Table(["row", "document", "in the row", "position ids", "row filled"], lines, "Packing: documents do not see each other")


@dataclass(frozen=True)
class Tokens:
    """A block of a page: tokens as text, targets in colour and underlined, images where they stand."""

    view: View

    def html(self) -> str:
        """See Block."""
        return f'<figure><div class="card" style="{_STYLE}">{"".join(map(self._run, self.view.runs))}</div></figure>'

    def _run(self, run: Run) -> str:
        where = f"position {run.start}" if run.length == 1 else f"positions {run.start} to {run.start + run.length - 1}"
        title = f"{where}{', targets' if run.is_target else ''}"
        style = ' class="good" style="text-decoration:underline"' if run.is_target else ""
        if run.kind == "text":
            return f'<span{style} title="{title}">{escape(run.text)}</span>'
        picture = None if run.image is None else self.view.pictures[run.image]
        shown = "" if picture is None else picture_html(picture, f"image {run.image}")
        return f'<span style="display:inline-block;width:7rem" title="{title}">{shown}<span{style}>{escape(run.text)}</span></span>'


def page_of(views: Sequence[View], title: str, processor: str, decode: Callable[[list[int]], str], packs: Sequence[PackedRow] = ()) -> Page:
    """All of it as one page: for each row its tokens, and folded away every position.

    Args:
        views: the rows.
        title: of the page.
        processor: whose it is, in words.
        decode: ids as text.
        packs: how they would be packed, where that is to be shown.
    """
    blocks: list[Block] = [
        Paragraph(
            "What is underlined is what the model learns to say. Pictures are shown as the encoder gets them: resized, in its square."
        ),
        Facts({"processor": processor, "rows": len(views)}),
    ]
    for view in views:
        blocks.append(Heading(f"{view.example.place}, {view.example.kind or 'conversation'}"))
        blocks += [Note(view.summary) if view.cut else Paragraph(f"{view.summary}."), Tokens(view)]
        blocks.append(Details("every position", [TableBlock(position_table(view, decode))]))
    if packs:
        blocks += [Heading("Packing"), TableBlock(pack_table(packs))]
    return Page(title, blocks, subtitle="Rows of data as a model reads them")


def position_table(view: View, decode: Callable[[list[int]], str]) -> Table:
    """Every position: id, text, and the target that is to be predicted there."""
    rows = [
        [
            row.position,
            row.token_id,
            row.text,
            "visual" if row.kind == "visual" and row.is_target else None if row.label is None else str(row.label),
        ]
        for row in describe(view.sequence, decode)
    ]
    return Table(["position", "id", "token", "target"], rows)


def _picture(pixels: np.ndarray, processor: ShowsSequences) -> Image.Image:
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return to_pil(pixels * std + mean)
