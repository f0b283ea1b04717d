"""Rows written in others' formats: read back as they were, whole or not at all, the same bytes each time."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from metamorph.cli.main import app
from metamorph.data.records import RecordSettings, to_example
from metamorph.data.references import Roots
from metamorph.data.rows import RawRow
from metamorph.data.writing import LAYOUTS, to_record, write
from metamorph.errors import ConfigError, RecordError
from metamorph.messages import Example, ImagePart, Message, TextPart, VideoPart
from metamorph.microworld.examples import MIXTURE
from metamorph.microworld.export import export, rows_to_export

RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_back(example: Example, layout) -> Example | None:
    """Through the record alone; media are handed over as they are."""
    record = to_record(example, layout, lambda part: part.image)
    return to_example(RawRow(record, "here"), RecordSettings(roots=Roots(None), needs_answer=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_rows_give_the_same_bytes(tmp_path, layout):
    first, second = (export(rows_to_export(12), layout, tmp_path / name) for name in ("first", "second"))
    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert first.rows == 12 and all(path.is_file() for path in (*first.files, *second.files))
    assert first.bytes == sum(map(len, files(tmp_path / "first").values()))


class Broken:
    """A source whose third row cannot be made."""

    name = "broken"

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Example:
        if index == 2:
            raise RecordError("a broken row")
        return rows_to_export(5)[index]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_leaves_nothing_behind(tmp_path, layout):
    (tmp_path / "out").mkdir()
    with pytest.raises(RecordError, match="a broken row"):
        export(Broken(), layout, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something"):
        export(rows_to_export(2), "messages", tmp_path)
    assert files(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "parts",
    [
        ("a line\n", RED, "\nand more"),
        ("before ", RED, " after"),
        ("What does <image> mean in ", RED, "?"),
        ("two", "texts"),
        ("`<image>`",),
        (RED, BLUE),
        (RED, "and", (BLUE, RED), "?"),
    ],
    ids=("line_breaks", "spaces", "a_tag_in_text", "two_texts", "code", "pictures", "a_list_of_pictures"),
)
def test_text_survives_as_it_is(parts, layout):
    example = Example((Message.user(*parts), Message.assistant(RED, "  yes \n")), "7", "here", "edit", 0.5)
    assert read_back(example, layout) == example


pieces = st.lists(
    st.one_of(
        st.sampled_from([*map(ImagePart, (RED, BLUE)), *(VideoPart((ImagePart(RED), ImagePart(BLUE)), fps) for fps in (None, 2.0))]),
        st.lists(st.sampled_from(["<image>", "<video>", "\n", " ", "a", "`", "é", "。"])).map("".join).filter(str.strip).map(TextPart),
    ),
    min_size=1,
    max_size=5,
).map(tuple)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(asked=pieces, answered=pieces)
def test_any_conversation_survives(layout, asked, answered):
    example = Example((Message("user", asked), Message("assistant", answered)), "7", "here", "edit")
    assert read_back(example, layout) == example


def test_what_no_reader_gives_back_is_refused():
    blank = Example((Message.user(RED, " \n", BLUE), Message.assistant("yes")), "7", "here")
    with pytest.raises(RecordError, match=r"empty text but .*here:7"):
        to_record(blank, "messages", lambda part: None)


def test_tokens_without_pixels_are_refused(tmp_path):
    drawn = Example((Message.user("Draw."), Message("assistant", (ImagePart(visual_tokens=torch.zeros(2, 3)),))), "7", "here")
    with pytest.raises(RecordError, match="visual tokens but pixels"):
        write([drawn], "messages", tmp_path, "train")


def test_no_rows_are_refused(tmp_path):
    for layout in LAYOUTS:
        with pytest.raises(RecordError, match="0 examples"):
            write([], layout, tmp_path, "train")


def test_a_picture_is_written_once(tmp_path):
    rows = [Example((Message.user(image, "?"), Message.assistant(image)), str(i), "here") for i, image in enumerate((RED, BLUE, RED))]
    write(rows, "messages", tmp_path, "train")
    assert sorted(files(tmp_path / "images")) == ["000000-0.png", "000001-0.png"]


def test_large_sets_go_into_several_tars(tmp_path, monkeypatch):
    monkeypatch.setattr("metamorph.data.writing.SHARD_ROWS", 3)
    said = (Message.user("Hello."), Message.assistant("Good day."))
    paths = write((Example(said, str(number), "here") for number in range(4)), "webdataset", tmp_path, "train")
    assert [path.name for path in paths] == ["train-000000.tar", "train-000001.tar"]
    with tarfile.open(paths[1]) as shard:
        assert shard.getnames() == ["000003.json"]


def test_the_command_says_what_it_wrote(tmp_path):
    asked = ["--format", "llava", "--rows", "9", "--kinds", "generation,edit", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["microworld", "export", *asked])
    assert done.exit_code == 0, done.output
    path = tmp_path / "out" / "train.json"
    assert done.stdout.startswith(f"{path}: 9 rows as llava")
    records = json.loads(path.read_text())
    assert {record["kind"] for record in records} == {"generation", "edit"}
    assert len(records) == 9


def test_kinds_keep_their_shares_and_must_exist():
    assert dict(rows_to_export(5, "edit, generation").kinds) == {name: MIXTURE[name] for name in ("generation", "edit")}
    with pytest.raises(ConfigError, match=r"'edits' but that is no kind. Did you mean 'edit'\? \(--kinds\)"):
        rows_to_export(5, "edits")
