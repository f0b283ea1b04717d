"""Examples written as others publish theirs: LLaVA JSON, messages in JSON lines, Parquet, WebDataset; what is read back is the same.

    llava       NAME.json, an array of {"id", "source", "kind", "image": [path, ...], "conversations": [...]}, and images/*.png
    messages    NAME.jsonl, a line each of {"id", "source", "kind", "images": [path, ...], "messages": [...]}, and images/*.png
    parquet     NAME.parquet: messages with a list of parts as content; images are embedded, as Hugging Face's Image feature has them
    webdataset  NAME-000000.tar, ...: of each sample a .json as LLaVA writes it, but for its images, which are .0.png, .1.png, ...

A turn is a string with `<image>` and `<video>` where media stand, if reading it gives its parts again; else a list of parts, in which
text is literal. A video is its frames, {"frames": [image, ...], "fps"}; in a tar they are base64 in the record. Images become PNG, which
keeps every pixel. The same examples give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from metamorph.data.faults import Fault
from metamorph.data.turns import Tag, Teller, split_tags, text_of
from metamorph.errors import RecordError
from metamorph.media import open_image
from metamorph.messages import Example, ImagePart, Message, TextPart, VideoPart

Layout: TypeAlias = Literal["llava", "messages", "parquet", "webdataset"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

SHARD_ROWS = 1000
"""Samples in one tar."""
GROUP_ROWS = 100
"""Rows of one Parquet row group: what a reader takes into memory for one row."""
_LLAVA_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}

PlaceImage: TypeAlias = Callable[[ImagePart], Any]
"""Puts an image where it belongs and returns what a record writes for it."""


def write(examples: Iterable[Example], layout: Layout, folder: Path, name: str) -> list[Path]:
    """Write examples into a folder that exists; a fault leaves what was written so far.

    Returns:
        the files to open, in order; media lie beside them.

    Raises:
        RecordError: an example that no record could hold, or none at all.
        MediaError: an image that cannot be opened.
    """
    writers = {"llava": _write_array, "messages": _write_lines, "parquet": _write_parquet, "webdataset": _write_shards}
    files = writers[layout](examples, folder, name)
    if not files:
        raise RecordError(f"0 examples but at least 1 is needed ({folder}). Ask for some.")
    return files


def png(image: ImagePart) -> bytes:
    """An image as the bytes of a PNG file, upright and RGB.

    Raises:
        RecordError: it has no pixels, only visual tokens.
        MediaError: it cannot be opened.
    """
    if image.image is None:
        raise RecordError("visual tokens but pixels are needed (image to be written). Write such examples with `write_jsonl`.")
    buffer = io.BytesIO()
    open_image(image.image).save(buffer, format="PNG")
    return buffer.getvalue()


def to_record(example: Example, layout: Layout, place_image: PlaceImage, place_frame: PlaceImage | None = None) -> dict[str, Any]:
    """An example as one record of a layout.

    Args:
        example: the conversation.
        layout: of the record; a tar's is as LLaVA's.
        place_image: called with each image, in reading order.
        place_frame: called with each frame of videos; None = `place_image`.

    Raises:
        RecordError: a text part without a letter, which no reader would give back.
    """
    record: dict[str, Any] = {"id": example.id, "source": example.source, "kind": example.kind}
    if example.weight != 1.0:
        record["weight"] = example.weight
    parts = [part for message in example.messages for part in message.parts]
    images = [place_image(part) for part in parts if isinstance(part, ImagePart)]
    videos = [_video(part, place_frame or place_image) for part in parts if isinstance(part, VideoPart)]
    is_llava = layout in ("llava", "webdataset")
    fields = ("image", "video") if is_llava else ("images", "videos")
    # Lists even of one, so that a field has one type in all rows.
    record |= {field: media for field, media in zip(fields, (images, videos), strict=True) if media}
    if is_llava:
        turns = [{"from": _LLAVA_ROLES[turn.role], "value": _content(turn, example.place)} for turn in example.messages]
        return record | {"conversations": turns}
    with_parts = layout == "parquet"  # a column has one type
    return record | {
        "messages": [{"role": turn.role, "content": _content(turn, example.place, with_parts=with_parts)} for turn in example.messages]
    }


def _video(part: VideoPart, place_image: PlaceImage) -> dict[str, Any]:
    frames = [place_image(frame) for frame in part.frames]
    return {"frames": frames} if part.fps is None else {"frames": frames, "fps": part.fps}


def _content(turn: Message, place: str, *, with_parts: bool = False) -> str | list[dict[str, Any]]:
    """A turn as a string with tags if it is read back as it was, else as a list of parts, which take the record's media in order."""
    pieces = [part.text if isinstance(part, TextPart) else Tag("image" if isinstance(part, ImagePart) else "video") for part in turn.parts]
    text = "\n".join(piece if isinstance(piece, str) else f"<{piece.kind}>" for piece in pieces)
    if not with_parts and _read_back(text, turn) == pieces:
        return text
    faults: list[Fault] = []
    for piece in pieces:
        if isinstance(piece, str):
            text_of(piece, turn.role, turn.role, Teller(faults.append, place))
    if faults:
        raise faults[0].error()
    return [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": piece.kind} for piece in pieces]


def _read_back(text: str, turn: Message) -> list[str | Tag] | None:
    """What a reader makes of the text; None if it finds fault with it."""
    faults: list[Fault] = []
    teller = Teller(faults.append, "")
    text_of(text, turn.role, "", teller)
    pieces = split_tags(text, turn.role, "", teller)
    return None if faults else pieces


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _write_lines(examples: Iterable[Example], folder: Path, name: str) -> list[Path]:
    path, place_image, number = folder / f"{name}.jsonl", _ImageFiles(folder), 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, example in enumerate(examples, start=1):
            place_image.begin(number - 1)
            file.write(_line(to_record(example, "messages", place_image)) + "\n")
    return [path] if number else []


def _write_array(examples: Iterable[Example], folder: Path, name: str) -> list[Path]:
    """One element a line, so that an error's line says which."""
    path, place_image, number = folder / f"{name}.json", _ImageFiles(folder), 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, example in enumerate(examples, start=1):
            place_image.begin(number - 1)
            file.write(("[\n" if number == 1 else ",\n") + _line(to_record(example, "llava", place_image)))
        file.write("\n]\n")
    return [path] if number else []


class _ImageFiles:
    """Images as files of a folder, each picture once, named by the row that shows it first."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._row, self._number = folder, 0, 0
        self._names: dict[bytes, str] = {}

    def begin(self, row: int) -> None:
        """What comes next belongs to this row."""
        self._row, self._number = row, 0

    def __call__(self, image: ImagePart) -> str:
        """Write the picture unless it is there, and return its path."""
        data = png(image)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self._names:
            name = self._names[digest] = f"images/{self._row:06}-{self._number}.png"
            (self._folder / "images").mkdir(exist_ok=True)
            (self._folder / name).write_bytes(data)
        self._number += 1
        return self._names[digest]


def _write_parquet(examples: Iterable[Example], folder: Path, name: str) -> list[Path]:
    import pyarrow
    from datasets import Features, Image, List, Value
    from pyarrow import parquet

    text, number, part = Value("string"), Value("float64"), {"type": Value("string"), "text": Value("string")}
    columns: dict[str, Any] = {
        "id": text,
        "source": text,
        "kind": text,
        "weight": number,
        "messages": List({"role": text, "content": List(part)}),
        "images": List(Image()),
        "videos": List({"frames": List(Image()), "fps": number}),
    }
    schema = Features(columns).arrow_schema  # its metadata tell `datasets` that the structs of bytes are images
    records = ({"weight": 1.0, **to_record(example, "parquet", _embedded)} for example in examples)
    path, written = folder / f"{name}.parquet", False
    with parquet.ParquetWriter(path, schema) as file:
        while group := list(islice(records, GROUP_ROWS)):
            file.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            written = True
    return [path] if written else []


def _embedded(image: ImagePart) -> dict[str, Any]:
    return {"bytes": png(image), "path": None}


def _write_shards(examples: Iterable[Example], folder: Path, name: str) -> list[Path]:
    paths: list[Path] = []
    with ExitStack() as opened:
        for number, example in enumerate(examples):
            if number % SHARD_ROWS == 0:
                opened.close()
                paths.append(folder / f"{name}-{number // SHARD_ROWS:06}.tar")
                shard = opened.enter_context(tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT))
            for member, data in _members(example, f"{number:06}"):
                header = tarfile.TarInfo(member)  # owner and time stay 0: the same examples, the same bytes
                header.size, header.mode = len(data), 0o644
                shard.addfile(header, io.BytesIO(data))  # pyright: ignore[reportPossiblyUnboundVariable]  # opened by the first
    return paths


def _in_base64(image: ImagePart) -> dict[str, str]:
    return {"base64": base64.b64encode(png(image)).decode()}


def _members(example: Example, key: str) -> Iterator[tuple[str, bytes]]:
    """The files of a sample: its record first, then its images, numbered."""
    images: list[bytes] = []
    record = to_record(example, "webdataset", lambda image: images.append(png(image)), _in_base64)
    record.pop("image", None)  # they are the images of the sample, in the order of their numbers
    yield f"{key}.json", _line(record).encode()
    yield from ((f"{key}.{number}.png", data) for number, data in enumerate(images))
