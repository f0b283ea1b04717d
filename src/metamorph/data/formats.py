"""What a row means: published formats of records, told apart by their fields, each read into a `Draft` of turns and media.

    llava     {"id", "image": "a.jpg" | [...], "video", "conversations": [{"from": "human", "value": "<image> What is it?"}, ...]}
    messages  {"messages": [{"role", "content": "<image>What is it?"}, ...], "images": [...], "videos": [...]}, or content as a list of
              parts: text; image, image_url or video with a path, URL, data URL or base64, or with nothing: the next of `images`
    metamorph the records of `metamorph.messages`, fields checked strictly
    qa        {"image", "question", "answer"}
    pairs     {"image", "caption" | "text"}: the caption is asked for, the image is the answer

A tag (`<image>`, `<video>`) in an answer makes its image a target, as everything is that the assistant says. A field `system` beside the
turns is the system's turn, as other training tools write it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metamorph.data.record_fields import CAPTIONS, FILE_NAMES, KNOWN, STRICT, Format, detect, nearest
from metamorph.data.rows import RawRow
from metamorph.data.turns import (
    TAG,
    Draft,
    MediaKind,
    MediaQueue,
    MediaRef,
    Piece,
    Teller,
    Turn,
    check_markers,
    role_of,
    split_tags,
    text_of,
)
from metamorph.media import format_of_name
from metamorph.messages import Role

_TEXT_PARTS = ("text", "input_text", "output_text")
_NEEDED = {"llava": "conversations", "messages": "messages", "metamorph": "messages"}


def draft_of(raw: RawRow, kind: Format | None, teller: Teller) -> Draft | None:
    """A row as turns and media; None, and reported, where its structure cannot be understood.

    Args:
        raw: the row, its fields under our names.
        kind: the format of the file; None = what this row's fields tell.
        teller: takes the faults.
    """
    found = detect(raw.values)
    chosen = kind or found
    if chosen is None:
        _tell_unknown(raw.values, teller)
        return None
    if (needed := _NEEDED.get(chosen)) is not None and needed not in raw.values:
        _tell_missing(needed, raw.values, teller)
        return None
    if chosen == "metamorph":  # other fields may be another's data; one that is nearly ours is a typo
        for name in sorted(map(str, set(raw.values) - STRICT)):
            if remedy := nearest(name, STRICT):
                teller.fault("field-unknown", name, f"unknown field {name!r}", f"only {', '.join(sorted(STRICT))} are known", remedy)
    draft = _READERS[chosen](raw.values, teller)
    if draft is not None:
        _read_header(draft, raw, teller)
        _read_system(draft, raw.values.get("system"), teller)
    return draft


def _tell_unknown(values: Mapping[str, Any], teller: Teller) -> None:
    found = f"fields {', '.join(sorted(map(str, values))) or 'none'}"
    expected = "conversations, messages, question and answer, or image and caption are expected"
    teller.fault("format-unknown", "", found, expected, _nearest_field(values) or "Map other names with `columns`.")


def _tell_missing(needed: str, values: Mapping[str, Any], teller: Teller) -> None:
    remedy = _nearest_field(values) or "Add it or drop the row."
    teller.fault("field-missing", needed, f"only {', '.join(sorted(map(str, values))) or 'no fields'}", f"{needed} is needed", remedy)


def _nearest_field(values: Mapping[str, Any]) -> str:
    return next((said for name in values if (said := nearest(str(name), KNOWN))), "")


def _read_header(draft: Draft, raw: RawRow, teller: Teller) -> None:
    """Id, source, kind and weight, where the row has them; its id is its place otherwise."""
    values = raw.values
    identity = values.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int))):
        teller.fault("id-type", "id", f"{identity!r:.40}", "a string or an integer is needed", "Correct or drop it.")
    draft.id = raw.place if identity is None else str(identity)
    for name in ("source", "kind"):
        value = values.get(name)
        if isinstance(value, str):
            setattr(draft, name, value)
    weight = values.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        teller.fault("weight", "weight", f"{weight!r:.40}", "a finite number of at least 0 is needed", "Correct or drop it.")
        return
    draft.weight = float(weight)


def _read_system(draft: Draft, value: Any, teller: Teller) -> None:
    """The words of the system, where a field of their own holds them; an empty one says nothing."""
    if draft.is_pair or value is None or (isinstance(value, str) and not value.strip()):
        return
    text = text_of(value, "system", "system", teller)
    if text is None:
        return
    if draft.turns and draft.turns[0].role == "system":
        if draft.turns[0].pieces != (text,):
            found, remedy = "other words than the system's turn has", "Leave one of the two out."
            teller.fault("system-twice", "system", found, "the system speaks once", remedy)
        return
    check_markers(text, "system", teller)
    words = "".join(piece for piece in split_tags(text, "system", "system", teller) if isinstance(piece, str))
    draft.turns.insert(0, Turn("system", (words,), "system"))


def _llava(values: Mapping[str, Any], teller: Teller) -> Draft | None:
    """`conversations` with from and value; tags take the media of the row in order."""
    return _tagged(values, "conversations", ("from", "value"), teller)


def _messages(values: Mapping[str, Any], teller: Teller) -> Draft | None:
    """`messages` with role and content, the content a string with tags or a list of parts."""
    return _tagged(values, "messages", ("role", "content"), teller)


def _tagged(values: Mapping[str, Any], name: str, keys: tuple[str, str], teller: Teller) -> Draft | None:
    items = values[name]
    if not isinstance(items, list) or not items:
        found = "an empty list" if isinstance(items, list) else type(items).__name__ if items is not None else "null"
        remedy = "Write the list itself, not its text." if isinstance(items, str) else "Fill it or drop the row."
        teller.fault("turns-missing", name, found, "a list of turns is needed", remedy)
        return None
    fields = {kind: _field_of(values, kind) for kind in ("image", "video")}
    if fields["image"] in FILE_NAMES and any(_holds_media(item) for item in items):
        fields["image"] = "image"  # which its parts name themselves
    queue = MediaQueue(*(_refs(values, kind, fields[kind], teller) for kind in ("image", "video")))
    turns = [_turn(item, f"{name}[{number}]", keys, queue, teller) for number, item in enumerate(items)]
    queue.check(fields, teller)
    return Draft([turn for turn in turns if turn is not None])


def _holds_media(turn: Any) -> bool:
    """Whether a turn has parts that name media of their own."""
    said = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
    parts = [part for part in said if isinstance(part, Mapping)] if isinstance(said, list) else []
    return any(part.get("type") not in _TEXT_PARTS and len(part) > 1 for part in parts)


def _turn(item: Any, where: str, keys: tuple[str, str], queue: MediaQueue, teller: Teller) -> Turn | None:
    """One turn. In `conversations` some data writes role and content all the same."""
    if not isinstance(item, Mapping):
        teller.fault("turn-type", where, type(item).__name__, f"an object with {keys[0]} and {keys[1]} is needed", "Correct the turn.")
        return None
    other = ("role", "content") if keys[0] == "from" else ("from", "value")
    who, said = other if keys[0] not in item and other[0] in item else keys
    missing = [key for key in (who, said) if key not in item]
    if missing:
        found = f"only {', '.join(map(str, item)) or 'no fields'}"
        teller.fault("field-missing", f"{where}.{missing[0]}", found, f"{missing[0]} is needed", "Add it or drop the row.")
        return None
    role, field = role_of(item[who], f"{where}.{who}", teller), f"{where}.{said}"
    if role == "assistant" and (unlearnt := next((name for name in ("weight", "loss") if item.get(name, 1) in (0, False)), None)):
        found, expected = f"{unlearnt} {item[unlearnt]!r}: not to be learned", "all that the assistant says is learned"
        teller.fault("answer-unlearned", f"{where}.{unlearnt}", found, expected, "Drop it, or cut the conversation before this answer.")
    if isinstance(item[said], list):
        pieces = _parts(item[said], role, field, queue, teller)
    else:
        pieces = _pieces(item[said], role, field, queue, teller)
    return None if role is None or pieces is None else Turn(role, pieces, field)


def _pieces(value: Any, role: Role | None, where: str, queue: MediaQueue, teller: Teller) -> tuple[Piece, ...] | None:
    """Text with tags as pieces; tags for which nothing is left are reported with the row's numbers, not here."""
    text = text_of(value, role, where, teller)
    if text is None:
        return None
    pieces: list[Piece] = []
    for piece in split_tags(text, role, where, teller):
        if isinstance(piece, str):
            check_markers(piece, where, teller)
            pieces.append(piece)
        elif (ref := queue.take(piece.kind, where)) is not None:
            pieces.append(ref)
    return tuple(pieces)


