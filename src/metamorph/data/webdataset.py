"""Samples of WebDataset tars, read where they lie: an index of the members, then a seek for each.

A sample is all files of one name up to the first dot, folders included: `0001.jpg` + `0001.txt`. Why not Hugging Face `datasets`, which
streams such tars from the hub well (`metamorph.data.streaming`): on local files it can neither seek to a sample nor say which one lacks its
picture or its text, takes files for one sample only where they are neighbours, and writes all pixels a second time into its cache.

    .jpg .jpeg .png .webp ...   "image"; several: the list "images" in natural order, and each under its own name where it has one
    .txt                        "caption"
    .json                       its fields
    .mp4 .webm ...              "video"
    anything else               bytes under its ending
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from metamorph.data.faults import Fault
from metamorph.data.file_index import FileIndex, IndexWriter, Notes, Progress, open_index
from metamorph.data.image_folder import IMAGE_SUFFIXES
from metamorph.data.json_files import parse_row
from metamorph.data.rows import FaultyRows, RawRow, no_rows

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi"})

_BLOCK = 512
_NO_MEDIA, _NO_TEXT = 1, 2
_CONVERSATIONS = ("messages", "conversations")


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """The sample to which it belongs."""
        folder, slash, name = self.name.rpartition("/")
        stem = name.partition(".")[0]
        plain = not slash or all(part not in ("", ".") for part in folder.split("/"))  # as nearly all are: five times faster
        return f"{folder}{slash}{stem}" if plain else str(PurePosixPath(folder, stem))

    @property
    def ending(self) -> str:
        """What follows the first dot, in lower case: "jpg", "0.jpg"."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def suffix(self) -> str:
        """What follows the last dot: ".jpg"."""
        return f".{self.ending.rpartition('.')[2]}"


