"""How the six kinds of data are worded: sentences from `phrasings.toml`, checked once when they are read.

A sentence that lacks what it must say (`{caption}`) or asks for what nobody fills in (`{captoin}`) is refused on load, not at step 100.
"""

from __future__ import annotations

import difflib
import string
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np

from metamorph.errors import ConfigError


@dataclass(frozen=True)
class Wording:
    """Sentences of one meaning."""

    sentences: tuple[str, ...]

    def draw(self, rng: np.random.Generator, **values: str) -> str:
        """One of the sentences, all equally likely, filled in. Braces within values are left alone."""
        return self.sentences[int(rng.integers(len(self.sentences)))].format(**values)


@dataclass(frozen=True)
class Placeholders:
    """What the sentences of an entry must hold, what they may hold, and whether one may be empty."""

    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    silent: bool = False


def _needs(*names: str) -> Placeholders:
    return Placeholders(needs=frozenset(names))


@dataclass(frozen=True)
class ImageQAWording:
    """For an answer without a question: a request to describe the image."""

    describe: Annotated[Wording, _needs()]


@dataclass(frozen=True)
class GenerationWording:
    """A request for the picture of a caption, and what is said before the picture."""

    request: Annotated[Wording, _needs("caption")]
    reply: Annotated[Wording, _needs()]


@dataclass(frozen=True)
class VideoQAWording:
    """For an answer without a question: a request to describe the video."""

    describe: Annotated[Wording, _needs()]


@dataclass(frozen=True)
class FramesWording:
    """The variants of frame prediction; each says how many frames it shows and, unless that is plain, how many it asks for."""

    forward: Annotated[Wording, _needs("shown", "asked")]
    completion: Annotated[Wording, _needs("shown", "asked")]
    reverse: Annotated[Wording, _needs("shown", "asked")]
    fill_in: Annotated[Wording, _needs("shown", "asked")]
    reorder: Annotated[Wording, Placeholders(needs=frozenset({"shown"}), may=frozenset({"asked"}))]
    interval_question: Annotated[Wording, _needs("shown")]
    interval_answer: Annotated[Wording, _needs("interval")]


@dataclass(frozen=True)
class ThinkingWording:
    """A phrase that asks to think visually, and what is said before a key region or a picture with marks."""

    request: Annotated[Wording, _needs()]
    reply: Annotated[Wording, _needs()]
    marked_reply: Annotated[Wording, Placeholders(may=frozenset({"names"}))]


@dataclass(frozen=True)
class EditWording:
    """A request to change a picture, and what is said before the changed one."""

    request: Annotated[Wording, _needs("instruction")]
    reply: Annotated[Wording, Placeholders(silent=True)]


@dataclass(frozen=True)
class Phrasings:
    """All wording, one section for each kind of data."""

    image_qa: ImageQAWording
    generation: GenerationWording
    video_qa: VideoQAWording
    frames: FramesWording
    thinking: ThinkingWording
    edit: EditWording


def load_phrasings(path: Path | None = None) -> Phrasings:
    """The wording that comes with MetaMorph, changed by the entries of a TOML file of the same layout, if one is given.

    Raises:
        ConfigError: the file cannot be read, or an entry is unknown, empty, or has other placeholders than it must.
    """
    return DEFAULT if path is None else _merge(DEFAULT, _read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"a file that cannot be read ({error.strerror}) but TOML is needed ({path}). Check the path.") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise ConfigError(f"a file that is no TOML ({error}) but TOML in UTF-8 is needed ({path}). Correct the file.") from error


def _merge(base: Phrasings, table: Mapping[str, Any], place: str) -> Phrasings:
    """`base` with the sections and entries of a table in place of its own."""
    _check_names(table, {entry.name for entry in fields(base)}, "section", place)
    changes: dict[str, Any] = {}
    for section, entries in table.items():
        where = f"{place} [{section}]"
        if not isinstance(entries, dict):
            raise ConfigError(f"{type(entries).__name__} but a section of entries is needed ({where}). Write [{section}] on its own line.")
        changes[section] = replace(getattr(base, section), **_section(type(getattr(base, section)), entries, where))
    return replace(base, **changes)


def _section(kind: type, entries: Mapping[str, Any], place: str) -> dict[str, Wording]:
    """The entries of one section, checked against the fields of its class."""
    known = {name: hint.__metadata__[0] for name, hint in get_type_hints(kind, include_extras=True).items()}
    _check_names(entries, set(known), "entry", place)
    return {name: _checked(value, known[name], f"{place} {name}") for name, value in entries.items()}


def _checked(value: Any, rule: Placeholders, place: str) -> Wording:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{value!r} but a list of at least 1 sentence is needed ({place}). Write it in brackets.")
    for number, sentence in enumerate(value, start=1):
        where = f"{place}, sentence {number} of {len(value)}"
        if not isinstance(sentence, str) or not (sentence.strip() or rule.silent):
            raise ConfigError(f"{sentence!r} but some text is needed ({where}). Write a sentence or drop the entry.")
        found = _placeholders(sentence, where)
        if missing := rule.needs - found:
            raise ConfigError(f"{sentence!r} without {_braced(missing)} but it must say that ({where}). Put {_braced(missing)} in.")
        if unknown := found - rule.needs - rule.may:
            allowed = _braced(rule.needs | rule.may) or "no placeholders"
            raise ConfigError(f"{sentence!r} with {_braced(unknown)} but {allowed} can be filled in here ({where}). Rename or drop it.")
    return Wording(tuple(value))


def _placeholders(sentence: str, place: str) -> set[str]:
    """The names in braces, which must be bare: no attributes, conversions or formats."""
    try:
        parsed = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(sentence) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"{sentence!r} with a loose brace ({error}) but names in braces are needed ({place}). Double it: {{{{."
        ) from error
    for name, spec, conversion in parsed:
        if spec or conversion or not name.isidentifier():
            raise ConfigError(f"{sentence!r} with {{{name}}} but a bare name in braces is needed ({place}). Write {{name}}.")
    return {name for name, _, _ in parsed}


def _check_names(found: Mapping[str, Any], known: Set[str], what: str, place: str) -> None:
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {close[0]!r}?" if close else "Rename or drop it."
            raise ConfigError(f"unknown {what} {name!r} but only {sorted(known)} are known ({place}). {remedy}")


def _braced(names: Set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def _load_default() -> Phrasings:
    """The file beside this one, which must hold every section and every entry."""
    path = Path(__file__).with_suffix(".toml")
    table, sections = _read(path), {}
    for name, kind in get_type_hints(Phrasings).items():
        sections[name] = kind(**_section(kind, table.pop(name), f"{path.name} [{name}]"))
    _check_names(table, set(sections), "section", path.name)
    return Phrasings(**sections)


DEFAULT = _load_default()
"""The wording that comes with MetaMorph."""