def _parts(items: list[Any], role: Role | None, where: str, queue: MediaQueue, teller: Teller) -> tuple[Piece, ...] | None:
    """A list of parts as pieces; text in them is literal."""
    pieces: list[Piece] = []
    whole = True
    blank = [_is_blank(item) for item in items]
    for number, item in enumerate(items):
        if blank[number] and not all(blank):  # white space beside other parts says nothing
            continue
        place = f"{where}[{number}]"
        piece = _part(item, role, place, queue, teller)
        whole = whole and piece is not None
        if piece is not None:
            pieces.append(piece)
        if role == "system" and isinstance(piece, MediaRef):
            teller.fault(
                "image-in-system", place, f"{piece.kind} in a system turn", "only text is allowed there", "Move it to the user's turn."
            )
    if not items:
        text_of("", role, where, teller)
    return tuple(pieces) if whole and items else None


def _is_blank(item: Any) -> bool:
    text = item.get("text") if isinstance(item, Mapping) and item.get("type") in _TEXT_PARTS else item
    return isinstance(text, str) and not text.strip()


def _part(item: Any, role: Role | None, where: str, queue: MediaQueue, teller: Teller) -> Piece | None:
    if isinstance(item, str):
        item = {"type": "text", "text": item}
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind in _TEXT_PARTS:
        text = text_of(item.get("text"), role, f"{where}.text", teller)
        if text is not None:
            check_markers(text, f"{where}.text", teller)
            if tag := TAG.search(text):
                found, expected = f"{tag.group()} in a part of text", "a part of its own shows an image (here it is read as text)"
                teller.fault("tag-literal", f"{where}.text", found, expected, "Write the image as a part.", warning=True)
        return text
    if kind in ("image", "image_url", "input_image"):
        return _medium("image", item, ("image", "image_url", "url", "path", "base64", "visual_tokens"), where, queue, teller)
    if kind in ("video", "video_url", "input_video"):
        return _medium("video", item, ("video", "video_url", "url", "path", "frames"), where, queue, teller)
    found = f"a part of type {kind!r}" if isinstance(item, Mapping) else f"a part that is {type(item).__name__}"
    teller.fault("part-type", where, found, "text, image or video is expected", "Give each part a known type.")
    return None


