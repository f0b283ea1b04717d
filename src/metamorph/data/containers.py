"""Opening whatever rows somebody has: a file, a folder, a pattern, a list of them, or a name on the hub; told apart by content.

    JSON lines, JSON array        JsonLines, JsonArray     json_files.py
    CSV and TSV with a header     CsvLines                 image_folder.py
    a folder of images            CaptionedImages          image_folder.py     with a captions file: CSV or JSON lines
    Parquet files                 TableRows                parquet.py          through Hugging Face `datasets`
    WebDataset tars               TarSamples               webdataset.py
    hf://datasets/OWNER/NAME      TableRows                parquet.py          downloaded whole; `stream_rows` reads without that

Names of files only say which of a folder's files are worth a look. What a row means is not decided here.
"""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from metamorph.data.faults import Fault
from metamorph.data.file_index import Progress
from metamorph.data.image_folder import IMAGE_SUFFIXES, CaptionedImages, CsvLines, find_captions, holds_captions, looks_like_csv
from metamorph.data.json_files import JsonArray, JsonLines
from metamorph.data.line_index import BLANK, BOM, read_span
from metamorph.data.rows import FaultyRows, RawRow, Rows
from metamorph.data.text_rows import wide_encoding
from metamorph.data.webdataset import TarSamples
from metamorph.errors import RecordError

Kind: TypeAlias = Literal["json lines", "json array", "csv", "parquet", "tar"]

_HEAD = 2**16
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_TAR_MAGIC = slice(257, 262), b"ustar"
_SUFFIXES: dict[str, str] = {
    ".parquet": "parquet",
    ".tar": "tar",
    ".json": "text",
    ".jsonl": "text",
    ".ndjson": "text",
    ".csv": "text",
    ".tsv": "text",
}
_LISTED = 5
_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing)(?![A-Za-z])", re.IGNORECASE)


def open_rows(
    path: str | Path | Sequence[str | Path],
    *,
    image_root: Path | None = None,
    name: str = "",
    progress: Progress = False,
    cache_dir: Path | None = None,
) -> Rows:
    """The rows of whatever `path` names, with random access.

    What is wrong with single rows, or with a whole file that is of a known kind, is left to `row_or_fault` and `faults` of the result;
    whoever trains must raise the errors among the latter.

    Args:
        path: a file, a folder (of shards, or of images with captions), a pattern, several of these, or `hf://datasets/OWNER/NAME`, with
            `@REVISION`, `:CONFIG` and `/SPLIT` behind it where wanted. Several are read one after the other, in the order of their names.
        image_root: the folder to which media paths refer; default: that of the file which names them.
        name: how tables and errors call it; default: from the path.
        progress: show how far indexes are, or whom to tell (bytes done, bytes in all).
        cache_dir: where `datasets` keeps its Arrow files of Parquet; default: its own place.

    Raises:
        RecordError: there is no such file, it is compressed, of no known kind, or named twice.
    """
    if isinstance(path, str) and path.startswith("hf://"):
        from metamorph.data.parquet import open_hub

        return open_hub(path, name=name, cache_dir=cache_dir, progress=bool(progress))
    paths = [path] if isinstance(path, str | Path) else list(path)
    found = sorted(found for one in paths for found in _expand(one))
    if not found:
        raise RecordError("0 paths but at least 1 is needed (reading rows). Name a file.")
    _refuse_repeats(found)
    named = name or _name_of(paths, found)
    parts: list[Rows] = []
    for kind, group in groupby(found, _kind_of):
        parts += _open(kind, list(group), image_root, named, progress, cache_dir)
    return parts[0] if len(parts) == 1 else ConcatenatedRows(parts, named)


