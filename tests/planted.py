"""Good rows in every format that is read, and where in each of them a fault can be planted.

A row is written once, as turns with tags and a list of media; a layout turns it into what its format has on disk.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

POOL = 24
PLANTED = 9  # the row that is spoiled, among all kinds of good ones
ROWS = 12
_TAG = re.compile(r"(<image>|<video>)")


@dataclass
class Row:
    """One conversation: turns of (role, text with tags), and the media for the tags, as paths below the root."""

    id: Any
    turns: list[list[Any]]
    images: list[Any] | None = None  # None: the field says nothing
    videos: list[Any] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # written over the row at last; a value of ... removes the field
    images_as: Callable[[Any], Any] | None = None  # writes the field of images otherwise


@dataclass(frozen=True)
class Layout:
    """A format on disk: how rows are written, and where its parts are. `{}` in a field is a number."""

    name: str
    write: Callable[[Path, Sequence[Row]], Path]
    place: Callable[[Path, int], str]
    turns: str
    said: str  # field of the text of a turn
    part: str  # field of the text behind the image in the first turn
    image: str  # field of the only image of a row
    answer_image: str  # ... where it stands in the answer
    has: frozenset[str]
    """What can be planted, in words that `Planted.needs` repeats."""


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A picture unlike those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number: int, kind: str = "PNG") -> bytes:
    """The picture's file."""
    buffer = io.BytesIO()
    picture(number).save(buffer, format=kind)
    return buffer.getvalue()


SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}


def image_name(number: int) -> str:
    """Of the pool."""
    return f"images/{number % POOL:02d}{list(SUFFIXES)[number % 3]}"


def make_media(root: Path) -> Path:
    """Pictures and a video, good ones and bad ones."""
    (root / "images").mkdir(parents=True)
    for number in range(POOL):
        name = image_name(number)
        (root / name).write_bytes(encoded(number, SUFFIXES[Path(name).suffix]))
    make_bad_media(root, (root / image_name(0)).read_bytes())
    (root.parent / "outside.png").write_bytes(encoded(104))
    for name, seconds in (("clip.mp4", 3.0), ("short.mp4", 0.4)):
        make_video(root / name, seconds)
    make_sound(root / "sound.mkv")
    return root


def make_bad_media(root: Path, copied: bytes) -> None:
    """A picture that is cut short, one under a wrong name, a bomb, and a copy of another one."""
    whole = encoded(101, "JPEG")
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "wrong.png").write_bytes(encoded(102, "JPEG"))
    (root / "Case.png").write_bytes(encoded(103))
    (root / "bomb.png").write_bytes(bomb())
    (root / "copy.png").write_bytes(copied)