def _medium(
    kind: MediaKind, item: Mapping[str, Any], names: tuple[str, ...], where: str, queue: MediaQueue, teller: Teller
) -> MediaRef | None:
    """The medium of a part: what it names, or the next of the row's list where it names nothing."""
    given = [name for name in names if item.get(name) is not None]
    if not given and queue.has(kind):
        return queue.take(kind, where)
    if not given:
        found = f"a part with only {', '.join(map(str, item))}"
        expected = f"one of {', '.join(names)} is needed, for the row lists no {kind}s"
        teller.fault(f"{kind}-empty", where, found, expected, "Name its file.")
        return None
    value = item[given[0]]
    if given[0].endswith("_url") and isinstance(value, Mapping):
        value = value.get("url")
    if given[0] in ("base64", "visual_tokens"):
        value = {given[0]: value}
    if given[0] == "frames":
        value = {"frames": value, "fps": item.get("fps")}
    if value is None or value == "":
        teller.fault(f"{kind}-empty", f"{where}.{given[0]}", repr(value), "a path or URL is needed", "Fill it or drop the part.")
        return None
    return MediaRef(kind, value, f"{where}.{given[0]}")


def _field_of(values: Mapping[str, Any], kind: str) -> str:
    given = next((name for name in (kind, f"{kind}s") if values.get(name) is not None), None)
    if given is None and kind == "image":
        given = next((name for name in FILE_NAMES if format_of_name(str(values.get(name)))), None)
    return given or kind


