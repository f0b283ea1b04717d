"""Tables with random access: Parquet files and data sets of the hub, through Hugging Face `datasets` and its memory-mapped Arrow cache.

`datasets` writes the rows once more, as Arrow, into its cache (`cache_dir`, by default its own; as large as the unpacked table), and maps
that: any row is then read without unpacking a row group, and processes share the pages. Values are given on as they are stored: bytes of
images stay encoded, however deep they lie, and no column is hidden. `streaming.py` reads tables without a cache.
"""

from __future__ import annotations

import glob
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metamorph.data.faults import Fault
from metamorph.data.rows import FaultyRows, RawRow, no_rows
from metamorph.errors import HubError, RecordError

if TYPE_CHECKING:
    from datasets import Dataset

_HUB = re.compile(r"hf://datasets/(?P<name>[^@:]+)(?P<more>(?:@(?P<revision>[^:/]+))?(?::(?P<config>[^/]+))?(?:/(?P<split>[^/]+))?)")


class Shard(NamedTuple):
    """A file of a table, for the names of its rows."""

    place: str
    num_rows: int


class TableRows(FaultyRows):
    """The rows of an Arrow table that `datasets` holds; goes to worker processes as the names of its cache files.

    Args:
        table: the rows; None where nothing could be read.
        shards: the files in their order, with as many rows together as the table has.
        root: the folder to which paths in the rows refer.
        name: how tables and errors call it.
        broken: what is wrong with files that were left out.
    """

    def __init__(
        self, table: Dataset | None, shards: Sequence[Shard], *, root: Path | None, name: str, broken: Sequence[Fault] = ()
    ) -> None:
        self.root, self.name = root, name
        self._table = None if table is None else table.with_format("arrow")  # not decoded: bytes of images stay bytes
        self._shards, self._broken = tuple(shards), tuple(broken)
        self._ends = list(accumulate(shard.num_rows for shard in shards))

    def __len__(self) -> int:
        """Number of rows."""
        return 0 if self._table is None else len(self._table)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [] if self._table is None else list(self._table.column_names)

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """Row `index`.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, self.name)
        assert self._table is not None
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        values: dict[str, Any] = self._table[index].to_pylist()[0]  # pyright: ignore[reportAttributeAccessIssue]  # a table of one row
        return RawRow(values, f"{self._shards[shard].place} row {row}")

    def faults(self) -> Iterator[Fault]:
        """Files that are no whole Parquet, and a table without rows."""
        yield from self._broken
        if not len(self) and not self._broken:
            yield no_rows(Path(self.name), "at least one row")


def open_parquet(
    files: Sequence[Path], *, image_root: Path | None = None, name: str = "", cache_dir: Path | None = None, progress: bool = False
) -> TableRows:
    """Parquet files of equal columns as one table, in the given order. Broken ones are left out, and named by `faults`.

    Args:
        files: at least one.
        image_root: the folder to which paths in the rows refer; default: that of the first file.
        name: how tables and errors call it; default: the first file's name.
        cache_dir: where the Arrow files go.
        progress: show how far the conversion is.

    Raises:
        RecordError: their columns differ, or there is no room for the cache.
    """
    shards, broken = _shards(files)
    table = None
    if shards:
        options = {"data_files": [glob.escape(str(shard)) for shard in shards], "split": "train"}
        place = f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
        table = load_table("parquet", place, progress=progress, cache_dir=cache_dir, **options)
    counted = [Shard(str(file), number) for file, number in shards.items()]
    return TableRows(table, counted, root=image_root or files[0].parent, name=name or files[0].stem, broken=broken)


def open_hub(
    reference: str,
    *,
    name: str = "",
    split: str = "train",
    config: str | None = None,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> TableRows:
    """A data set of the hub, downloaded whole, or a local folder laid out as one.

    Args:
        reference: `hf://datasets/OWNER/NAME[@REVISION][:CONFIG][/SPLIT]`, or a folder.
        name: how tables and errors call it; default: the reference.
        split: which part, where the reference does not say.
        config: which configuration, where the reference does not say.
        cache_dir: where downloads and Arrow files go.
        progress: show how far it is.

    Raises:
        RecordError: it is no such reference, has no such split, or cannot be read as a table.
        HubError: the hub does not answer.
    """
    source = parse_reference(reference, split, config)
    options = {"name": source.config, "split": source.split, "revision": source.revision}
    table = load_table(source.name, reference, progress=progress, cache_dir=cache_dir, **options)
    return TableRows(table, [Shard(reference, len(table))], root=None, name=name or reference)


class HubReference(NamedTuple):
    """What `load_dataset` wants to know."""

    name: str
    revision: str | None
    config: str | None
    split: str


def parse_reference(reference: str, split: str = "train", config: str | None = None) -> HubReference:
    """Take apart `hf://datasets/OWNER/NAME[@REVISION][:CONFIG][/SPLIT]`; a folder passes whole.

    Raises:
        RecordError: it is spelt in another way.
    """
    if not reference.startswith("hf://"):
        return HubReference(reference, None, config, split)
    found = _HUB.fullmatch(reference)
    parts = found["name"].split("/") if found else []
    if found and not found["more"] and len(parts) == 3:  # without a mark between them, the third part is the split
        split = parts.pop()
    if found is None or len(parts) > 2 or not all(parts):
        expected = "hf://datasets/OWNER/NAME, with @REVISION, :CONFIG and /SPLIT behind it where wanted, is needed"
        raise RecordError(f"{reference!r} but {expected} (name on the hub). Correct it.")
    return HubReference("/".join(parts), found["revision"], found["config"] or config, found["split"] or split)


def _shards(files: Sequence[Path]) -> tuple[dict[Path, int], list[Fault]]:
    """The number of rows of each file, from its footer, and what is wrong with the others."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    counts: dict[Path, int] = {}
    broken = []
    for file in files:
        try:
            counts[file] = read_metadata(file).num_rows
        except (ArrowException, OSError) as error:
            found = f"a file that is no whole Parquet ({str(error).splitlines()[0]})"
            broken.append(Fault("truncated", str(file), "", found, "a footer is expected at its end", "Fetch or write it again."))
    return counts, broken


def load_table(path: str, place: str, *, progress: bool = False, cache_dir: Path | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, whose bars follow `progress` without a lasting change to the library's setting.

    Args:
        path: as `load_dataset` wants it.
        place: how errors call the data.
        progress: show how far it is.
        cache_dir: where downloads and Arrow files go.
        options: of `load_dataset`.

    Returns:
        A `Dataset`, or an `IterableDataset` where `streaming` is among the options.

    Raises:
        RecordError: it cannot be read as a table.
        HubError: the hub does not answer.
    """
    import datasets

    silent = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    try:
        with errors_named(place):
            return datasets.load_dataset(path, cache_dir=None if cache_dir is None else str(cache_dir), **options)
    finally:
        (datasets.disable_progress_bars if silent else datasets.enable_progress_bars)()


@contextmanager
def errors_named(place: str) -> Iterator[None]:
    """What goes wrong inside of `datasets`, as errors of ours."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from pyarrow import ArrowException

    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise HubError(f"a hub that does not answer ({error}) but a data set is wanted ({place}). Check name and network.") from error
    except (DatasetsError, ArrowException, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"a table that cannot be read ({reason}) but rows of equal columns are needed ({place}). Check it.") from error