def detect(path: Path) -> Kind:
    """What kind of file this is, by its first bytes.

    Raises:
        RecordError: it cannot be read, is compressed, or is of no known kind.
    """
    try:
        head = read_span(path, 0, _HEAD)
    except OSError as error:
        raise RecordError(f"a file that cannot be read ({error.strerror}) but records are needed ({path}). Check the path.") from error
    for magic, (kind, remedy) in _COMPRESSED.items():
        if head.startswith(magic):
            raise RecordError(f"a file compressed with {kind} but rows are read by seeking ({path}). Unpack it: {remedy} {path.name}.")
    if head.startswith(b"PAR1"):
        return "parquet"
    where, magic = _TAR_MAGIC
    if head[where] == magic:
        return "tar"
    if head and not head.strip(b"\0"):
        raise RecordError(
            f"a file that begins with {len(head)} zero bytes but records are needed ({path}). Fetch it again, or leave it out."
        )
    if wide_encoding(head):
        return "json lines"  # which says what is wrong with it
    text = head.removeprefix(BOM).lstrip(BLANK)
    if text.startswith(b"["):
        return "json array"
    if _is_one_object(head):
        expected = "one object on each line, or an array of them, is needed"
        remedy = "Write the records that it holds as an array: [{...}, ...]; leave it out, if it only describes others."
        raise RecordError(f"one JSON object over several lines but {expected} ({path}). {remedy}")
    if text.startswith(b"{") or not text:
        return "json lines"
    if looks_like_csv(head):
        return "csv"
    if b"\0" not in head and path.suffix in {".json", ".jsonl", ".ndjson"}:
        return "json lines"  # broken from the first line on: named as such
    expected = "JSON, JSON lines, Parquet, a tar, or a CSV of images and captions is needed"
    raise RecordError(f"a file that begins with {head[:16]!r} but {expected} ({path}). Convert it, or leave it out.")


class ConcatenatedRows(FaultyRows):
    """Several containers, one after the other; places name the file, so nothing else is added.

    Args:
        parts: at least one.
        name: of the whole.

    Raises:
        RecordError: their media paths refer to different folders.
    """

    def __init__(self, parts: Sequence[Rows], name: str) -> None:
        self.parts, self.name = tuple(parts), name
        self._ends = list(accumulate(len(part) for part in parts))
        roots = sorted({part.root for part in parts if part.root is not None})
        if len(roots) > 1:
            expected = "media paths of one source refer to one"
            raise RecordError(f"files in {len(roots)} folders, {roots[0]} and {roots[1]}, but {expected} ({name}). Give image_root.")
        self.root = roots[0] if roots else None

    def __len__(self) -> int:
        """Rows of all parts."""
        return self._ends[-1]

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """Row `index` of the whole."""
        self.check_index(index, self.name)
        part = bisect_right(self._ends, index)
        return self.parts[part].row_or_fault(index - (self._ends[part - 1] if part else 0))

    def faults(self) -> Iterator[Fault]:
        """Those of all parts, in order."""
        for part in self.parts:
            yield from part.faults()


def _is_one_object(head: bytes) -> bool:
    """Whether JSON begins as an object that is spread over lines: no row, but what describes a data set, or holds one inside."""
    return head.removeprefix(BOM).lstrip(BLANK).split(b"\n", 1)[0].rstrip() == b"{" and b"\n" in head


def _kind_of(found: _Found) -> Kind:
    return detect(found.file)


class _Found(NamedTuple):
    """A file to be read, the folder to which its paths refer, and whether no other file may name what lies beside it."""

    file: Path
    root: Path
    is_alone: bool = False


def _name_of(paths: Sequence[str | Path], found: Sequence[_Found]) -> str:
    """The stem of a single file, else the name of the folder in which the first lies."""
    if len(paths) == 1 and not glob.has_magic(str(paths[0])):
        return Path(paths[0]).resolve().stem
    return found[0].root.resolve().name


def _expand(path: str | Path) -> list[_Found]:
    """The files that a path, folder or pattern names."""
    one = Path(path)
    if one.is_dir():
        files = _files_of(one)
        below = Counter(folder for file in files for folder in file.parents)  # how many files lie in a folder, or deeper
        return [_Found(file, one, below[file.parent] == 1) for file in files]
    if one.exists() or not glob.has_magic(str(path)):
        return [_Found(one, one.parent)]
    found = [Path(file) for file in glob.glob(str(path), recursive=True) if not _is_ours(file)]
    if not any(file.is_file() for file in found):
        raise RecordError(f"0 files that match but at least 1 is needed ({path}). Check the pattern; ** stands for any folders.")
    return [_Found(file, file.parent) for file in found if file.is_file()]


