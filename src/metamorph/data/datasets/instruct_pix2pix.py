"""InstructPix2Pix (Brooks et al., 2023): images before and after an edit. See docs/datasets/instruct-pix2pix.md."""

from __future__ import annotations

import json
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.data.datasets.published import PublishedSource, folder, identity, image_of, list_field, open_records, text_field, typed
from metamorph.data.kinds import ImageToImage, image_to_image
from metamorph.data.rows import RawRow
from metamorph.errors import RecordError
from metamorph.messages import Example


def source(directory: str, name: str = "instruct_pix2pix", seed: int = 0, whole_files: bool = True) -> PublishedSource:
    """Edits of images, from either of the two layouts in which the data set is published; which one is told from the folder.

    Args:
        directory: a copy of `timbrooks/instructpix2pix-clip-filtered`, with Parquet files in it or in `data`; or the authors'
            `clip-filtered-dataset`, with `seeds.json`.
        name: how tables and errors call the source.
        seed: of the choice among the pairs of an instruction, in the second layout.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: the folder holds neither.
    """
    root = folder(directory, holds="seeds.json, or Parquet files")
    if (root / "seeds.json").is_file():
        return PublishedSource(SeedList(root / "seeds.json"), partial(convert_folder, root=root, name=name), name, seed)
    files = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    if not files:
        raise RecordError(f"no seeds.json and 0 Parquet files but one of them is needed ({root}). Fetch the data set or name its folder.")
    return PublishedSource(open_records(files, None, name, whole_files=whole_files), partial(convert_parquet, name=name), name, seed)


def convert_parquet(raw: RawRow, rng: np.random.Generator, name: str) -> Example:
    """A row of the hub's Parquet files as an example.

    Raises:
        RecordError, MediaError: a field is missing, or is no image.
    """
    row = ImageToImage(
        source_image=image_of(raw, raw.values.get("original_image"), None, "original_image"),
        target_image=image_of(raw, raw.values.get("edited_image"), None, "edited_image"),
        instruction=text_field(raw, "edit_prompt"),
        **identity(raw, name),
    )
    return image_to_image(row, rng)


def convert_folder(raw: RawRow, rng: np.random.Generator, root: Path, name: str) -> Example:
    """An instruction of the authors' folders as an example, with one of its pairs of images.

    Raises:
        RecordError, MediaError: the prompt or an image is missing.
    """
    prompt_folder, seeds = text_field(raw, "folder"), list_field(raw, "seeds")
    stem = f"{prompt_folder}/{seeds[int(rng.integers(len(seeds)))]}"
    row = ImageToImage(
        source_image=image_of(raw, f"{stem}_0.jpg", root, "seeds"),
        target_image=image_of(raw, f"{stem}_1.jpg", root, "seeds"),
        instruction=_instruction(raw, root / prompt_folder / "prompt.json"),
        id=stem,
        source=name,
        origin=raw.place,
    )
    return image_to_image(row, rng)


class SeedList:
    """The entries of `seeds.json`: a folder below the data set, and the seeds of the pairs in it. Kept as one string, a few bytes an entry.

    Raises:
        RecordError: the file is not such a list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"no JSON ({error}) but a list of folders and seeds is needed ({path}). Fetch it again.") from error
        if not isinstance(entries, list) or not entries:
            raise RecordError(f"{type(entries).__name__} without entries but a list is needed ({path}). Fetch it again.")
        lines = [self._line(entry, number) for number, entry in enumerate(entries)]
        self._text = "".join(lines)
        self._ends = np.fromiter(accumulate(map(len, lines)), dtype=np.int64, count=len(lines))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int, /) -> RawRow:
        """Entry `index` as the fields `folder` and `seeds`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} but 0 to {len(self) - 1} exist ({self.path})")
        start = int(self._ends[index - 1]) if index else 0
        name, *seeds = self._text[start : int(self._ends[index])].split("\t")
        return RawRow({"folder": name, "seeds": seeds}, f"{self.path}[{index}]")

    def _line(self, entry: Any, number: int) -> str:
        row = RawRow({}, f"{self.path}[{number}]")
        name, seeds = typed(row, entry, list, "", "a folder and its seeds") if isinstance(entry, list) and len(entry) == 2 else (None, None)
        typed(row, name, str, "[0]", "the name of a folder")
        return "\t".join([name, *map(str, typed(row, seeds, list, "[1]", "a list of seeds"))])  # pyright: ignore[reportCallIssue, reportArgumentType]


def _instruction(raw: RawRow, path: Path) -> str:
    """The field `edit` of a prompt.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"no readable prompt ({error}) but one is needed ({raw.place}, {path}). Fetch the folder again.") from error
    edit = values.get("edit") if isinstance(values, dict) else None
    return typed(raw, edit, str, f"{path}, edit", "the instruction")
