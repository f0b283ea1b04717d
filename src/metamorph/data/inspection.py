"""What a model really reads: a token sequence as rows, position by position, and as runs that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from metamorph.batch import IGNORE_INDEX, TokenSequence


@dataclass(frozen=True)
class PositionRow:
    """One position. `image` numbers the images from 0; `label` is the id to be predicted here, where the target is text."""

    position: int
    token_id: int
    text: str
    kind: Literal["text", "visual"]
    is_target: bool
    image: int | None = None
    from_pixels: bool | None = None
    label: int | None = None


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of one kind, target or not; `text` is decoded as a whole, so that it reads well."""

    start: int
    length: int
    kind: Literal["text", "visual"]
    is_target: bool
    text: str
    image: int | None = None


def describe(sequence: TokenSequence, decode: Callable[[list[int]], str]) -> list[PositionRow]:
    """A row per position; a position is a target if the one before it is trained to predict it.

    Args:
        sequence: what the processor made.
        decode: ids as text, special tokens included, such as `tokenizer.decode`.
    """
    k = sequence.tokens_per_image
    rows, visual_position = [], 0
    visual, ids, labels = sequence.is_visual.tolist(), sequence.input_ids.tolist(), sequence.labels.tolist()
    for position, token_id in enumerate(ids):
        if visual[position]:
            image, number = divmod(visual_position, k)
            text = f"[image {image}, visual token {number}]"
            target, pixels = bool(sequence.visual_targets[image]), bool(sequence.from_pixels[image])
            rows.append(PositionRow(position, token_id, text, "visual", target, image, pixels))
            visual_position += 1
        else:
            target = position > 0 and labels[position] != IGNORE_INDEX
            rows.append(PositionRow(position, token_id, decode([token_id]), "text", target, label=labels[position] if target else None))
    return rows


def runs(sequence: TokenSequence, decode: Callable[[list[int]], str]) -> list[Run]:
    """The rows of `describe`, joined where kind, target and image stay the same."""
    result = []
    for (kind, target, image), group in groupby(describe(sequence, decode), key=lambda row: (row.kind, row.is_target, row.image)):
        rows = list(group)
        text = decode([row.token_id for row in rows]) if kind == "text" else f"[image {image}: {len(rows)} visual tokens]"
        result.append(Run(rows[0].position, len(rows), kind, target, text, image))
    return result


def target_texts(sequence: TokenSequence, decode: Callable[[list[int]], str]) -> list[str]:
    """What the model is trained to say, run by run; an image appears as its description."""
    return [run.text for run in runs(sequence, decode) if run.is_target]


def as_table(entries: Sequence[Run]) -> list[dict[str, str | int]]:
    """Runs as plain rows for a table: position, length, kind, target, text."""
    return [
        {"position": run.start, "length": run.length, "kind": run.kind, "target": "yes" if run.is_target else "", "text": run.text}
        for run in entries
    ]
