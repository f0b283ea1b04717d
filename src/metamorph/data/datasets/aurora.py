"""Aurora (Krojer et al., 2024): images before and after an action or an edit. See docs/datasets/aurora.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.published import PublishedSource, existing, folder, identity, image_of, open_records, text_field
from metamorph.data.kinds import ImageToImage, image_to_image
from metamorph.data.rows import RawRow
from metamorph.errors import RecordError
from metamorph.messages import Example


def source(
    directory: str, parts: Sequence[str] | None = None, name: str = "aurora", seed: int = 0, whole_files: bool = True
) -> PublishedSource:
    """Edits of images, from either of the two layouts in which the data set is published; which one is told from the folder.

    Args:
        directory: a copy of `McGill-NLP/AURORA` from the hub, with Parquet files in it or in `data`; or of the authors' repository,
            with `data/NAME/train.json` and images unpacked.
        parts: in the second layout, which NAMEs (ag, kubric, magicbrush, something); by default all that are there.
        name: how tables and errors call the source.
        seed: of the wording, where the phrasings have a choice.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: the folder holds neither, or a part is missing.
    """
    root = folder(directory, holds="data/*.parquet, or data/NAME/train.json")
    files = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]) if parts is None else []
    images = None
    if not files:
        found = sorted(root.glob("data/*/train.json")) if parts is None else [root / "data" / part / "train.json" for part in parts]
        if not found:
            raise RecordError(f"0 Parquet files and no data/NAME/train.json but one of them is needed ({root}). Name another folder.")
        files, images = existing(found, holds="the records of a part"), root
    rows = open_records(files, images, name, whole_files=whole_files)
    return PublishedSource(rows, partial(convert, root=images, name=name), name, seed)


def convert(raw: RawRow, rng: np.random.Generator, root: Path | None, name: str) -> Example:
    """A row of either layout as an example.

    Raises:
        RecordError, MediaError: a field is missing, or is no image.
    """
    row = ImageToImage(
        source_image=image_of(raw, raw.values.get("input"), root, "input"),
        target_image=image_of(raw, raw.values.get("output"), root, "output"),
        instruction=text_field(raw, "instruction"),
        **identity(raw, name),
    )
    return image_to_image(row, rng)
