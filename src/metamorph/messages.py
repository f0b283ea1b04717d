"""What people exchange: messages made of text, images and videos, and examples made of messages.

A record as JSON, one object per conversation (`content` may also be a plain string):

    {"id": "42", "source": "cambrian", "kind": "image_qa", "weight": 1.0, "messages": [
      {"role": "system", "content": "Be brief."},
      {"role": "user", "content": [{"type": "image", "path": "cats/7.png"}, {"type": "text", "text": "How many cats?"}]},
      {"role": "assistant", "content": "Two."}]}

Parts: `{"type": "text", "text"}`; `{"type": "image", ...}` with exactly one of `path` (relative to the root), `base64` (an encoded
file) or `visual_tokens` (`{"shape": [k, v], "float32": base64}`); `{"type": "video", "frames": [image, ...], "fps"}`.

Axes: k visual tokens per image, v vision width.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from metamorph.errors import MediaError, RecordError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Role: TypeAlias = Literal["system", "user", "assistant"]
ImageSource: TypeAlias = Image.Image | Path | bytes
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class TextPart:
    """Some text, always taken literally: a special token spelled here stays text."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """One picture: an image to be encoded, or the visual tokens of one that was already encoded or drawn.

    Raises:
        RecordError: both or none of the two are given, or the tokens are not a matrix.
    """

    image: ImageSource | None = field(default=None, repr=False)
    visual_tokens: Float[Tensor, "k v"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given = (self.image is not None) + (self.visual_tokens is not None)
        if given != 1:
            raise RecordError(f"an image part with {given} of (image, visual_tokens) but exactly 1 is needed. Give pixels or tokens.")
        if self.visual_tokens is not None and self.visual_tokens.ndim != 2:
            shape = tuple(self.visual_tokens.shape)
            raise RecordError(f"visual tokens of shape {shape} but (k, v) is needed. Make one ImagePart per image.")

    def __eq__(self, other: object) -> bool:
        """Equal sources, or equal tokens; a path equals neither the bytes nor the pixels of its file."""
        if not isinstance(other, ImagePart):
            return NotImplemented
        if self.visual_tokens is None or other.visual_tokens is None:
            return self.visual_tokens is other.visual_tokens and type(self.image) is type(other.image) and self.image == other.image
        return np.array_equal(_to_numpy(self.visual_tokens), _to_numpy(other.visual_tokens))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # pixels and tokens are compared by value


@dataclass(frozen=True)
class VideoPart:
    """Frames in the order of time; each becomes one image of the sequence."""

    frames: tuple[ImagePart, ...]
    fps: float | None = None


Part: TypeAlias = TextPart | ImagePart | VideoPart
PartLike: TypeAlias = Part | str | ImageSource | Sequence[Any]


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and the parts in the order in which they are said."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def system(cls, text: str) -> Message:
        """Instructions that hold for the whole conversation; text only."""
        return cls("system", (TextPart(text),))

    @classmethod
    def user(cls, *parts: PartLike) -> Message:
        """A user's turn. A string becomes text; a PIL image, Path or bytes an image; a list of images a video."""
        return cls("user", tuple(as_part(part) for part in parts))

    @classmethod
    def assistant(cls, *parts: PartLike) -> Message:
        """An assistant's turn, with the same conversions as `user`. All of it is a target when training."""
        return cls("assistant", tuple(as_part(part) for part in parts))

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All images in reading order, the frames of videos included."""
        return tuple(image for part in self.parts for image in _images_of(part))


@dataclass(frozen=True)
class Example:
    """A conversation to learn from; its weight multiplies its losses. Where it was read from (`origin`) is no part of what it is."""

    messages: tuple[Message, ...]
    id: str
    source: str
    kind: str = ""
    weight: float = 1.0
    origin: str = field(default="", compare=False)  # "train.jsonl:812"

    @property
    def place(self) -> str:
        """How errors name the example: file and line if it has them, else source and id."""
        return self.origin or (f"{self.source}:{self.id}" if self.source else self.id)


def as_part(value: object) -> Part:
    """Wrap a plain value (see `PartLike`) as the part that it obviously is.

    Raises:
        RecordError: a value of another type, or a list that holds something other than images.
    """
    if isinstance(value, (TextPart, ImagePart, VideoPart)):
        return value
    if isinstance(value, str):
        return TextPart(value)
    if isinstance(value, (Image.Image, Path, bytes)):
        return ImagePart(value)
    if isinstance(value, (list, tuple)):
        frames = tuple(as_part(frame) for frame in value)
        if all(isinstance(frame, ImagePart) for frame in frames):
            return VideoPart(frames)  # pyright: ignore[reportArgumentType]
    found = type(value).__name__
    raise RecordError(f"a part of type {found} but text, an image or a list of images is needed. A path must be a pathlib.Path.")


def validate_messages(messages: Sequence[Message], place: str = "messages", *, needs_answer: bool = False) -> None:
    """Refuse a conversation that no chat template could render faithfully.

    The rule: an optional system turn (text only) comes first, then user and assistant alternate, beginning with the user;
    every turn holds something. `needs_answer` asks also for at least one assistant turn, as training does.

    Raises:
        RecordError: the rule is broken; the message names the turn and the place.
    """
    turns = [message.role for message in messages]
    if not messages:
        raise RecordError(f"0 messages but at least 1 is needed ({place}). Give the conversation a user turn.")
    start = 1 if turns[0] == "system" else 0
    if len(turns) == start:
        raise RecordError(f"1 system message and 0 others but at least 1 user message is needed ({place}). Add the user's turn.")
    for number, (message, role) in enumerate(zip(messages, turns, strict=True), start=1):
        where = f"{place}, message {number} of {len(turns)}"
        expected = "system" if number <= start else ("user", "assistant")[(number - start - 1) % 2]
        if role != expected:
            raise RecordError(
                f"role {role!r} but {expected!r} is expected ({where}; roles: {', '.join(map(str, turns[:12]))}). "
                "Put one optional system turn first, then alternate user and assistant."
            )
        _validate_turn(message, where)
    if needs_answer and "assistant" not in turns:
        raise RecordError(f"0 assistant messages but at least 1 is needed to learn from ({place}). Add the answer.")


def _validate_turn(message: Message, where: str) -> None:
    """Check the parts of one turn."""
    if message.role == "system" and message.images:
        raise RecordError(f"{len(message.images)} image(s) in a system turn but 0 are allowed ({where}). Move them to the user's turn.")
    for part in message.parts:
        if isinstance(part, VideoPart) and not part.frames:
            raise RecordError(f"a video of 0 frames but at least 1 is needed ({where}). Drop the part or give it frames.")
        if isinstance(part, TextPart):
            try:
                part.text.encode()
            except UnicodeEncodeError as error:
                raise RecordError(f"text with half a surrogate pair but valid Unicode is needed ({where}). Repair its escapes.") from error
    if not message.text and not message.images:
        raise RecordError(f"an empty {message.role} turn but text or an image is needed ({where}). Drop the turn or fill it.")


def to_json(example: Example, *, root: Path | None = None) -> dict[str, Any]:
    """An example as the record drawn at the top of this file.

    Images that are paths are written relative to `root`; PIL images become PNG in base64, bytes stay as they are.

    Raises:
        MediaError: a path lies outside `root`.
    """
    record: dict[str, Any] = {"id": example.id, "source": example.source}
    if example.kind:
        record["kind"] = example.kind
    if example.weight != 1.0:
        record["weight"] = example.weight
    record["messages"] = messages_to_json(example.messages, root=root)
    return record


def messages_to_json(messages: Iterable[Message], *, root: Path | None = None) -> list[dict[str, Any]]:
    """The `messages` list of a record; see `to_json`."""
    return [{"role": message.role, "content": [_part_to_json(part, root) for part in message.parts]} for message in messages]


def from_json(record: Any, *, root: Path | None = None, place: str = "record") -> Example:
    """The inverse of `to_json`; checks the structure of the record, then `validate_messages`. `place` becomes the origin.

    Raises:
        RecordError: a field is missing, unknown, or of the wrong type, or the conversation is malformed.
        MediaError: an image path leads outside `root`.
    """
    _check_fields(record, {"messages"}, {"id", "source", "kind", "weight"}, place)
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise RecordError(f"weight {weight!r} but a finite number of at least 0 is needed ({place}). Correct or drop it.")
    identity = record.get("id", place)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise RecordError(f"id {identity!r} but a string or integer is needed ({place}). Correct or drop it.")
    names = {name: _typed(record.get(name, ""), str, name, place) for name in ("source", "kind")}
    messages = messages_from_json(record["messages"], root=root, place=place)
    return Example(messages, str(identity), **names, weight=float(weight), origin=place)


def messages_from_json(items: Any, *, root: Path | None = None, place: str = "messages") -> tuple[Message, ...]:
    """A record's `messages` list as messages, validated.

    Raises:
        RecordError, MediaError: as `from_json`.
    """
    messages = []
    for number, item in enumerate(_typed(items, list, "messages", place), start=1):
        where = f"{place}, message {number} of {len(items)}"
        _check_fields(item, {"role", "content"}, set(), where)
        if item["role"] not in ROLES:
            raise RecordError(f"role {item['role']!r} but one of {', '.join(ROLES)} is expected ({where}). Rename the role.")
        content = item["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = tuple(_part_from_json(part, root, where) for part in _typed(content, list, "content", where))
        messages.append(Message(item["role"], parts))
    validate_messages(messages, place)
    return tuple(messages)


def _images_of(part: Part) -> Iterator[ImagePart]:
    if isinstance(part, ImagePart):
        yield part
    elif isinstance(part, VideoPart):
        yield from part.frames


def _part_to_json(part: Part, root: Path | None) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, VideoPart):
        video: dict[str, Any] = {"type": "video", "frames": [_part_to_json(frame, root) for frame in part.frames]}
        return video if part.fps is None else {**video, "fps": part.fps}
    if part.visual_tokens is not None:
        tokens = _to_numpy(part.visual_tokens)
        return {"type": "image", "visual_tokens": {"shape": list(tokens.shape), "float32": base64.b64encode(tokens.tobytes()).decode()}}
    if isinstance(part.image, Path):
        return {"type": "image", "path": _relative(part.image, root).as_posix()}
    if isinstance(part.image, Image.Image):
        buffer = io.BytesIO()
        part.image.save(buffer, format="PNG")
        return {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode()}
    assert isinstance(part.image, bytes)
    return {"type": "image", "base64": base64.b64encode(part.image).decode()}


def _part_from_json(item: Any, root: Path | None, place: str) -> Part:
    kind = _typed(item, dict, "part", place).get("type")
    if kind == "text":
        _check_fields(item, {"type", "text"}, set(), place)
        return TextPart(_typed(item["text"], str, "text", place))
    if kind == "image":
        return image_from_json(item, root, place)
    if kind == "video":
        _check_fields(item, {"type", "frames"}, {"fps"}, place)
        frames = tuple(image_from_json(frame, root, place) for frame in _typed(item["frames"], list, "frames", place))
        fps = item.get("fps")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf")):
            raise RecordError(f"fps {fps!r} but a number above 0 is needed ({place}). Correct or drop it.")
        return VideoPart(frames, fps=None if fps is None else float(fps))
    raise RecordError(f"a part of type {kind!r} but 'text', 'image' or 'video' is expected ({place}). Give each part a type.")


def image_from_json(item: Any, root: Path | None, place: str) -> ImagePart:
    """An image part of a record: exactly one of `path`, `base64`, `visual_tokens`.

    Raises:
        RecordError, MediaError: as `from_json`.
    """
    _check_fields(item, set(), {"type", "path", "base64", "visual_tokens"}, place)
    given = [name for name in ("path", "base64", "visual_tokens") if item.get(name) is not None]
    if len(given) != 1:
        raise RecordError(f"an image with {len(given)} of path, base64, visual_tokens but exactly 1 is needed ({place}). Keep one.")
    if given == ["path"]:
        return ImagePart(resolve_inside(Path(_typed(item["path"], str, "path", place)), root, place))
    if given == ["base64"]:
        return ImagePart(_decode(item["base64"], place))
    stored = item["visual_tokens"]
    _check_fields(stored, {"shape", "float32"}, set(), place)
    data, shape = _decode(stored["float32"], place), _typed(stored["shape"], list, "shape", place)
    if len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape) or len(data) != 4 * shape[0] * shape[1]:
        raise RecordError(f"{len(data)} bytes of visual tokens but shape {shape} x 4 bytes is declared ({place}). Write the record anew.")
    import torch  # only a record that holds tokens needs it; reading text and images does not

    return ImagePart(visual_tokens=torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(shape).astype(np.float32)))


def resolve_inside(path: Path, root: Path | None, place: str) -> Path:
    """`root / path`, refused when it leads outside `root`, be it by `..`, an absolute path or a symbolic link.

    Without a root the path is returned as it is.

    Raises:
        MediaError: the path leads outside.
    """
    if root is None:
        return path
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a null byte
        inside = False
    if not inside:
        raise MediaError(f"image path {str(path)!r} but a path inside {root} is needed ({place}). Move the file or name a higher root.")
    return root / path


def _relative(path: Path, root: Path | None) -> Path:
    if root is None:
        return path
    inside = resolve_inside(path, root, "writing a record") if path.is_absolute() else path
    return inside.relative_to(root) if inside.is_absolute() else inside


def _check_fields(item: Any, required: set[str], optional: set[str], place: str) -> None:
    """Refuse an object with a field missing or unknown; a typo must not become a default."""
    found = set(_typed(item, Mapping, "object", place))
    if missing := required - found:
        raise RecordError(f"fields {sorted(map(str, found))} but {sorted(missing)} is missing ({place}). Add the missing field.")
    if unknown := found - required - optional:
        known = sorted(required | optional)
        raise RecordError(f"unknown field {sorted(map(str, unknown))} but only {known} are known ({place}). Rename or drop it.")


def _typed(value: Any, kind: type, name: str, place: str) -> Any:
    if not isinstance(value, kind):
        raise RecordError(f"{name} of type {type(value).__name__} but {kind.__name__} is needed ({place}). Correct the record.")
    return value


def _decode(text: Any, place: str) -> bytes:
    try:
        return base64.b64decode(_typed(text, str, "base64", place), validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"base64 that does not decode ({error}) but an encoded file is needed ({place}). Encode it anew.") from error


def _to_numpy(tokens: Any) -> np.ndarray:
    """Tokens of any float dtype and device as contiguous float32."""
    array = tokens.detach().float().cpu().numpy() if hasattr(tokens, "detach") else np.asarray(tokens, dtype=np.float32)
    return np.ascontiguousarray(array, dtype="<f4")