def bomb() -> bytes:
    """A small file that says it is 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def make_video(path: Path, seconds: float, fps: int = 10) -> None:
    """A clip that becomes lighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 + 5 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make_sound(path: Path) -> None:
    """A file of sound alone: a video without frames."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def good_rows(number: int, *, video: bool = True, several: bool = True) -> list[Row]:
    """Conversations such as people have: every eighth of a kind; what differs by number keeps two rows from being the same."""
    return [_good(index, video, several) for index in range(number)]


def _good(index: int, video: bool, several: bool) -> Row:
    one, two = image_name(index), image_name(index + 1)
    kind = index % 8
    if index == PLANTED or (kind == 1 and not several):
        kind = 0
    if kind == 0:
        return Row(f"row-{index}", [["user", f"<image>\nWhat is shown in picture {index}?"], ["assistant", "A square."]], [one])
    if kind == 1:
        turns = [["user", f"Compare <image> with <image>, number {index}."], ["assistant", "The first is brighter; a < b, 1 > 0."]]
        return Row(f"row-{index}", turns, [one, two])
    if kind == 2:
        turns = [["system", "Be brief."], ["user", f"Is this number {index}? <image>"], ["assistant", "Yes."],
                 ["user", "Sure?\n\nReally?"], ["assistant", "Quite — I looked twice."]]  # fmt: skip
        return Row(f"row-{index}", turns, [one])
    if kind == 3:
        turns = [["user", f"Übersetze „猫“, Nr. {index}: naïve café 🐱"], ["assistant", "Die Katze. Ça va?"]]
        return Row(f"row-{index}", turns)
    if kind == 4:
        return Row(f"row-{index}", [["user", f"Draw me a square, please ({index})."], ["assistant", "Here it is: <image>"]], [one])
    if kind == 5:
        code = "```python\nfor image in images:\n    show(image)  # `images[0]` is <first>\n```"
        return Row(f"row-{index}", [["user", f"Show {index} images in Python."], ["assistant", f"{code}\nThat is all."]])
    if kind == 6 and several:
        return Row(f"row-{index}", [["user", f"<image>\nMake it red, {index} times."], ["assistant", "<image>"]], [one, two])
    if index % 16 == 7 and video:
        turns = [["user", f"<video>\nWhat happens in clip {index}?"], ["assistant", "It becomes lighter."]]
        return Row(f"row-{index}", turns, None, ["clip.mp4"])
    return Row(f"row-{index}", [["user", f"这是<image>什么？（{index}）"], ["assistant", "这是一个正方形。"]], [one])


def _fields(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    values = {**values, **row.extra}
    return {name: value for name, value in values.items() if value is not ...}


def _media(row: Row, values: dict[str, Any], names: tuple[str, str], listed: Sequence[str]) -> dict[str, Any]:
    for name, media in zip(names, (row.images, row.videos or None), strict=True):
        if media is not None:
            values[name] = row.images_as(media) if row.images_as and media is row.images else media if name in listed else media[0]
        elif name == names[0] and zlib.crc32(str(row.id).encode()) % 2:
            values[name] = None
    return values


FROM = {"user": "human", "assistant": "gpt"}


def _llava(row: Row, listed: Sequence[str]) -> dict[str, Any]:
    turns = [{"from": FROM.get(role, role), "value": text} for role, text in row.turns]
    return _fields(row, _media(row, {"id": row.id, "conversations": turns}, ("image", "video"), listed))


def _messages(row: Row) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in row.turns]
    return _fields(row, _media(row, {"id": row.id, "messages": turns}, ("images", "videos"), ("images", "videos")))


def _in_parts(row: Row, part: Callable[[str, Any], dict[str, Any]]) -> dict[str, Any]:
    media = {"<image>": iter(row.images or ()), "<video>": iter(row.videos)}
    turns = []
    for role, text in row.turns:
        content = text
        if isinstance(text, str) and _TAG.search(text):
            pieces = [piece for piece in _TAG.split(text) if piece.strip()]
            content = [part(piece, next(media[piece])) if piece in media else {"type": "text", "text": piece} for piece in pieces]
        turns.append({"role": role, "content": content})
    return _fields(row, {"id": row.id, "messages": turns})


def _openai_part(tag: str, value: Any) -> dict[str, Any]:
    if tag == "<video>":
        return {"type": "video_url", "video_url": {"url": value}}
    return {"type": "image_url", "image_url": {"url": value}}


def _own_part(tag: str, value: Any) -> dict[str, Any]:
    if tag == "<video>":
        frames = [image_name(0), image_name(1)] if value == "clip.mp4" else value
        return {"type": "video", "frames": [{"type": "image", "path": frame} for frame in frames], "fps": 1.0}
    return {"type": "image", "path": value}


def data_url(number: int) -> str:
    """A picture in a record."""
    return "data:image/png;base64," + base64.b64encode(encoded(number)).decode()


def _openai(row: Row) -> dict[str, Any]:
    if row.images and row.id == "row-8":  # one that carries its picture
        row = replace(row, images=[data_url(8)])
    return _in_parts(row, _openai_part)


def _jsonl(path: Path, values: Sequence[dict[str, Any]]) -> Path:
    path.write_bytes("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())
    return path


def _array(path: Path, values: Sequence[dict[str, Any]]) -> Path:
    path.write_bytes(("[\n" + ",\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n]\n").encode())
    return path


def _stored(root: Path, name: Any) -> Any:
    path = root / str(name)
    return {"bytes": path.read_bytes() if path.is_file() and ".." not in str(name) else None, "path": name}


def write_parquet(path: Path, rows: Sequence[Row], *, drop: str = "") -> Path:
    """One table: ids, messages and the bytes of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [_messages(row) for row in rows]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [None if value.get("images") is None else [_stored(path.parent, one) for one in value["images"]] for value in values]
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    table = pa.table(
        {
            "id": [value["id"] for value in values],
            "images": pa.array(images, pa.list_(image)),
            "messages": pa.array([value.get("messages") for value in values], pa.list_(turn)),
        }
    )
    pq.write_table(table.drop_columns([drop]) if drop else table, path)
    return path


