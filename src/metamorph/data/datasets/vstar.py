"""VStar (Wu and Xie, 2024): questions, and the boxes and names of the objects that answer them. See docs/datasets/vstar.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.data.datasets.published import (
    PublishedSource,
    exchanges,
    existing,
    folder,
    identity,
    image_of,
    list_field,
    open_records,
    typed,
)
from metamorph.data.kinds import ASKED_SHARE, VisualThinking, visual_thinking
from metamorph.data.regions import Box, NamedBox
from metamorph.data.rows import RawRow
from metamorph.errors import RecordError
from metamorph.messages import Example, Message

FILES = ("GQA_data.json", "spatial_relation_data.json", "vaw_attribute_data.json", "llava_focus_data.json")
"""The files whose rows have boxes."""
_FOCUS = re.compile(r"Additional visual information to focus on:\s*(?:<object>[;,.\s]*)*")
_OBJECT = re.compile(r"\s*<object>")


def source(
    directory: str,
    images: str | None = None,
    files: Sequence[str] = FILES,
    name: str = "vstar",
    asked_share: float = ASKED_SHARE,
    seed: int = 0,
    whole_files: bool = True,
) -> PublishedSource:
    """Questions about images, answered by the image with its key objects boxed and named and then in words, of `craigwu/seal_vqa_data`.

    Args:
        directory: the folder of the files of records.
        images: the folder to which paths of images are relative; by default the same.
        files: the records, one file after the other.
        name: how tables and errors call the source.
        asked_share: how often the question asks to think visually.
        seed: of the wording.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: a file is missing or holds no rows.
    """
    root = folder(directory, holds=", ".join(files))
    shown = folder(images, holds="the images") if images is not None else root
    rows = open_records(existing([root / file for file in files], holds="a file of records"), shown, name, whole_files=whole_files)
    return PublishedSource(rows, partial(convert, root=shown, name=name, asked_share=asked_share), name, seed)


def convert(raw: RawRow, rng: np.random.Generator, root: Path, name: str, asked_share: float = ASKED_SHARE) -> Example:
    """A record as an example: its question without what speaks of objects, the image with the objects marked, and the answer.

    Further questions and answers, where there are any, follow as text.

    Raises:
        RecordError, MediaError: the record, its boxes or its image cannot be used.
    """
    first, *further = exchanges(raw)
    row = VisualThinking(
        image=image_of(raw, raw.values.get("image"), root, "image"),
        question=_cleaned(first.question),
        answer=first.answer,
        key=tuple(_named_box(raw, item, number) for number, item in enumerate(list_field(raw, "target_instances"))),
        **identity(raw, name),
    )
    example = visual_thinking(row, rng, asked_share=asked_share)
    more = [message for turn in further for message in (Message.user(_cleaned(turn.question)), Message.assistant(turn.answer))]
    return replace(example, messages=(*example.messages, *more))


def _cleaned(question: str | None) -> str:
    return _OBJECT.sub("", _FOCUS.sub("", question or "")).strip()


def _named_box(raw: RawRow, item: Any, number: int) -> NamedBox:
    """An object of `target_instances`; its `bbox` is left, top, width and height in pixels."""
    field = f"target_instances[{number}]"
    values: Mapping[str, Any] = typed(raw, item, Mapping, field, "an object with name and bbox")
    name = typed(raw, values.get("name"), str, f"{field}.name", "the object's name")
    box = typed(raw, values.get("bbox"), (list, tuple), f"{field}.bbox", "a list of 4 numbers")
    if len(box) != 4 or not all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in box):
        raise RecordError(f"{box!r:.60} but left, top, width and height are needed ({raw.place}, {field}.bbox). Correct the row.")
    left, top, width, height = (float(side) for side in box)
    return NamedBox(name, Box(left, top, left + width, top + height))
