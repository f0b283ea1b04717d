"""What readers of published data sets share: a source of converted rows, and fields read with errors that name file, line and field."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from metamorph.data.containers import open_rows
from metamorph.data.faults import Fault, Report, from_error, raise_errors
from metamorph.data.kinds import Turn
from metamorph.data.media_faults import fault_of_image
from metamorph.data.rows import RawRow, Rows, refuse_broken_files
from metamorph.data.turns import Teller, role_of, text_of
from metamorph.errors import ConfigError, DataError, MediaError, MetaMorphError, RecordError
from metamorph.messages import Example, ImageSource, resolve_inside

Convert: TypeAlias = Callable[[RawRow, np.random.Generator], Example]
_TAG = re.compile(r"[ \t]*<(?:image|video)>[ \t]*\n?")


@runtime_checkable
class RandomRows(Protocol):
    """Rows that can be read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawRow: ...


@dataclass(frozen=True)
class PublishedSource:
    """Rows of a published data set as examples: an `ExampleSource`, each row a pure function of its number and the seed.

    Attributes:
        rows: the rows as they are published.
        convert: a row and its randomness as an example; a function that can be sent to other processes.
        name: how tables and errors call the source.
        seed: with the name and the row's number, of all that is drawn for it.
    """

    rows: RandomRows
    convert: Convert
    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} but at least 0 is needed (source {self.name}). Choose another.")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Row `index` (from 0) as an example.

        Raises:
            RecordError, MediaError: it cannot be used; the message names file and line.
            IndexError: there is no such row.
        """
        raw = self.rows[index]
        try:
            return self._converted(raw, index)
        except DataError as error:
            if raw.place in str(error):
                raise
            raise type(error)(f"{error} [{raw.place}]") from error

    def row_or_fault(self, index: int) -> RawRow | Fault:
        """Row `index` as it is published, or what is wrong with it.

        Raises:
            IndexError: there is no such row.
        """
        return self.rows.row_or_fault(index) if isinstance(self.rows, Rows) else self.rows[index]

    def examine(self, raw: RawRow, index: int, report: Report) -> Example | None:
        """Row `index` as an example; what its reader refuses is told to `report`, and leaves None."""
        try:
            return self._converted(raw, index)
        except MetaMorphError as error:
            report(_fault_of(error, raw))
            return None

    def _converted(self, raw: RawRow, index: int) -> Example:
        return self.convert(raw, np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), index)))


def _fault_of(error: MetaMorphError, raw: RawRow) -> Fault:
    """What a reader refused, as a fault of its row; where the error names a file instead, such as a video, with that file."""
    fault, said = from_error(error, "row-refused", raw.place), str(error)
    before, after = f"{fault.found} but {fault.expected} (", f"). {fault.remedy}"
    if not said.startswith(before) or not said.endswith(after):
        return fault
    where = said[len(before) : len(said) - len(after)]
    if where == raw.place or where.startswith(f"{raw.place}, "):
        return replace(fault, field=where[len(raw.place) + 2 :])
    return replace(fault, found=f"{fault.found} ({where})", field=field_of(raw, Path(where)))


def field_of(raw: RawRow, medium: ImageSource) -> str:
    """The field of a row that names or holds an image or video; "" where none does, as of a picture that was cut out of another."""
    for name, value in raw.values.items():
        several = isinstance(value, (list, tuple))
        for number, one in enumerate(value if several else (value,)):
            if _is_of(one, medium):
                return f"{name}[{number}]" if several else str(name)
    return ""


def _is_of(value: Any, medium: ImageSource) -> bool:
    if isinstance(value, Mapping):
        value = _stored(value)
    if isinstance(medium, Path) and isinstance(value, str) and value:
        parts = Path(value).parts
        return medium.parts[-len(parts) :] == parts
    return isinstance(value, bytes) and isinstance(medium, bytes) and value == medium


def _stored(value: Mapping[str, Any]) -> Any:
    """Of Hugging Face's `{"bytes", "path"}`, what is given."""
    return value.get("bytes") if value.get("bytes") is not None else value.get("path")


def identity(raw: RawRow, name: str, *fields: str) -> dict[str, str]:
    """What rows of all kinds have: the row's own id (default: the field `id`), or else its place; the source; the place."""
    own = [raw.values.get(field) for field in fields or ("id",)]
    return {"id": raw.place if None in own else ":".join(map(str, own)), "source": name, "origin": raw.place}


def text_field(raw: RawRow, name: str) -> str:
    """A field that must be text.

    Raises:
        RecordError: it is missing or something else.
    """
    return typed(raw, raw.values.get(name), str, name, "text")


def list_field(raw: RawRow, name: str) -> list[Any]:
    """A field that must be a list that is not empty.

    Raises:
        RecordError: it is missing, empty, or something else.
    """
    values = list(typed(raw, raw.values.get(name), (list, tuple, np.ndarray), name, "a list"))
    if not values:
        raise Fault("list-empty", raw.place, name, "an empty list", "at least 1 item is needed", "Fill it or drop the row.").error()
    return values


def typed(raw: RawRow, value: Any, kind: type | tuple[type, ...], field: str, expected: str) -> Any:
    """A value of a row that must be of some type.

    Raises:
        RecordError: it is not.
    """
    if not isinstance(value, kind):
        found = "null or no field" if value is None else f"{type(value).__name__} ({value!r:.40})"
        code = "field-missing" if value is None else "field-type"
        raise Fault(code, raw.place, field, found, f"{expected} is needed", "Correct the row.").error()
    return value


