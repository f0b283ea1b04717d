"""Visual CoT (Shao et al., 2024): questions, and the box of the region that answers them. See docs/datasets/visual-cot.md."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

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
from metamorph.data.regions import Box
from metamorph.data.rows import RawRow
from metamorph.errors import RecordError
from metamorph.messages import Example

REQUEST = "Please provide the bounding box"
"""Where the part of a question begins that asks for a box; it is left out, as in the authors' code."""
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"###\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]\s*$")


def source(
    directory: str,
    file: str = "viscot_363k.json",
    name: str = "visual_cot",
    asked_share: float = ASKED_SHARE,
    padding: float = 0.0,
    seed: int = 0,
    whole_files: bool = True,
) -> PublishedSource:
    """Questions about images, answered by the key region and then in words, of `deepcs233/Visual-CoT` with its images unpacked.

    Args:
        directory: the folder of the data set; paths of images are relative to it.
        file: the records, relative to it.
        name: how tables and errors call the source.
        asked_share: how often the question asks to think visually.
        padding: how much wider than its box a region is cut; the authors' code cuts exactly.
        seed: of the wording.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: a file is missing or holds no rows.
    """
    root = folder(directory, holds=file)
    rows = open_records(existing([root / file], holds="the file of records"), root, name, whole_files=whole_files)
    return PublishedSource(rows, partial(convert, root=root, name=name, asked_share=asked_share, padding=padding), name, seed)


def convert(
    raw: RawRow, rng: np.random.Generator, root: Path, name: str, asked_share: float = ASKED_SHARE, padding: float = 0.0
) -> Example:
    """A record as an example: its question without the request for a box, the region, and its last answer.

    Raises:
        RecordError, MediaError: the record, its box or its image cannot be used.
    """
    images = list_field(raw, "image")
    if len(images) != 2:
        raise RecordError(f"{len(images)} images but 2 are needed ({raw.place}, image). Name a path, and that path with ###[box].")
    turns = exchanges(raw)
    if len(turns) != 2:
        expected = "2 (the question and its box, the answer)"
        raise RecordError(f"{len(turns)} exchanges but {expected} are needed ({raw.place}, conversations). Correct the row.")
    row = VisualThinking(
        image=image_of(raw, images[0], root, "image[0]"),
        question=(turns[0].question or "").partition(REQUEST)[0],
        answer=turns[1].answer,
        key=_box(raw, typed(raw, images[1], str, "image[1]", "a path with ###[box]")),
        **identity(raw, name, "dataset", "question_id"),
    )
    return visual_thinking(row, rng, asked_share=asked_share, padding=padding)


def _box(raw: RawRow, text: str) -> Box:
    """The pixels behind ###: left, top, right, bottom."""
    if (match := _BOX.search(text)) is None:
        raise RecordError(f"{text!r:.80} but a path that ends in ###[left, top, right, bottom] is needed ({raw.place}, image[1]). Fix it.")
    return Box(*(float(number) for number in match.groups()))
