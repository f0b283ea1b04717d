"""Cambrian-7M (Tong et al., 2024): questions about images in LLaVA's records, some of them text only. See docs/datasets/cambrian.md."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.published import PublishedSource, check_there, existing, folder, open_records
from metamorph.data.records import RecordSettings, to_example
from metamorph.data.references import Roots
from metamorph.data.rows import RawRow
from metamorph.messages import Example

RECORDS = "jsons/Cambrian7M_withsystemprompt.jsonl"
"""The curated records with system prompts, which the authors recommend."""


def source(directory: str, file: str = RECORDS, name: str = "cambrian", whole_files: bool = True) -> PublishedSource:
    """Questions about images, and conversations without images, of `nyu-visionx/Cambrian-10M` as it lies on the hub, archives unpacked.

    Args:
        directory: the folder of the data set; paths of images are relative to it.
        file: the records, relative to it.
        name: how tables and errors call the source.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: a file is missing or holds no rows.
    """
    root = folder(directory, holds=file)
    rows = open_records(existing([root / file], holds="the file of records"), root, name, whole_files=whole_files)
    settings = RecordSettings(roots=Roots(root), source=name, format="llava")
    return PublishedSource(rows, partial(convert, settings=settings), name)


def convert(raw: RawRow, rng: np.random.Generator, settings: RecordSettings) -> Example:
    """A record as an example; the images that it names must exist. Nothing is drawn.

    Raises:
        RecordError, MediaError: the record cannot be used.
    """
    example = to_example(raw, settings)
    assert example is not None  # faults raise
    for image in (image for message in example.messages for image in message.images):
        if isinstance(image.image, Path):
            check_there(raw, image.image, settings.roots.folder, "image")
    return replace(example, source=settings.source)