def image_of(raw: RawRow, value: Any, root: Path | None, field: str) -> ImageSource:
    """An image that a row names or holds: the path of a file below `root`, or bytes, also within Hugging Face's `{"bytes", "path"}`.

    Raises:
        RecordError: it is neither.
        MediaError: there is no such file, or it lies outside the root.
    """
    if isinstance(value, Mapping):
        value = _stored(value)
    if isinstance(value, bytes):
        return value
    path = _inside(raw, value, root, field)
    check_there(raw, path, root, field)
    return path


def check_there(raw: RawRow, image: Path, root: Path | None, field: str) -> None:
    """Refuse an image of a row of which there is no file, with what may be meant.

    Raises:
        MediaError: there is none.
    """
    if image.is_file():
        return
    named = image.relative_to(root) if root is not None else image
    fault = fault_of_image(named, place=raw.place, field=field, root=root, decode=False)
    raise MediaError(f"no file {str(image)!r} but an image is needed ({raw.place}, {field}).") if fault is None else fault.error()


def video_of(raw: RawRow, value: Any, root: Path, field: str) -> Path:
    """The path of a video that a row names.

    Raises:
        RecordError: it names none.
        MediaError: there is no such file, or it lies outside the root.
    """
    path = _inside(raw, value, root, field)
    if not path.is_file():
        remedy = "Fetch it, or check the folder of videos."
        raise Fault("video-missing", raw.place, field, f"no file {str(path)!r}", "a video is needed", remedy, media=True).error()
    return path


def _inside(raw: RawRow, value: Any, root: Path | None, field: str) -> Path:
    text = typed(raw, value, str, field, "the path of a file")
    if root is None:
        expected, remedy = "rows of this file carry their bytes", "Name the folder of images."
        raise Fault("image-path", raw.place, field, f"the path {text!r}", expected, remedy).error()
    try:
        return resolve_inside(Path(text), root, f"{raw.place}, {field}")
    except MediaError as error:
        raise from_error(error, "path-outside", raw.place, field).error() from error


def exchanges(raw: RawRow, field: str = "conversations") -> tuple[Turn, ...]:
    """LLaVA's `conversations` as questions and answers in turn, without the tags that stand for what is shown.

    Raises:
        RecordError: turns are malformed, do not alternate between human and gpt, or end in a question.
    """
    said = [_spoken(raw, item, f"{field}[{number}]") for number, item in enumerate(list_field(raw, field))]
    for number, (role, _) in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            code = "assistant-first" if (number, role) == (0, "assistant") else "roles-repeat"
            found, wanted, remedy = f"a turn of the {role}", f"one of the {expected} is expected", "Alternate human and gpt, human first."
            raise Fault(code, raw.place, f"{field}[{number}]", found, wanted, remedy).error()
    if len(said) % 2:
        wanted = "an answer to each question is needed"
        raise Fault("no-answer", raw.place, field, f"{len(said)} turns", wanted, "Add the last answer.").error()
    return tuple(Turn(said[number][1], said[number + 1][1]) for number in range(0, len(said), 2))


def _spoken(raw: RawRow, item: Any, where: str) -> tuple[str, str]:
    teller = Teller(raise_errors, raw.place)
    turn = typed(raw, item, Mapping, where, "a turn with from and value")
    role = role_of(turn.get("from"), f"{where}.from", teller)
    assert role is not None  # faults raise
    value = text_of(turn.get("value"), role, f"{where}.value", teller)
    assert value is not None
    return role, _TAG.sub("", value).strip() if role == "user" else value.strip()


def frames_of(raw: RawRow, value: Any, root: Path, field: str) -> Path:
    """The folder of frames that a row names.

    Raises:
        RecordError: it names none.
        MediaError: there is no such folder, or it lies outside the root.
    """
    path = _inside(raw, value, root, field)
    if not path.is_dir():
        found, expected = f"no folder {str(path)!r}", "one of frames is needed"
        raise Fault("video-missing", raw.place, field, found, expected, "Unpack its archive.", media=True).error()
    return path


def open_records(files: Sequence[Path], root: Path | None, name: str, *, whole_files: bool = True) -> Rows:
    """The rows of files, one after the other.

    Args:
        files: of any kind that `open_rows` knows.
        root: the folder to which paths in them are relative; None where rows carry their bytes.
        name: how tables and errors call them.
        whole_files: refuse a file that is broken as a whole now; off for checks, which tell it with all else that is wrong.

    Raises:
        RecordError: a file cannot be read, is cut off, or holds no rows.
    """
    rows = open_rows(files, image_root=root, name=name, progress=True)
    if whole_files:
        refuse_broken_files(rows)
    return rows


def folder(directory: str | Path, *, holds: str) -> Path:
    """The folder of a data set.

    Raises:
        RecordError: there is none; `holds` says what should be in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise RecordError(f"no folder but one that holds {holds} is needed ({path}). Unpack the data set there or name another folder.")
    return path


def existing(paths: Sequence[Path], *, holds: str) -> list[Path]:
    """The files of a data set, all of which must be there.

    Raises:
        RecordError: there is no file, or one is missing.
    """
    for path in paths:
        if not path.is_file():
            raise RecordError(f"no such file but {holds} is needed ({path}). Fetch it, or name other files in the recipe.")
    if not paths:
        raise RecordError(f"0 files but at least 1 is needed: {holds}. Name one in the recipe.")
    return list(paths)
