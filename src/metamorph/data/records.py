"""One row as an example: its format told from its fields, its turns checked, its media found. The one way from files to messages.

`to_example` is used by training (faults raise) and by `metamorph data check` (faults are collected), so both judge alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.data.faults import Fault, Report, from_error, raise_errors
from metamorph.data.formats import draft_of
from metamorph.data.record_fields import Format
from metamorph.data.references import Roots, image_part, path_of
from metamorph.data.rows import RawRow
from metamorph.data.turns import Draft, MediaRef, Teller, Turn, check_order
from metamorph.data.video import describe_video, in_row
from metamorph.errors import DataError, MediaError, RecordError
from metamorph.messages import Example, ImagePart, Message, Part, TextPart, VideoPart, validate_messages

Frames = tuple[ImagePart, ...]
OpenVideo = Callable[[Path | bytes, Report], VideoPart]
"""Opens a video file, or its bytes, as frames; tells what speaks against one that can be used."""
SeeMedium = Callable[[MediaRef, ImagePart | VideoPart, Teller], None]
"""Told of each image and video that a row names, in reading order, once it is found; may report faults of it."""


def _no_video(video: Path | bytes, warn: Report) -> VideoPart:
    raise MediaError(f"a video but no way to open one was given ({describe_video(video)}). Read rows through FileSource.")


@dataclass(frozen=True)
class RecordSettings:
    """How rows are read.

    Attributes:
        roots: where media may come from.
        source: name of the rows' source, where they name none.
        format: of all rows; None = what each row's fields tell.
        columns: our name of a field -> its name in the file, for files that call it otherwise.
        needs_answer: report rows in which the assistant says nothing.
        open_video: a video file as frames.
        seed: of the wording of requests, with a row's id.
        see_medium: for checks that open what training opens later; None = nothing is opened here.
    """

    roots: Roots
    source: str = ""
    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    needs_answer: bool = True
    open_video: OpenVideo = _no_video
    seed: int = 0
    see_medium: SeeMedium | None = None


def to_example(raw: RawRow, settings: RecordSettings, report: Report = raise_errors) -> Example | None:
    """A row as an example; None where a fault, which was reported, leaves none. Images are not opened, videos are.

    Raises:
        RecordError, MediaError: from `report`, by default for every fault that is an error.
    """
    theirs = {ours: name for ours, name in settings.columns.items() if ours != name}
    told = _in_their_words(report, theirs) if theirs else report
    teller = Teller(told, raw.place)
    row = _renamed(raw, theirs) if theirs else raw
    draft = draft_of(row, settings.format, teller)
    if draft is None:
        return None
    if not teller.failed:
        check_order(draft.turns, _turns_field(row.values), teller, needs_answer=settings.needs_answer)
    messages = tuple(_message(turn, settings, teller) for turn in draft.turns)
    if teller.failed:
        return None
    try:
        validate_messages(messages, row.place, needs_answer=settings.needs_answer)  # what no fault covers, such as half a surrogate pair
    except RecordError as error:
        teller.tell(from_error(error, "turns-invalid", row.place, _turns_field(row.values)))
        return None
    return _finish(draft, messages, row.place, settings)


def _renamed(raw: RawRow, theirs: Mapping[str, str]) -> RawRow:
    taken = set(theirs.values())
    values = {name: value for name, value in raw.values.items() if name not in taken and name not in theirs}
    values |= {ours: raw.values[name] for ours, name in theirs.items() if name in raw.values}
    return RawRow(values, raw.place)


def _in_their_words(report: Report, theirs: Mapping[str, str]) -> Report:
    """Faults that name fields as the file does."""

    def told(fault: Fault) -> None:
        for ours, name in theirs.items():
            if fault.field == ours or fault.field.startswith((f"{ours}[", f"{ours}.")):
                fault = replace(fault, field=name + fault.field[len(ours) :])
                break
        report(fault)

    return told


def _turns_field(values: Mapping[str, Any]) -> str:
    return next((name for name in ("conversations", "messages") if name in values), "")


def _message(turn: Turn, settings: RecordSettings, teller: Teller) -> Message:
    parts = (_part(piece, settings, teller) if isinstance(piece, MediaRef) else TextPart(piece) for piece in turn.pieces)
    return Message(turn.role, tuple(part for part in parts if part is not None))


def _part(ref: MediaRef, settings: RecordSettings, teller: Teller) -> Part | None:
    if ref.kind == "image":
        return _image(ref, settings, teller)
    value = ref.value
    fps = value.get("fps") if isinstance(value, Mapping) else None
    frames = value.get("frames") if isinstance(value, Mapping) else value
    if isinstance(frames, (list, tuple)):
        return _listed_frames(ref, frames, fps, settings, teller)
    stored = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(stored, bytes):
        written = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(written, (str, Path)):
            teller.fault("video-type", ref.field, f"{type(value).__name__}", "a path or a list of frames is needed", "Write its path.")
            return None
        if "://" in str(written) or str(written).startswith("data:"):
            found, remedy = f"the URL {written!s:.60}", "Fetch it first: videos are read from local files only."
            teller.fault("video-url", ref.field, found, "a local file is needed", remedy)
            return None
        stored = path_of(str(written), ref, settings.roots, teller)
        if stored is None:
            return None
    try:
        part = settings.open_video(stored, lambda fault: teller.tell(in_row(fault, teller.place, ref.field)))
    except DataError as error:
        teller.tell(in_row(from_error(error, "video-broken", describe_video(stored)), teller.place, ref.field))
        return None
    if settings.see_medium is not None:
        settings.see_medium(ref, part, teller)
    return part


def _image(ref: MediaRef, settings: RecordSettings, teller: Teller) -> ImagePart | None:
    part = image_part(ref, settings.roots, teller)
    if part is not None and settings.see_medium is not None:
        settings.see_medium(ref, part, teller)
    return part


def _listed_frames(ref: MediaRef, frames: Any, fps: Any, settings: RecordSettings, teller: Teller) -> VideoPart | None:
    if not frames:
        teller.fault("video-empty", ref.field, "a video of 0 frames", "at least 1 is needed", "Drop it or give it frames.")
        return None
    if len(frames) == 1:
        expected, remedy = "more than one frame is expected", "Show it as an image, or leave the row out."
        teller.fault("video-short", ref.field, "a video of 1 frame", expected, remedy, warning=True)
    values = [_frame_value(frame) for frame in frames]
    parts = [_image(MediaRef("image", value, f"{ref.field}[{number}]"), settings, teller) for number, value in enumerate(values)]
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf")):
        teller.fault("video-fps", f"{ref.field}", f"fps {fps!r}", "a number above 0 is needed", "Correct or drop it.")
    kept = tuple(part for part in parts if part is not None)
    return VideoPart(kept, None if fps is None else float(fps)) if len(kept) == len(parts) and not teller.failed else None


def _frame_value(frame: Any) -> Any:
    """A frame of a list, which our own records write as a part."""
    if not isinstance(frame, Mapping):
        return frame
    return {name: value for name, value in frame.items() if name != "type"}


def _finish(draft: Draft, messages: tuple[Message, ...], place: str, settings: RecordSettings) -> Example:
    source = draft.source or settings.source
    example = Example(messages, draft.id, source, draft.kind or kind_of(messages), draft.weight, place)
    return _requested(example, settings.seed) if draft.is_pair else example


def _requested(example: Example, seed: int) -> Example:
    """A pair of caption and image in the words of a request and its reply, chosen by its source, id and caption.

    A row without an id is called by its place, which says where the file lies, not what it is.
    """
    from metamorph.data.kinds import Generation, generation

    own_id = "" if example.id == example.origin else example.id
    said = f"{seed}:{example.source}:{own_id}:{example.messages[0].text}"
    digest = hashlib.blake2b(said.encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    image = example.messages[1].images[0].image
    assert image is not None
    asked = generation(Generation(image=image, caption=example.messages[0].text, id=example.id, source=example.source), rng)
    return replace(example, messages=asked.messages)


def kind_of(messages: tuple[Message, ...]) -> str:
    """The kind of a conversation, told from who shows what; named as in the microworld."""
    answers = [message for message in messages if message.role == "assistant"]
    shown = any(message.images for message in messages if message.role == "user")
    moving = any(isinstance(part, VideoPart) for message in messages if message.role == "user" for part in message.parts)
    if not any(message.images for message in answers):
        return ("video_qa" if moving else "image_qa") if shown else "text"
    if moving:
        return "frames"
    drawing = next(message for message in answers if message.images)
    position = next(number for number, part in enumerate(drawing.parts) if not isinstance(part, TextPart))
    if shown and any(isinstance(part, TextPart) for part in drawing.parts[position:]):
        return "thinking"
    return "edit" if shown else "generation"