def _files_of(folder: Path) -> list[Path]:
    """The files of a folder, and of those below it, that hold its rows: shards of one kind, or what describes its images."""
    kinds: dict[str, list[Path]] = {"parquet": [], "tar": [], "text": []}
    has_images = False
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            has_images |= suffix in IMAGE_SUFFIXES
            if suffix in _SUFFIXES and not _is_ours(name):
                kinds[_SUFFIXES[suffix]].append(Path(place, name))
    if kinds["tar"] and kinds["parquet"]:
        if {file.stem for file in kinds["parquet"]} > {file.stem for file in kinds["tar"]}:
            found = f"{len(kinds['tar'])} tars and {len(kinds['parquet'])} Parquet files"
            raise RecordError(f"{found} but one kind of shards is expected ({folder}). Name the files: {folder}/*.tar.")
        return kinds["tar"]  # what downloads pairs writes a table of the same name beside each tar: their texts a second time
    texts = kinds["text"]
    if not (kinds["parquet"] or kinds["tar"]):
        texts = [file for file in texts if file.suffix.lower() != ".json" or not _is_one_object(_head_of(file))]
    shards = kinds["parquet"] or kinds["tar"] or (find_captions(texts) if has_images else []) or texts
    if not shards and (folder / "state.json").is_file():
        raise RecordError(f"Arrow files of datasets.save_to_disk but JSON, CSV, Parquet or tars are needed ({folder}). Call to_parquet.")
    if not shards:
        what = "images without a captions file" if has_images else "no file of records"
        remedy = "Add metadata.csv with the columns file_name and text." if has_images else "Name a folder that holds some."
        raise RecordError(f"{what} but JSON, JSON lines, CSV, Parquet or tars are needed ({folder}). {remedy}")
    _refuse_splits(shards, folder)
    return shards


def _head_of(file: Path) -> bytes:
    """Its first bytes; none where it cannot be read, of which whoever opens it tells."""
    try:
        return read_span(file, 0, 256)
    except OSError:
        return b""


def _refuse_splits(shards: Sequence[Path], folder: Path) -> None:
    """A folder that holds what is for training beside what is for tests is not one source.

    Raises:
        RecordError: files, or the folders in which they lie, are named for different splits.
    """
    found: dict[str, tuple[Path, Path]] = {}  # a file, and what names its split: the file, or a folder in which it lies
    for file in shards:
        for part in (*reversed(file.relative_to(folder).parents[:-1]), file.relative_to(folder)):
            if match := _SPLIT.match(part.name):
                found.setdefault(match.group(1).lower(), (file, folder / part))
                break
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file, _ in list(found.values())[:_LISTED])
        split, (file, named) = next(iter(found.items()))
        example = named if named != file else file.with_name(f"{file.name[: len(split)]}*{file.suffix}")
        raise RecordError(f"splits {', '.join(sorted(found))} ({names}) but one is expected ({folder}). Name it: {example}.")


def _is_ours(name: str) -> bool:
    """Files that lie beside data, and are none: indexes, hidden files."""
    return os.path.basename(name).startswith(".") or name.endswith((".index", ".partial"))


def _refuse_repeats(found: Sequence[_Found]) -> None:
    names = [one.file.resolve() for one in found]
    seen: set[Path] = set()
    if repeated := next((name for name in names if name in seen or seen.add(name)), None):
        raise RecordError(f"{repeated} twice but each file is read once ({len(names)} files). Check patterns that overlap.")


def _open(
    kind: Kind, found: Sequence[_Found], image_root: Path | None, name: str, progress: Progress, cache_dir: Path | None
) -> list[Rows]:
    """Files of one kind; Parquet as one table, the others each for itself."""
    if kind == "parquet":
        from metamorph.data.parquet import open_parquet

        by_root = groupby(found, lambda one: image_root or one.root)
        return [
            open_parquet([one.file for one in group], image_root=root, name=name, cache_dir=cache_dir, progress=bool(progress))
            for root, group in by_root
        ]
    return [_open_one(kind, one, image_root or one.root, name, progress) for one in found]


def _open_one(kind: Kind, found: _Found, root: Path, name: str, progress: Progress) -> Rows:
    file = found.file
    if kind == "tar":
        return TarSamples(file, name=name, progress=progress)
    if kind == "json array":
        return JsonArray(file, image_root=root, name=name, progress=progress)
    rows = (CsvLines if kind == "csv" else JsonLines)(file, image_root=root, name=name, progress=progress)
    return CaptionedImages(rows, file.parent, root, whole=found.is_alone) if holds_captions(rows) else rows
