"""Turns on the way from a record to messages: text in which `<image>` and `<video>` stand for media, and what may be wrong with it.

All formats of records become a `Draft` first: roles, pieces in reading order, and references to media that nobody has opened yet.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from metamorph.data.faults import Fault, Report
from metamorph.messages import Role

MediaKind: TypeAlias = Literal["image", "video"]

ROLE_NAMES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
"""Spellings of roles in published data, and the role each means."""

TAG = re.compile(r"<(image|video)>")
_ALMOST_TAG = re.compile(
    r"(?!(?-i:<image>|<video>))<[/|]?\s*(?:image|img|video)s?(?:[ _-]?(?:\d+|pad|placeholder|token))?\s*[/|]?>", re.IGNORECASE
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# What ends or begins a turn in the templates of common LLMs, and our own special tokens. In text it stays text; it is hardly meant.
MARKERS = re.compile(
    r"<image_start>|<image_end>|<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|endoftext|user|assistant|system)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>|^(?:USER|ASSISTANT|### ?(?:Human|Assistant)): ?",
    re.MULTILINE,
)


class Tag(NamedTuple):
    """The place of a medium in text."""

    kind: MediaKind


@dataclass(frozen=True)
class MediaRef:
    """An image or video that a record names: what stands there, unopened, and in which field."""

    kind: MediaKind
    value: Any
    field: str


Piece: TypeAlias = "str | MediaRef"


@dataclass(frozen=True)
class Turn:
    """One turn: role, pieces in reading order, and the field that holds it."""

    role: Role
    pieces: tuple[Piece, ...]
    field: str


@dataclass
class Draft:
    """A record whose structure is understood and whose media are not opened."""

    turns: list[Turn]
    id: str = ""
    source: str = ""
    kind: str = ""
    weight: float = 1.0
    is_pair: bool = False  # a caption and its image, without the words of a request


@dataclass
class Teller:
    """Reports the faults of one row; remembers whether one of them was an error."""

    report: Report
    place: str
    failed: bool = field(default=False)

    def fault(self, code: str, where: str, found: str, expected: str, remedy: str, *, warning: bool = False) -> None:
        """Report one."""
        self.tell(Fault(code, self.place, where, found, expected, remedy, "warning" if warning else "error"))

    def tell(self, fault: Fault) -> None:
        """Report one that is made already."""
        self.failed = self.failed or fault.severity == "error"
        self.report(fault)


def role_of(name: Any, where: str, teller: Teller) -> Role | None:
    """The role that a record's spelling means; reported where it means none."""
    if isinstance(name, str) and name.lower() in ROLE_NAMES:
        return ROLE_NAMES[name.lower()]
    nearest = difflib.get_close_matches(str(name).lower(), ROLE_NAMES, n=1)
    remedy = f"Did you mean {nearest[0]!r}?" if nearest else "Rename the role."
    teller.fault("role-unknown", where, f"role {name!r}", f"one of {', '.join(ROLE_NAMES)} is expected", remedy)
    return None


def text_of(value: Any, role: Role | None, where: str, teller: Teller) -> str | None:
    """The text of a turn; reported where there is none."""
    whose = "answer" if role == "assistant" else "turn"
    if value is None:
        teller.fault(f"{whose}-null", where, "null", "text is needed", "Fill it or drop the row.")
    elif not isinstance(value, str):
        kind = "a number" if isinstance(value, (int, float)) and not isinstance(value, bool) else f"{type(value).__name__}"
        remedy = "Choose one text." if isinstance(value, (list, tuple)) else "Write it as text (in JSON: in quotes)."
        teller.fault("text-type", where, f"{kind} ({value!r:.40})", "text is needed", remedy)
    elif not value.strip():
        teller.fault(f"{whose}-empty", where, "empty text", "text or an image is needed", "Fill it or drop the row.")
    else:
        return value
    return None


def split_tags(text: str, role: Role | None, where: str, teller: Teller) -> list[str | Tag]:
    """Text cut at its tags; tags where none can be meant are reported."""
    code = _code_in(text)
    pieces: list[str | Tag] = []
    end = 0
    for match in TAG.finditer(text):
        start, after = match.span()
        before_word, after_word = text[start - 1 : start], text[after : after + 1]
        if _is_within(start, code):
            _stray(teller, where, match.group(), "inside code")
        elif _in_word(before_word) and _in_word(after_word):
            _stray(teller, where, match.group(), f"inside the word {_word_around(text, start, after)!r}")
        elif role == "system":
            teller.fault(
                "image-in-system", where, f"{match.group()} in a system turn", "only text is allowed there", "Move it to the user's turn."
            )
        pieces.append(text[end:start])
        pieces.append(Tag("image" if match.group(1) == "image" else "video"))
        end = after
    pieces.append(text[end:])
    _check_almost_tags(text, where, teller)
    return _stripped(pieces)


def _code_in(text: str) -> list[tuple[int, int]]:
    """Where code begins and ends, by its backticks."""
    return [match.span() for match in _CODE.finditer(text)] if "`" in text else []