class TarSamples(FaultyRows):
    """The samples of one uncompressed tar, in the order in which they begin.

    Args:
        path: the file.
        name: how tables and errors call it; default: the file's name without ending.
        progress: show how far the index is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    root: Path | None = None  # all media are in the tar

    def __init__(self, path: Path, *, name: str = "", progress: Progress = False) -> None:
        self.path, self.name = path, name or path.stem
        self._index: FileIndex = open_index(path, "tar", _scan, progress=progress)

    def __len__(self) -> int:
        """Number of samples, orphans included."""
        return max(0, self._index.count("starts") - 1)

    @property
    def location(self) -> Path:
        """The index on disk."""
        return self._index.location

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """A sample, its media as `{"bytes", "path"}` with the name that they have in the tar, or what is wrong with it.

        Raises:
            IndexError: there is no such sample.
        """
        self.check_index(index, str(self.path))
        members = self.members(index)
        if lacks := int(self._index.section("lacks")[index]):
            return self._orphan(members, lacks)
        place = self._place(members)
        endings = [member.ending for member in members]
        if repeated := [ending for ending in endings if endings.count(ending) > 1]:
            found = f"{endings.count(repeated[0])} files of the ending .{repeated[0]}"
            return Fault("repeated-member", place, "", found, "one is expected", "Give each sample a name of its own.")
        with self.path.open("rb", buffering=0) as file:
            contents = [_read(file, member) for member in members]
        return _assemble(members, contents, place)

    def faults(self) -> Iterator[Fault]:
        """A tar that is cut off or broken in the middle, and samples without a picture or without a text."""
        if broken := self._index.notes["broken"]:
            remedy = "Fetch or write it again; what lies before that place can be read."
            yield Fault("truncated", str(self.path), "", broken, "a whole tar is expected", remedy)
        elif not self._index.notes["marked"]:
            found, expected = "no mark of its end", "two empty blocks are expected there"
            remedy = "Write it again if samples are missing: it was not closed."
            yield Fault("truncated", str(self.path), "", found, expected, remedy, "warning")
        if not len(self):
            yield no_rows(self.path, "at least one sample")
        lacks = self._index.section("lacks")
        for index in np.flatnonzero(lacks).tolist():
            yield self._orphan(self.members(index), int(lacks[index]))

    def members(self, index: int) -> list[Member]:
        """The files of a sample, and where they lie in the tar."""
        starts, spans, ends, text = (self._index.section(name) for name in ("starts", "spans", "name_ends", "names"))
        members = []
        for number in range(int(starts[index]), int(starts[index + 1])):
            begin = int(ends[number - 1]) if number else 0
            name = text[begin // 8 : -(-int(ends[number]) // 8)].tobytes()[begin % 8 :][: int(ends[number]) - begin]
            members.append(Member(name.decode("utf-8", "surrogateescape"), int(spans[2 * number]), int(spans[2 * number + 1])))
        return members

    def _place(self, members: list[Member]) -> str:
        return f"{self.path} sample {members[0].key}"

    def _orphan(self, members: list[Member], lacks: int) -> Fault:
        there = ", ".join(f".{member.ending}" for member in members)
        missing, remedy = ("an image", "or give it one") if lacks == _NO_MEDIA else ("a .txt or .json", "or write its text")
        found, expected = f"only {there}", f"{missing} of the same name is expected"
        return Fault("orphan", self._place(members), "", found, expected, f"Take the sample out, {remedy}.", media=lacks == _NO_MEDIA)


def _assemble(members: list[Member], contents: list[bytes], place: str) -> RawRow | Fault:
    """The fields of a sample."""
    values: dict[str, Any] = {}
    images: dict[str, dict[str, Any]] = {}
    for member, data in zip(members, contents, strict=True):
        stem = member.ending.rpartition(".")[0]
        if member.suffix == ".json":
            row = parse_row(data, place)
            if isinstance(row, Fault):
                return row
            values = {**row.values, **values}
        elif member.suffix == ".txt":
            try:
                values[stem or "caption"] = data.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                found = f"bytes that are not UTF-8 ({error.reason} at byte {error.start})"
                return Fault("encoding", place, f".{member.ending}", found, "UTF-8 is expected", "Save the text as UTF-8.")
        elif member.suffix in IMAGE_SUFFIXES:
            images[member.ending] = {"bytes": data, "path": member.name}
        elif member.suffix in VIDEO_SUFFIXES:
            values[stem or "video"] = {"bytes": data, "path": member.name}
        else:
            values[member.ending] = data
    listed = [one for name in ("image", "images") if images for one in _as_list(values.pop(name, None))]
    ordered = _ordered(listed, images, place)
    if isinstance(ordered, Fault):
        return ordered
    if len(ordered) == 1:
        values["image"] = ordered[0]
    elif ordered:
        values["images"] = ordered
        stems = {ending.rpartition(".")[0]: image for ending, image in images.items()}
        values.update({stem: image for stem, image in stems.items() if stem and not stem.isdigit()})
    return RawRow(values, place)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _ordered(listed: list[Any], images: dict[str, dict[str, Any]], place: str) -> list[dict[str, Any]] | Fault:
    """The pictures of a sample in the order in which its record names them, by file name or ending.

    A record that names none of them tells of paths from before the tar was packed: then the endings give the order.
    """
    by_name = {image["path"].rpartition("/")[2]: image for image in images.values()}
    by_name |= {ending: image for ending, image in images.items() if not ending.partition(".")[0].isdigit()}  # a number is no name
    names = [str(one).rpartition("/")[2] for one in listed]
    known = [name for name in names if name in by_name]
    if not known:
        return [images[ending] for ending in sorted(images, key=_natural)]
    if len(known) < len(names):
        missing = next(name for name in names if name not in by_name)
        found, expected = f"{missing!r} named beside {known[0]!r}", "each picture that is named is expected in the sample"
        return Fault("orphan", place, "image", found, expected, "Pack the sample again.", media=True)
    return [by_name[name] for name in names]


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """A sort key in which 10 comes after 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text) if part]


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _scan(file: BinaryIO, writer: IndexWriter) -> Notes:
    """Members in the order of their samples; which samples lack something; whether the tar is whole."""
    size = file.seek(0, 2)
    file.seek(0)
    samples: dict[str, list[Member]] = {}
    members = _Walk(file, size, writer)
    for member in members:
        samples.setdefault(member.key, []).append(member)
    ordered = [member for sample in samples.values() for member in sample]
    names = [member.name.encode("utf-8", "surrogateescape") for member in ordered]
    text = b"".join(names)
    writer.stream(np.cumsum([0, *map(len, samples.values())], dtype=np.int64))
    writer.add("spans", np.array([(member.offset, member.size) for member in ordered], dtype=np.int64).reshape(-1))
    writer.add("name_ends", np.cumsum([len(name) for name in names], dtype=np.int64))
    writer.add("names", np.frombuffer(text.ljust(-(-len(text) // 8) * 8, b"\0"), dtype="<i8"))
    writer.add("lacks", np.array([_lacks(file, sample) for sample in samples.values()], dtype=np.int64))
    return {"broken": members.broken, "marked": members.marked}


class _Walk:
    """The files of a tar, up to its end or to where it breaks."""

    def __init__(self, file: BinaryIO, size: int, writer: IndexWriter) -> None:
        self.broken, self.marked = "", False
        self._file, self._size, self._writer = file, size, writer

    def __iter__(self) -> Iterator[Member]:
        end, told = 0, 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
                    end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                    if member.isreg() and member.offset_data + member.size > self._size:
                        self.broken = f"a tar of {self._size} bytes that breaks off in {member.name}"
                        return
                    if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
                        yield Member(member.name, member.offset_data, member.size)
                    self._writer.advance(end - told)
                    told = end
        except tarfile.TarError as error:
            self.broken = f"a tar that breaks off after byte {end} ({error})"
            return
        self._file.seek(end)
        block = self._file.read(_BLOCK)
        self.marked = len(block) == _BLOCK
        if block.strip(b"\0"):
            self.broken = f"a tar that is broken at byte {end}"


def _lacks(file: BinaryIO, sample: list[Member]) -> int:
    """Whether a sample is without a picture or without anything beside it. A conversation without pictures lacks nothing."""
    media = [member for member in sample if member.suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if media:
        return _NO_TEXT if len(media) == len(sample) else 0
    for member in sample:
        if member.suffix == ".json":
            row = parse_row(_read(file, member), "")
            if isinstance(row, Fault) or any(name in row.values for name in _CONVERSATIONS):
                return 0  # what is broken is said when it is read
    return _NO_MEDIA
