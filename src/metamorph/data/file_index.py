"""Where the rows of a file begin, found once and kept beside it: `train.jsonl` gets a `train.jsonl.index`.

    1,024 bytes   a JSON object, padded with spaces: of which file (bytes, modification time, hash of both ends), which sections
    8 bytes each  little-endian numbers, section after section; the large one holds the offset of every row

An index is memory-mapped: to open one costs the same for a thousand rows and for millions, and processes share its pages. It belongs to
its file by size, modification time and a hash of the file's first and last 4 KiB; whatever does not fit is built anew, never trusted. It is
written under another name and put in place whole, so that of processes that build at once each writes the same and none reads a half. Where
the folder is read-only or full it goes to `$METAMORPH_CACHE_DIR/indexes` (default: `metamorph` in `$XDG_CACHE_HOME` or `~/.cache`), and a
log line says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from jaxtyping import Int64

from metamorph.errors import RecordError

Progress: TypeAlias = bool | Callable[[int, int], None]
"""Whether to show a bar on a terminal's stderr, or whom to tell (bytes done, bytes in all)."""

Notes: TypeAlias = dict[str, Any]
"""What a scan found out besides numbers: plain JSON values, a few hundred bytes."""

_HEADER = 1024
_VERSION = 1
_EDGE = 4096
_MAPPED = 128  # indexes that a process keeps mapped: each holds a file open, of which many systems allow 1,024
_SHOWN_FROM = 2**26  # bytes; smaller files are indexed before a bar could be read
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