def _is_within(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(first <= position < last for first, last in spans)


def _outside_code(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The first match that is not in code."""
    code: list[tuple[int, int]] | None = None
    for match in pattern.finditer(text):
        code = _code_in(text) if code is None else code  # most texts have no match at all
        if not _is_within(match.start(), code):
            return match
    return None


def _check_almost_tags(text: str, where: str, teller: Teller) -> None:
    """Warn of what looks like a tag and is none, such as `<Image>` or `<image_1>`: it is read as text."""
    if match := _outside_code(_ALMOST_TAG, text):
        kind = "video" if "vid" in match.group().lower() else "image"
        expected = f"<{kind}> is what shows one (this is read as text)"
        teller.fault("tag-unknown", where, f"{match.group()!r} in the text", expected, f"Write <{kind}>, or remove it.", warning=True)


def _stripped(pieces: list[str | Tag]) -> list[str | Tag]:
    """Texts without the white space that sets a tag apart, and without what is then empty.

    Line breaks beside a tag are dropped, with the spaces around them; so are spaces beside a tag that begins or ends the turn.
    Between words a tag keeps its spaces.
    """
    last = len(pieces) - 1  # texts are at even places, perhaps empty; tags between them
    begins, ends = not str(pieces[0]).strip(), not str(pieces[last]).strip()
    result: list[str | Tag] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            text = piece
            if number and ("\n" in _leading(text) or (begins and number == 2)):
                text = text.lstrip()
            if number < last and ("\n" in _trailing(text) or (ends and number == last - 2)):
                text = text.rstrip()
            result += [text] if text.strip() else []
        else:
            result.append(piece)
    return result


def _leading(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _trailing(text: str) -> str:
    return text[len(text.rstrip()) :]


def _in_word(letter: str) -> bool:
    return (letter.isalnum() and letter.isascii()) or letter == "_"  # scripts without spaces set tags between letters


def _word_around(text: str, start: int, end: int) -> str:
    left = re.search(r"\w*$", text[:start])
    right = re.match(r"\w*", text[end:])
    return (left.group() if left else "") + text[start:end] + (right.group() if right else "")


def _stray(teller: Teller, where: str, tag: str, inside: str) -> None:
    teller.fault(
        "tag-in-text",
        where,
        f"{tag} {inside}",
        "a place for an image stands by itself",
        "Set it apart by spaces; where the word itself is meant, write the turn as a list of parts, in which text is literal.",
    )


def check_markers(text: str, where: str, teller: Teller) -> None:
    """Warn of special tokens and role markers spelled in text: they are read as plain text."""
    if match := _outside_code(MARKERS, text):
        teller.fault(
            "marker-in-text",
            where,
            f"{match.group().strip()!r} in the text",
            "no special token or role marker is expected there (it is read as plain text)",
            "Remove it if it is left over from another format.",
            warning=True,
        )


class MediaQueue:
    """The media lists of a record, handed out to its tags in reading order; in the end the two must match."""

    def __init__(self, images: Iterable[MediaRef], videos: Iterable[MediaRef]) -> None:
        self._refs = {"image": list(images), "video": list(videos)}
        # Published video data writes <image> for a video too, where the record has no images.
        self._only = "video" if self._refs["video"] and not self._refs["image"] else None
        self._given = {kind: len(refs) for kind, refs in self._refs.items()}
        self._asked = {"image": 0, "video": 0}
        self._first: dict[str, tuple[str, str]] = {}  # by which tag the first medium of a kind is asked for, and where

    def has(self, kind: MediaKind) -> bool:
        """Whether the record lists any of a kind, or a video where `<image>` means one."""
        return bool(self._given[kind]) or (kind == "image" and self._only is not None)

    def take(self, kind: MediaKind, where: str) -> MediaRef | None:
        """The next medium of a kind, for a place in the field `where`."""
        tag = f"<{kind}>"
        kind = self._only if kind == "image" and self._only else kind  # pyright: ignore[reportAssignmentType]
        self._asked[kind] += 1
        self._first.setdefault(kind, (tag, where))
        number = self._asked[kind] - 1
        return self._refs[kind][number] if number < len(self._refs[kind]) else None

    def check(self, fields: dict[str, str], teller: Teller) -> None:
        """Report where tags and media differ in number."""
        for kind, given in self._given.items():
            asked = self._asked[kind]
            if asked == given:
                continue
            tag, where = self._first.get(kind, (f"<{kind}>", ""))
            remedy = f"Write one {tag} for each {kind}, where it is to be seen"
            remedy += "." if given else "; if the word itself is meant, write the turn as a list of parts."
            teller.fault(
                "too-few-media" if asked > given else "too-many-media",
                fields[kind] if given else where,  # a field that the row has
                f"{_several(asked, tag)} in the text",
                f"{_several(given, kind)} given",
                remedy,
            )


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 or what.startswith("<") else f"{number} {what}s"


def check_order(turns: list[Turn], where: str, teller: Teller, *, needs_answer: bool) -> None:
    """Report turns whose roles do not alternate after an optional system turn, or none from which something can be learned."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if not spoken:
        teller.fault("no-turns", where, "no turn of a user", "at least one is needed", "Add the user's turn.")
        return
    for number, turn in enumerate(spoken):
        expected: Role = "assistant" if number % 2 else "user"
        if turn.role == expected:
            continue
        if number == 0 and turn.role == "assistant":
            code, found = "assistant-first", "the assistant speaks first"
        elif turn.role == "system":
            code, found = "system-late", "a system turn inside the conversation"
        else:
            code, found = "roles-repeat", f"two {turn.role} turns in a row"
        remedy = "Put one optional system turn first, then alternate user and assistant."
        teller.fault(code, turn.field, found, f"a turn of the {expected} is expected", remedy)
        break
    if needs_answer and all(turn.role != "assistant" for turn in turns):
        teller.fault("no-answer", where, "no assistant turn", "at least one is needed to learn from", "Add the answer or drop the row.")