def _tar(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_conversation_tar(path: Path, rows: Sequence[Row]) -> Path:
    """Each sample a JSON of a conversation and its images."""
    samples = []
    for index, row in enumerate(rows):
        values = _llava(replace(row, images=None, videos=[]), ())
        values.pop("image", None)
        files = {}
        images = row.images or []
        for number, name in enumerate(images):
            files[("" if len(images) == 1 else f"{number}.") + Path(name).suffix[1:]] = (path.parent / name).read_bytes()
        for name in row.videos:
            files[Path(name).suffix[1:]] = (path.parent / name).read_bytes()
        samples.append((f"{index:06d}", {**files, "json": json.dumps(values).encode()}))
    return _tar(path, samples)


def write_pair_tar(path: Path, rows: Sequence[Row]) -> Path:
    """Each sample an image and a text."""
    return _tar(path, [(f"{index:06d}", _pair(path.parent, row)) for index, row in enumerate(rows)])


def _pair(root: Path, row: Row) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if row.images:
        name = row.images[0]
        made = isinstance(name, int)
        files["png" if made else Path(name).suffix[1:]] = encoded(1000 + name) if made else (root / name).read_bytes()
    return files | ({} if row.turns[0][1] is None else {"txt": row.turns[0][1].encode()})


def write_captions(path: Path, rows: Sequence[Row]) -> Path:
    """A folder of images with a metadata.csv; returns the folder."""
    path.mkdir()
    make_bad_media(path, encoded(1000 + 3))
    named = []
    for row in rows:
        name = row.images[0] if row.images else ""
        if isinstance(name, int):
            name, data = f"{name:06d}.png", encoded(1000 + name)
            (path / name).write_bytes(data)
        named.append((name, row.turns[0][1]))
    for bad in {one.name for one in path.iterdir()} - {name for name, _ in named}:
        if not any(name.lower() == bad.lower() for name, _ in named):
            (path / bad).unlink()
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([("file_name", "text"), *named])
    (path / "metadata.csv").write_bytes(buffer.getvalue().encode())
    return path


def good_pairs(number: int) -> list[Row]:
    """Images of their own, each with a caption."""
    captions = ("A square, number {}.", "„Größe“ {}, 猫 🐱", 'It says: "no, {}"', "a photo; {} of them")
    return [Row(index, [["user", captions[index % 4].format(index)]], [index]) for index in range(number)]


def _line(path: Path, index: int) -> str:
    return f"{path}:{index + 1}"


_RECORDS = frozenset({"tags", "ids", "turns", "types"})
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("llava-json", lambda path, rows: _array(path, [_llava(row, ()) for row in rows]), lambda path, index: f"{path}:{index + 2}",
               "conversations", "conversations[{}].value", "conversations[0].value", "image", "image",
               _RECORDS | {"paths", "lists", "lines", "videos"}),
        Layout("llava-jsonl", lambda path, rows: _jsonl(path, [_llava(row, ("image",)) for row in rows]), _line,
               "conversations", "conversations[{}].value", "conversations[0].value", "image[0]", "image[0]",
               _RECORDS | {"paths", "lists", "lines", "videos"}),
        Layout("messages", lambda path, rows: _jsonl(path, [_messages(row) for row in rows]), _line,
               "messages", "messages[{}].content", "messages[0].content", "images[0]", "images[0]",
               _RECORDS | {"paths", "lists", "lines", "videos"}),
        Layout("openai", lambda path, rows: _jsonl(path, [_openai(row) for row in rows]), _line,
               "messages", "messages[{}].content", "messages[0].content[1].text", "messages[0].content[0].image_url",
               "messages[1].content[0].image_url", (_RECORDS - {"tags"}) | {"paths", "lines", "videos", "parts"}),
        Layout("own", lambda path, rows: _jsonl(path, [_in_parts(row, _own_part) for row in rows]), _line,
               "messages", "messages[{}].content", "messages[0].content[1].text", "messages[0].content[0].path",
               "messages[1].content[0].path", (_RECORDS - {"tags"}) | {"paths", "lines", "parts", "frames"}),
        Layout("parquet", write_parquet, lambda path, index: f"{path} row {index}",
               "messages", "messages[{}].content", "messages[0].content", "images[0]", "images[0]",
               (_RECORDS - {"types"}) | {"paths", "lists", "embedded"}),
        Layout("tar-conversations", write_conversation_tar, lambda path, index: f"{path} sample {index:06d}",
               "conversations", "conversations[{}].value", "conversations[0].value", "image", "image",
               _RECORDS | {"videos", "embedded"}),
        Layout("tar-pairs", write_pair_tar, lambda path, index: f"{path} sample {index:06d}",
               "caption", "caption", "caption", "image", "image", frozenset({"captions", "embedded"})),
        Layout("captions", write_captions, lambda path, index: f"{path}/metadata.csv:{index + 2}",
               "caption", "caption", "caption", "image", "image", frozenset({"captions", "paths"})),
    )
}  # fmt: skip
_SUFFIX = {"llava-json": ".json", "parquet": ".parquet", "tar-conversations": ".tar", "tar-pairs": ".tar", "captions": ""}


def rows_for(layout: Layout, number: int) -> list[Row]:
    """Good rows that this layout can hold."""
    if "captions" in layout.has:
        return good_pairs(number)
    return good_rows(number, video=layout.name != "parquet", several=layout.name != "llava-json")


def file_of(layout: Layout, root: Path, name: str) -> Path:
    """Where a file of this layout is written."""
    return root / f"{layout.name}-{name}{_SUFFIX.get(layout.name, '.jsonl')}"
