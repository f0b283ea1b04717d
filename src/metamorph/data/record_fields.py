"""The fields by which formats of records are told apart, and which of them each format reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from metamorph.data.turns import TAG
from metamorph.errors import ConfigError

Format: TypeAlias = Literal["llava", "messages", "metamorph", "qa", "pairs"]
FORMATS: tuple[Format, ...] = get_args(Format)

CAPTIONS = ("caption", "text", "txt")
IMAGES, VIDEOS = ("image", "images"), ("video", "videos")
FILE_NAMES = ("file_name", "filename")  # as Hugging Face's imagefolder calls the image
_STRICT_PARTS = {"text": {"type", "text"}, "image": {"type", "path", "base64", "visual_tokens"}, "video": {"type", "frames", "fps"}}
KNOWN = ("conversations", "messages", "question", "answer", *CAPTIONS, *IMAGES, *VIDEOS, *FILE_NAMES)
_HEADER = ("id", "source", "kind", "weight")
STRICT = {*_HEADER, "messages"}
FIELDS = (*KNOWN, "system", *_HEADER)
"""Every field that some format reads."""


def fields_of(kind: Format | None) -> set[str]:
    """The fields that a format reads; None = any of them."""
    if kind is None:
        return set(FIELDS)
    turns = {"llava": ("conversations",), "qa": ("question", "answer"), "pairs": CAPTIONS}.get(kind, ("messages",))
    return {*turns, *_HEADER, *IMAGES, *FILE_NAMES, *(() if kind == "pairs" else (*VIDEOS, "system"))}


def detect(values: Mapping[str, Any]) -> Format | None:
    """The format that a row's fields tell; None where they tell none."""
    if "conversations" in values:
        return "llava"
    if "messages" in values:
        return "metamorph" if _is_strict(values) else "messages"
    if "question" in values and "answer" in values:
        return "qa"
    if any(name in values for name in CAPTIONS) and any(name in values for name in (*IMAGES, *FILE_NAMES)):
        return "pairs"
    return None


def _is_strict(values: Mapping[str, Any]) -> bool:
    """Whether every field and part is one of ours, and no string holds a tag (which only a part of its own takes literally)."""
    if not set(values) <= STRICT or not isinstance(values["messages"], list):
        return False
    contents = [turn.get("content") for turn in values["messages"] if isinstance(turn, Mapping)]
    if any(isinstance(content, str) and TAG.search(content) for content in contents):
        return False
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    strict = [set(part) <= _STRICT_PARTS.get(str(part.get("type")), set()) for part in parts]
    bare = any(part.get("type") == "image" and len(part) == 1 for part in parts)  # takes the next of a list that is not there
    return all(strict) and not bare


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is nearly a known one; "" where it is none, or known."""
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return f"Did you mean {found[0]!r} by {name!r}?" if found and found[0] != name else ""


def nearest_column(name: str, columns: Iterable[str]) -> str:
    """The remedy for a column that a file does not have."""
    found = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    return f"Did you mean {found[0]!r}?" if found else "Correct the mapping or leave it out."


def check_columns(columns: Mapping[str, str], where: str) -> None:
    """Refuse a mapping of fields that nobody reads.

    Raises:
        ConfigError: a name is none of ours, with the nearest that is.
    """
    for ours in columns:
        if ours not in FIELDS:
            remedy = nearest(ours, FIELDS) or "Write our name first, the file's behind it."
            raise ConfigError(f"a column for {ours!r} but one of {', '.join(FIELDS)} is expected ({where}). {remedy}")
