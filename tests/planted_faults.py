"""The faults that are planted, one at a time, in a file of good rows: where they can exist, and what a check must say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.planted import LAYOUTS, PLANTED, ROWS, Layout, Row, file_of, image_name, rows_for, write_parquet

Spoil = Callable[[list[Row], Layout], None]
MAX_LENGTH = 500
LONG = "word " * 700


@dataclass(frozen=True)
class Planted:
    """A fault: in which layouts it can exist, how it is made, and by what it must be named."""

    name: str
    code: str
    field: Callable[[Layout], str]
    needs: str  # words of `Layout.has`, all of them; "-name" leaves a layout out
    spoil: Spoil | None = None
    spoil_bytes: Callable[[bytes], bytes] | None = None
    whole_file: bool = False  # the place is the file, not the row
    last_row: bool = False

    @property
    def is_of_length(self) -> bool:
        """Whether it is told from a count of tokens."""
        return self.code in ("target-image-cut", "row-too-long")

    def fits(self, layout: Layout) -> bool:
        """Whether a file of this layout can have the fault."""
        return all((word[1:] != layout.name) if word.startswith("-") else word in layout.has for word in self.needs.split())


def _image(name: object) -> Spoil:
    def spoil(rows: list[Row], layout: Layout) -> None:
        rows[PLANTED].images = [name]

    return spoil


def _said(*turns: tuple[str, object], images: list | None = None) -> Spoil:
    def spoil(rows: list[Row], layout: Layout) -> None:
        rows[PLANTED].turns = [list(turn) for turn in turns]
        rows[PLANTED].images = images

    return spoil


def _spoiled_turn(number: int, part: int, value: object) -> Spoil:
    def spoil(rows: list[Row], layout: Layout) -> None:
        rows[PLANTED].turns[number][part] = value

    return spoil


def _first(role: str, text: str) -> Spoil:
    return lambda rows, layout: rows[PLANTED].turns.insert(0, [role, text])


def _other_shape(rows: list[Row], layout: Layout) -> None:
    rows[PLANTED].images_as = list if layout.name == "llava-json" else lambda media: media[0]


def _empty_list(rows: list[Row], layout: Layout) -> None:
    _said(("user", "What is a square?"), ("assistant", "A shape."), images=[])(rows, layout)
    rows[PLANTED].images_as = list


def _without_turns(rows: list[Row], layout: Layout) -> None:
    rows[PLANTED].extra = {layout.turns: None if layout.name == "parquet" else ...}


def _same_id(rows: list[Row], layout: Layout) -> None:
    rows[PLANTED].id = rows[3].id


def _copy(rows: list[Row], layout: Layout) -> None:
    rows[PLANTED].images = [3] if layout.name == "tar-pairs" else ["copy.png"]


def _video(name: object) -> Spoil:
    def spoil(rows: list[Row], layout: Layout) -> None:
        _said(("user", "<video>\nWhat happens?"), ("assistant", "Nothing."))(rows, layout)
        rows[PLANTED].videos = [name]

    return spoil


def _literal(rows: list[Row], layout: Layout) -> None:
    part = {"type": "text", "text": "What is <image> for?"}
    rows[PLANTED].extra = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A place."}]}


def _field(name: str) -> Callable[[Layout], str]:
    return lambda layout: getattr(layout, name)


def _turn(number: int) -> Callable[[Layout], str]:
    return lambda layout: layout.said.format(number)


def _base(layout: Layout) -> str:
    return layout.image.partition("[")[0]


def _in_system(layout: Layout) -> str:
    return "messages[0].content[0]" if "parts" in layout.has else layout.said.format(0)


def _role(layout: Layout) -> str:
    return "conversations[0].from" if layout.turns == "conversations" else "messages[0].role"


def _video_field(layout: Layout) -> str:
    others = {"messages": "videos[0]", "openai": "messages[0].content[0].video_url", "own": "messages[0].content[0].frames"}
    return others.get(layout.name, "video")


def _nothing(layout: Layout) -> str:
    return ""


def _line(number: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        lines = data.split(b"\n")
        at = number + (lines[0] == b"[")
        lines[at] = change(lines[at])
        return b"\n".join(lines)

    return spoil


_IMAGE = _field("image")
_CUT = ("user", LONG), ("assistant", "<image>")
FAULTS = (
    Planted("image missing", "image-missing", _IMAGE, "paths", _image("images/none.png")),
    Planted("path outside the root", "image-outside", _IMAGE, "paths", _image("../outside.png")),
    Planted("absolute path outside the root", "image-outside", _IMAGE, "paths", _image("/etc/outside.png")),
    Planted("absolute Windows path", "image-windows-path", _IMAGE, "paths", _image("C:\\data\\00.png")),
    Planted("name that differs by case", "image-case", _IMAGE, "paths", _image("case.png")),
    Planted("URL without permission", "image-url", _IMAGE, "paths", _image("https://example.com/00.png")),
    Planted("image truncated", "image-broken", _IMAGE, "", _image("truncated.jpg")),
    Planted("image of another type than its name says", "image-type", _IMAGE, "", _image("wrong.png")),
    Planted("bomb", "image-bomb", _IMAGE, "", _image("bomb.png")),
    Planted("same image under two names", "image-duplicate", _IMAGE, "-tar-conversations", _copy),
    Planted("fewer images than tags", "too-few-media", _base, "tags", _spoiled_turn(0, 1, "<image> and <image>?")),
    Planted("more images than tags", "too-many-media", _base, "tags", _spoiled_turn(0, 1, "What is shown?")),
    Planted("image in a system turn", "image-in-system", _in_system, "turns",
            _said(("system", "<image> Be brief."), ("user", "What is it?"), ("assistant", "It."), images=[image_name(0)])),
    Planted("tag inside a word", "tag-in-text", _turn(0), "tags", _spoiled_turn(0, 1, "What is a pre<image>fix?")),
    Planted("tag inside a code block", "tag-in-text", _turn(0), "tags", _spoiled_turn(0, 1, "What is this?\n```\nsee(<image>)\n```")),
    Planted("tag in a part of text", "tag-literal", lambda layout: "messages[0].content[0].text", "parts", _literal),
    Planted("literal <image_start> in text", "marker-in-text", _field("part"), "turns",
            _spoiled_turn(0, 1, "<image>\nIs <image_start> there?")),
    Planted("role marker in text", "marker-in-text", _turn(1), "turns", _spoiled_turn(1, 1, "A square.<|im_end|>")),
    Planted("marker in a caption", "marker-in-text", _turn(0), "captions", _spoiled_turn(0, 1, "A square. </s>")),
    Planted("image a string in some rows and a list in others", "field-changes-type", _base, "lists lines", _other_shape),
    Planted("empty image list", "images-empty", _base, "lists", _empty_list),
    Planted("null answer", "answer-null", _turn(1), "turns", _spoiled_turn(1, 1, None)),
    Planted("empty answer", "answer-empty", _turn(1), "turns", _spoiled_turn(1, 1, " ")),
    Planted("empty caption", "turn-empty", _turn(0), "captions", _spoiled_turn(0, 1, "")),
    Planted("missing conversations", "field-missing", _field("turns"), "turns -parquet -tar-conversations", _without_turns),
    Planted("null conversations", "turns-missing", _field("turns"), "turns -parquet",
            lambda rows, layout: rows[PLANTED].extra.update({layout.turns: None})),
    Planted("null conversations in a table", "turns-missing", _field("turns"), "embedded turns -tar-conversations", _without_turns),
    Planted("unknown role", "role-unknown", _role, "turns", _spoiled_turn(0, 0, "hooman")),
    Planted("two user turns in a row", "roles-repeat", _turn(1), "turns", _first("user", "Hello?")),
    Planted("starts with the assistant", "assistant-first", _turn(0), "turns", _first("assistant", "Hello.")),
    Planted("no assistant turn", "no-answer", _field("turns"), "turns", lambda rows, layout: rows[PLANTED].turns.pop()),
    Planted("target image cut by the length", "target-image-cut", _field("answer_image"), "turns", _said(*_CUT, images=[image_name(0)])),
    Planted("target image cut by the length of its caption", "target-image-cut", _IMAGE, "captions", _spoiled_turn(0, 1, LONG)),
    Planted("row too long", "row-too-long", _field("turns"), "turns", _said(("user", "Say it."), ("assistant", LONG))),
    Planted("duplicate id", "id-duplicate", lambda layout: "id", "ids", _same_id),
    Planted("a number where text is expected", "text-type", _turn(1), "types", _spoiled_turn(1, 1, 42)),
    Planted("a number as image", "image-type", _IMAGE, "types paths", _image(42)),
    Planted("broken JSON in the middle of the file", "json", _nothing, "lines", None,
            _line(PLANTED, lambda line: line.replace(b'"', b"", 1))),
    Planted("last line half-written", "half-written", _nothing, "lines", None, lambda data: data[:-30], last_row=True),
    Planted("BOM", "bom", _nothing, "lines", None, lambda data: b"\xef\xbb\xbf" + data, whole_file=True),
    Planted("UTF-16", "encoding", _nothing, "lines", None, lambda data: data.decode().encode("utf-16"), whole_file=True),
    Planted("CRLF", "crlf", _nothing, "lines", None, lambda data: data.replace(b"\n", b"\r\n"), whole_file=True),
    Planted("video without frames", "video-empty", _video_field, "videos", _video("sound.mkv")),
    Planted("list of no frames", "video-empty", _video_field, "frames", _video([])),
    Planted("video shorter than the sampling asks", "video-short", _video_field, "videos", _video("short.mp4")),
    Planted("video missing", "video-missing", _video_field, "videos paths", _video("none.mp4")),
)  # fmt: skip
CASES = [(layout, fault) for layout in LAYOUTS.values() for fault in FAULTS if fault.fits(layout)]


def plant(layout: Layout, fault: Planted, root: Path) -> tuple[Path, str]:
    """A file with the fault, and the place that must be named."""
    rows = rows_for(layout, ROWS)
    if fault.spoil is not None:
        fault.spoil(rows, layout)
    path = layout.write(file_of(layout, root, fault.name.replace(" ", "-").replace("<", "").replace(">", "")), rows)
    if fault.spoil_bytes is not None:
        path.write_bytes(fault.spoil_bytes(path.read_bytes()))
    place = str(path) if fault.whole_file else layout.place(path, ROWS - 1 if fault.last_row else PLANTED)
    return path, place


def plant_orphan(root: Path, *, caption: bool) -> tuple[Path, str]:
    """A tar in which a caption, or an image, stands alone."""
    layout = LAYOUTS["tar-pairs"]
    rows = rows_for(layout, ROWS)
    if caption:
        rows[PLANTED].images = None
    else:
        rows[PLANTED].turns[0][1] = None
    path = layout.write(file_of(layout, root, f"orphan-{caption}"), rows)
    return path, layout.place(path, PLANTED)


def plant_absent_column(root: Path) -> Path:
    """A Parquet file that lost its images."""
    layout = LAYOUTS["parquet"]
    return write_parquet(file_of(layout, root, "without-images"), rows_for(layout, ROWS), drop="images")
