"""Sample rows of all kinds of data on a page, with their truth, so that a person can look at what a model is taught."""

from __future__ import annotations

from metamorph.messages import Message
from metamorph.microworld.examples import make_row, to_messages
from metamorph.microworld.rows import KINDS, Picture, Row
from metamorph.microworld.world import Split, caption
from metamorph.reporting.blocks import Block, Conversation, Heading, Note, Paragraph
from metamorph.reporting.page import Page

_WORDS = {
    "image_qa": "Questions about a picture, with short answers.",
    "generation": "A request with a caption, full, partial or with invented names; then the picture.",
    "video_qa": "Frames, and a question about what happens.",
    "frames": "Frames to predict: the next, the missing, the first, several, in order; or how far two are apart.",
    "thinking": "A question; the answer shows the part of the picture it is about before it answers.",
    "edit": "A picture and an instruction, then the picture after it.",
    "text": "Text only: keeps what reading taught.",
}


def truth(row: Row) -> str:
    """What the pictures of a row show, in their order: the part that no model sees."""
    pictures = [picture for _, parts in row.turns for part in parts for picture in _pictures(part)]
    return "; ".join(caption(one.scene) if one.crop is None else f"cell {one.crop} enlarged, from {caption(one.scene)}" for one in pictures)


def _pictures(part: object) -> tuple[Picture, ...]:
    return (part,) if isinstance(part, Picture) else part if isinstance(part, tuple) else ()


def data_page(rows: int, seed: int = 0, split: Split = "train") -> Page:
    """`rows` conversations of each kind, exactly as training reads them, each with its truth."""
    blocks: list[Block] = [
        Paragraph("Everything the assistant says here, word or picture, is what a model learns to say; nothing else is.")
    ]
    for kind in [*KINDS, "text"]:
        blocks += [Heading(kind.replace("_", " ")), Paragraph(_WORDS[kind])]
        for index in range(rows):
            row = make_row(kind, seed, split, index)
            messages: tuple[Message, ...] = to_messages(row)
            sort = f"{row.type}: " if row.type else ""
            blocks.append(Conversation(messages, caption=f"{sort}{truth(row) or 'no picture'}"))
    blocks.append(Note(f"Rows 0 to {rows - 1} of each kind, split {split}, seed {seed}. The same seed gives the same rows."))
    return Page("The microworld's data", blocks, subtitle="Sample conversations of all kinds, with what their pictures truly show")