def _refs(values: Mapping[str, Any], kind: MediaKind, field: str, teller: Teller) -> list[MediaRef]:
    """The media that a row lists in its own field: none, one, or several."""
    value = values.get(field)
    if isinstance(value, Mapping) and all(one is None for one in value.values()):  # how some writers of Parquet say that there is none
        value = None
    if (other := values.get(f"{kind}s")) and value and field == kind and other not in (value, [value]) and value != [other]:
        found, expected = f"other {kind}s than {field} has", "one field is expected, for only one is read"
        teller.fault("media-twice", f"{kind}s", found, expected, f"Put all into {kind}s, or leave it out.")
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        if not value:
            remedy = "Leave the field out of rows without one, or write null."
            teller.fault(f"{kind}s-empty", field, "an empty list", f"at least one {kind} is expected", remedy, warning=True)
        if kind == "video" and value and all(isinstance(one, (list, tuple)) for one in value):
            return [MediaRef(kind, one, f"{field}[{number}]") for number, one in enumerate(value)]
        items = [(f"{field}[{number}]", one) for number, one in enumerate(value)]
    else:
        items = [(field, value)]
    for where, one in items:
        if one is None or one == "":
            teller.fault(
                f"{kind}-empty",
                where,
                repr(one),
                f"the path of {'an image' if kind == 'image' else 'a video'} is needed",
                "Fill it or drop the row.",
            )
    return [MediaRef(kind, one, where) for where, one in items if one is not None and one != ""]


def _qa(values: Mapping[str, Any], teller: Teller) -> Draft | None:
    """A question about an image, or about none, and its answer."""
    fields = {kind: _field_of(values, kind) for kind in ("image", "video")}
    images, videos = (_refs(values, kind, fields[kind], teller) for kind in ("image", "video"))
    queue = MediaQueue(images, videos)
    asked: tuple[tuple[Role, str], ...] = (("user", "question"), ("assistant", "answer"))
    tagged = any(TAG.search(text) for _, name in asked if isinstance(text := values.get(name), str))
    shown = () if tagged else (*images, *videos)  # without a tag, media come before the question
    turns: list[Turn] = []
    for role, name in asked:
        if name not in values:
            _tell_missing(name, values, teller)
            continue
        pieces = _pieces(values.get(name), role, name, queue, teller)
        if pieces is not None:
            turns.append(Turn(role, (*(shown if role == "user" else ()), *pieces), name))
    if tagged:
        queue.check(fields, teller)
    return Draft(turns) if len(turns) == 2 else None


def _pairs(values: Mapping[str, Any], teller: Teller) -> Draft | None:
    """An image and its caption; the wording of the request belongs to whoever makes the example."""
    field = _field_of(values, "image")
    refs = _refs(values, "image", field, teller)
    name = next((one for one in CAPTIONS if one in values), None)
    if name is None:
        _tell_missing(CAPTIONS[0], values, teller)
        return None
    text = text_of(values.get(name), "user", name, teller)
    if len(refs) != 1:
        if not teller.failed:
            code, remedy = ("too-many-media", "Keep one of them.") if refs else ("image-missing", "Add it or drop the row.")
            teller.fault(code, field, _several_images(len(refs)), "exactly 1 is needed for a caption", remedy)
        return None
    if text is None:
        return None
    check_markers(text, name, teller)
    if tag := TAG.search(text):
        found, expected = f"{tag.group()} in a caption", "words alone are expected (here it is read as text)"
        teller.fault("tag-literal", name, found, expected, "Remove it.", warning=True)
    return Draft([Turn("user", (text,), name), Turn("assistant", (refs[0],), field)], is_pair=True)


def _several_images(number: int) -> str:
    return f"{number} image{'' if number == 1 else 's'}"


_READERS: dict[Format, Callable[[Mapping[str, Any], Teller], Draft | None]] = {
    "llava": _llava,
    "messages": _messages,
    "metamorph": _messages,
    "qa": _qa,
    "pairs": _pairs,
}