class IndexWriter:
    """Takes the numbers of an index as they are found: one section as a stream, others whole, at the end."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self.advance = advance  # to be told how many bytes of the file have been read
        self.sections: dict[str, tuple[int, int]] = {}  # name -> (first number, count)
        self._file, self._count, self._streamed = file, 0, 0
        file.write(b" " * _HEADER)

    def stream(self, numbers: Int64[np.ndarray, " n"]) -> None:
        """More of the first section, `starts`."""
        self._write(numbers)
        self._streamed += len(numbers)
        self.sections["starts"] = (0, self._streamed)

    def add(self, name: str, numbers: Int64[np.ndarray, " n"]) -> None:
        """A whole section, after the stream has ended."""
        self.sections[name] = (self._count, len(numbers))
        self._write(numbers)

    def finish(self, header: dict[str, Any]) -> None:
        """Write the header into its place.

        Raises:
            RecordError: it does not fit.
        """
        data = json.dumps({**header, "sections": self.sections}).encode()
        if len(data) >= _HEADER:
            raise RecordError(f"{len(data)} bytes but an index's header has {_HEADER} ({header}). Report this as a bug.")
        self._file.seek(0)
        self._file.write(data.ljust(_HEADER - 1) + b"\n")

    def _write(self, numbers: Int64[np.ndarray, " n"]) -> None:
        self._file.write(np.ascontiguousarray(numbers, dtype="<i8").data)
        self._count += len(numbers)


Scan: TypeAlias = Callable[[BinaryIO, IndexWriter], Notes]
"""Reads a file once, from its beginning, and writes down where its rows are."""


@dataclass(eq=False)
class FileIndex:
    """An index in use. Goes to worker processes as its place, and is mapped there when a row is asked for."""

    file: Path
    location: Path  # beside the file, or in the cache
    header: dict[str, Any]

    @property
    def notes(self) -> Notes:
        """What the scan found out."""
        return self.header["notes"]

    def count(self, name: str) -> int:
        """How many numbers a section has, known without mapping it."""
        return self.header["sections"].get(name, (0, 0))[1]

    def section(self, name: str) -> Int64[np.ndarray, " n"]:
        """The numbers of a section, mapped; none where the scan left it out.

        Raises:
            RecordError: the index was removed or replaced by that of another file since it was opened.
        """
        first, count = self.header["sections"].get(name, (0, 0))
        return _map(self)[first : first + count]


@lru_cache(maxsize=_MAPPED)
def _map(index: FileIndex) -> Int64[np.ndarray, " n"]:
    """All numbers of an index. Not kept by the index itself: a data set of ten thousand tars has as many."""
    if _read_header(index.location) != index.header:
        raise RecordError(
            f"another index than at the start but the same is needed ({index.location}). Do not change data under a running process."
        )
    if not any(count for _, count in index.header["sections"].values()):
        return np.zeros(0, np.int64)  # nothing cannot be mapped
    return np.asarray(np.memmap(index.location, dtype="<i8", mode="r", offset=_HEADER))


def open_index(file: Path, kind: str, scan: Scan, *, progress: Progress = False, ending: str = "index") -> FileIndex:
    """The index of a file: the one that is there if it fits, else a new one.

    Args:
        file: what is indexed.
        kind: how it is scanned; an index of another kind does not fit.
        scan: does it.
        progress: show how far it is; worker processes stay silent.
        ending: of the index's name, for one that lies beside another of the same file.

    Raises:
        RecordError: the file cannot be read, changes while it is read, or there is no place to write to.
    """
    try:
        before = _identity(file, kind)
        for location in locations(file, ending):
            header = _read_header(location)
            if header is not None and {key: header.get(key) for key in before} == before:
                return FileIndex(file, location, header)
        location, header = _build(file, scan, before, progress, ending)
        if _identity(file, kind) != before:
            location.unlink(missing_ok=True)
            raise RecordError(f"a file that changes while it is read but one at rest is needed ({file}). Wait until it is written.")
        return FileIndex(file, location, header)
    except OSError as error:
        reason = error.strerror or error
        raise RecordError(f"a file that cannot be read ({reason}) but records are needed ({file}). Check the path.") from error


def locations(file: Path, ending: str = "index") -> tuple[Path, Path]:
    """Where the index of a file may be: beside it, or, where nothing can be written there, in the cache."""
    cache = os.environ.get("METAMORPH_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "metamorph")
    digest = hashlib.blake2b(os.fsencode(file.resolve()), digest_size=8).hexdigest()
    return file.with_name(f"{file.name}.{ending}"), Path(cache).expanduser() / "indexes" / f"{file.name[:100]}.{digest}.{ending}"


def _identity(file: Path, kind: str) -> dict[str, Any]:
    """What an index must agree in with its file."""
    status = file.stat()
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        digest.update(opened.read(_EDGE))
        opened.seek(max(0, status.st_size - _EDGE))
        digest.update(opened.read(_EDGE))
    identity = {"format": "metamorph index", "version": _VERSION, "kind": kind}
    return {**identity, "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "edges": digest.hexdigest()}


def _read_header(location: Path) -> dict[str, Any] | None:
    """The header of a whole index, or None."""
    try:
        with location.open("rb") as file:
            header = json.loads(file.read(_HEADER))
            numbers = sum(count for _, count in header["sections"].values())
            return header if os.fstat(file.fileno()).st_size == _HEADER + 8 * numbers else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none there, or not ours: it is built anew
        return None


def _build(file: Path, scan: Scan, identity: dict[str, Any], progress: Progress, ending: str) -> tuple[Path, dict[str, Any]]:
    """Scan the file and write the index to the first place that takes it."""
    for location in locations(file, ending):
        partial = location.with_name(f".{location.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        try:
            location.parent.mkdir(parents=True, exist_ok=True)
            target = partial.open("wb")
        except OSError as error:
            _log.info("no index can be written to %s (%s)", location.parent, error.strerror)
            continue
        try:
            with target, file.open("rb", buffering=0) as source, shown(file.name, identity["bytes"], progress) as advance:
                writer = IndexWriter(target, advance)
                header = {**identity, "notes": scan(source, writer)}  # pyright: ignore[reportArgumentType]  # unbuffered, still binary
                writer.finish(header)
            os.replace(partial, location)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            _log.warning("no room for the index %s (%s)", location, error.strerror)
            continue
        finally:
            partial.unlink(missing_ok=True)
        if location != locations(file, ending)[0]:
            _log.warning("beside %s its index cannot be written: it is %s", file, location)
        return location, {**header, "sections": {name: list(place) for name, place in writer.sections.items()}}
    raise RecordError(
        f"no folder in which an index can be written but one is needed ({file}). Set METAMORPH_CACHE_DIR to a folder with room."
    )


@contextmanager
def shown(name: str, total: int, progress: Progress) -> Iterator[Callable[[int], None]]:
    """A function to be told of bytes that were read, of `total`."""
    done = 0
    if callable(progress):

        def tell(number: int) -> None:
            nonlocal done
            done += number
            progress(done, total)

        yield tell
    elif progress and total >= _SHOWN_FROM and multiprocessing.parent_process() is None:  # else a bar from every worker
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("Indexing {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda number: bar.advance(task, number)
    else:
        yield lambda number: None
