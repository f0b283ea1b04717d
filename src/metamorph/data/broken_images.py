"""Images that `metamorph data encode` could not decode: a store has no tokens of them, but remembers them and why, beside its tokens.

`broken.jsonl` only ever grows: a run over other data adds to it. An image stands in it by its hash (`media.image_hash`), so a file that was
repaired is another image; and one that decodes after all, by another library, is in the store's index, which is asked first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metamorph.data.faults import Fault
from metamorph.errors import DataError
from metamorph.media import describe_source
from metamorph.messages import ImageSource

BROKEN = "broken.jsonl"
_OF_READING = frozenset({"image-missing", "image-unreadable"})
"""Codes of faults that say nothing about an image of this content: its file was there when it was hashed, and then it was not."""


class BrokenImages:
    """The broken images of a store; read when first asked for, and pickled without what was read. One process may add to them.

    Args:
        directory: the store.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / BROKEN
        self._read: dict[bytes, Fault] | None = None

    @property
    def faults(self) -> dict[bytes, Fault]:
        """By the image's hash, each once and with what was found last; without a place, for any row may name it."""
        if self._read is None:
            self._read = dict(_parsed(self._path.read_bytes())) if self._path.is_file() else {}
        return self._read

    def error(self, key: bytes, image: ImageSource, place: str) -> DataError | None:
        """Why an image has no tokens, for the row that names it; None if nobody tried to encode it."""
        if (fault := self.faults.get(key)) is None:
            return None
        remedy = f"{fault.remedy} Then encode the data again: metamorph data encode."
        return replace(fault, place=place, field=describe_source(image), remedy=remedy).error()

    def add(self, faults: Mapping[bytes, Fault]) -> None:
        """Write down those that are new, or broken in another way than they were; but none whose file just could not be read."""
        new = {key: fault for key, fault in faults.items() if fault.code not in _OF_READING and self.faults.get(key) != fault}
        if not new:
            return
        self.faults.update(new)
        with self._path.open("ab+") as listing:
            if listing.tell():
                listing.seek(-1, os.SEEK_END)
                if listing.read() != b"\n":  # the end of a line at which a process was killed
                    listing.write(b"\n")
            listing.writelines(_line(key, fault) for key, fault in new.items())

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: another process reads it itself."""
        return vars(self) | {"_read": None}


def _parsed(lines: bytes) -> Iterator[tuple[bytes, Fault]]:
    for line in lines.splitlines():
        try:
            told = json.loads(line)
            yield bytes.fromhex(told.pop("image")), Fault(**told, place="", field="", media=True)
        except (ValueError, TypeError, KeyError, AttributeError):  # where a process was killed: an image that nobody tried
            continue


def _line(key: bytes, fault: Fault) -> bytes:
    told = {"image": key.hex(), "code": fault.code, "found": fault.found, "expected": fault.expected, "remedy": fault.remedy}
    return json.dumps(told).encode() + b"\n"
