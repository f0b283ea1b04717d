"""Rows of the microworld as files in the formats in which others publish theirs: sample data for users, and for tests of the readers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from metamorph.data.mixture import ExampleSource
from metamorph.data.writing import Layout, write
from metamorph.errors import ConfigError
from metamorph.messages import Example
from metamorph.microworld.examples import MIXTURE, MicroworldSource
from metamorph.microworld.world import Split


@dataclass(frozen=True)
class Exported:
    """What was written."""

    files: tuple[Path, ...]
    """What to open: one file, or the shards."""
    rows: int
    bytes: int
    """Of all files, images included."""


def export(
    source: ExampleSource,
    layout: Layout,
    out: Path,
    *,
    name: str = "train",
    follow: Callable[[Iterable[Example]], Iterable[Example]] = iter,
) -> Exported:
    """Write all rows of a source; the directory appears when it is whole, and after a fault there is none.

    Args:
        source: the rows.
        layout: llava, messages, parquet or webdataset; see `metamorph.data.writing`.
        out: the directory; it may exist if it is empty.
        name: of the files in it.
        follow: passes the rows on, and may show how many have gone by.

    Raises:
        ConfigError: the directory holds something.
        RecordError, MediaError: a row that cannot be written.
    """
    _check_empty(out)
    partial = out.resolve().with_name(f".{out.resolve().name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        files = write(follow(source[index] for index in range(len(source))), layout, partial, name)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        _check_empty(out)
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(tuple(out / file.name for file in files), len(source), size)


def chosen_kinds(names: str | None) -> dict[str, float]:
    """Shares of kinds of rows, named with commas; None = all of the mixture.

    Raises:
        ConfigError: there is no such kind.
    """
    from metamorph.training.config import unknown_name

    chosen = [name.strip() for name in names.split(",")] if names is not None else list(MIXTURE)
    for name in chosen:
        if name not in MIXTURE:
            raise ConfigError(f"{unknown_name(name, list(MIXTURE), 'kind')} (--kinds)")
    return {name: share for name, share in MIXTURE.items() if name in chosen}


def rows_to_export(rows: int, kinds: str | None = None, split: Split = "train", seed: int = 0) -> MicroworldSource:
    """So many rows of the microworld, of some kinds in the mixture's shares.

    Raises:
        ConfigError: there is no such kind.
    """
    return MicroworldSource(chosen_kinds(kinds), rows, seed, split)


def _check_empty(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"a directory that holds something but an empty or a new one is needed ({out}). Choose another one.")
