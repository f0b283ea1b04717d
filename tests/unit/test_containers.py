"""Rows of every kind of container: told apart by content, read by position, faults named with their place; nothing missing silently."""

import csv
import io
import json
import multiprocessing
import pickle
import re
import tarfile
from dataclasses import dataclass
from itertools import chain

import pytest
from PIL import Image

from metamorph.data.containers import ConcatenatedRows, open_rows
from metamorph.data.faults import Fault
from metamorph.data.image_folder import CaptionedImages, CsvLines
from metamorph.data.json_files import JsonArray, JsonLines
from metamorph.data.mixture import Mixture, WeightedSource
from metamorph.data.parquet import TableRows, open_hub, parse_reference
from metamorph.data.rows import Rows, refuse_broken_files
from metamorph.data.stream import BatchStream
from metamorph.data.streaming import stream_rows
from metamorph.data.webdataset import TarSamples
from metamorph.errors import CheckpointError, ConfigError, RecordError
from metamorph.messages import Example, Message


def picture(kind="JPEG", size=4):
    data = io.BytesIO()
    Image.new("RGB", (size, size), (200, 10, 10)).save(data, kind)
    return data.getvalue()


JPEG = picture()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path, **columns):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, row_group_size=4)
    return path


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def codes(faults):
    return [fault.code for fault in faults]


@pytest.mark.parametrize(
    ("text", "kind", "places"),
    [
        ('{"n": 0}\n{"n": 1}\n', JsonLines, [":1", ":2"]),
        ('\n\n{"n": 0}\n   \n{"n": 1}', JsonLines, [":3", ":5"]),
        ('\n[\n {"n": 0},\n {"n": 1}\n]\n', JsonArray, [":3", ":4"]),
        ('[{"n": 0}, {"n": 1}]', JsonArray, ["[0]", "[1]"]),
    ],
)
def test_json_is_told_apart_by_content(text, kind, places, tmp_path):
    rows = open_rows(write(tmp_path / "rows.data", text))
    assert isinstance(rows, kind) and isinstance(rows, Rows)
    assert [row.values["n"] for row in rows] == [0, 1]
    assert [row.place for row in rows] == [f"{tmp_path / 'rows.data'}{place}" for place in places]
    assert not list(rows.faults())
    assert (rows.name, rows.root) == ("rows", tmp_path)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ('{"n": nope}', "json", "Expecting value at character 6"),
        ('{"n": 1, "n": 2}', "json", "key 'n' twice"),
        ('{"n": NaN}', "json", "NaN is no number"),
        ('{"n": -Infinity}', "json", "no number"),
        ('{"n": 1} {"n": 2}', "json", "Extra data"),
        ("[" * 100_000, "json", "recursion"),
        ("7", "not-an-object", "a number of JSON"),
        ("null", "not-an-object", "a null"),
        ('{"n": "\udcff"}', "encoding", "not UTF-8"),
    ],
)
def test_a_broken_line_is_named_when_it_is_read(line, code, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 0}\n' + line.encode("utf-8", "surrogateescape") + b'\n{"n": 2}\n')
    rows = open_rows(path)
    fault = rows.row_or_fault(1)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.place) == (code, f"{path}:2")
    assert said in fault.found
    with pytest.raises(RecordError) as raised:
        rows[1]
    assert str(raised.value) == str(fault.error())
    assert rows[2].values == {"n": 2}
    assert not list(rows.faults())


@pytest.mark.parametrize("tail", ['{"n": 1', '{"n": "ab', '{"n"', '{"n": tr', "{", '{"n": "é', '{"n": "a\\', '{"n": "\\u00'])
def test_a_half_written_last_line_is_told_from_a_broken_one(tail, tmp_path):
    cut = tail.encode()[:-1] if tail.endswith("é") else tail.encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 0}\n' + cut)
    rows = open_rows(path)
    assert codes(rows.faults()) == ["half-written"]
    assert next(rows.faults()) == rows.row_or_fault(1)
    path.write_bytes(b'{"n": 0}\n' + cut + b"\n")
    rows = open_rows(path)
    assert not list(rows.faults())
    assert rows.row_or_fault(1).code in ("json", "encoding")
    path.write_bytes(b'{"n": 0}\n' + b'{"n": nope, "m": "whole"}')
    assert open_rows(path).row_or_fault(1).code == "json"


def test_marks_and_line_ends_of_windows_are_read_and_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", '\ufeff{"n": 0}\r\n\r\n{"n": 1}\r\n')
    rows = open_rows(path)
    assert [(row.values["n"], row.place[-2:]) for row in rows] == [(0, ":1"), (1, ":3")]
    assert [(fault.code, fault.severity) for fault in rows.faults()] == [("bom", "warning"), ("crlf", "warning")]
    array = open_rows(write(tmp_path / "rows.json", '\ufeff[{"n": 0},\r\n{"n": 1}]\r\n'))
    assert [row.values["n"] for row in array] == [0, 1]
    assert codes(array.faults()) == ["bom", "crlf"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ['{"n": "zero"}\n{"n": "one"}\n', '[{"n": "zero"}]', 'file_name,text\na.jpg,"hello"\n'])
def test_wide_encodings_are_refused_with_the_command_that_helps(text, encoding, tmp_path):
    (fault,) = open_rows(write(tmp_path / "rows.jsonl", text, encoding)).faults()
    assert (fault.code, fault.severity) == ("encoding", "error")
    assert f"iconv -f UTF-{encoding[4:6]}" in fault.remedy


def test_long_lines_are_refused_unread(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"n": 0}\n{"n": "' + "x" * 100 + '"}\n')
    fault = JsonLines(path, max_row_bytes=50).row_or_fault(1)
    assert (fault.code, "at most 50" in fault.expected) == ("row-too-large", True)
    array = write(tmp_path / "rows.json", '[{"n": "' + "x" * 100 + '"}, {}]')
    assert JsonArray(array, max_row_bytes=50).row_or_fault(0).code == "row-too-large"


@pytest.mark.parametrize(
    ("text", "code", "place", "readable"),
    [
        ('[\n{"n": 0},\n{"n": 1},\n{"n": 2, "m": "x', "half-written", ":4", 2),
        ('[\n{"n": 0},\n{"n": 1}', "half-written", ":3", 2),
        ('[\n{"n": 0},\n{"n": 1},\n', "half-written", ":3", 2),
        ('[\n{"n": 0},\n{"n": 1, \n{"n": 2},\n{"n": 3}\n]\n', "json", ":3", 1),
        ('[\n{"n": 0},\n{"n": 1}\n]\n]\n{"n": 3}', "json", ":4", 2),
        ('[\n5, "x",\n{"n": 0},\n{"n": 1}\n]\n', "json", "", 2),
        ("[]", "empty", "", 0),
    ],
)
def test_a_broken_array_is_named_with_where(text, code, place, readable, tmp_path):
    path = write(tmp_path / "rows.json", text)
    rows = open_rows(path)
    (fault,) = rows.faults()
    assert (fault.code, fault.place, fault.severity) == (code, f"{path}{place}", "error")
    assert [row.values["n"] for row in map(rows.row_or_fault, range(len(rows))) if not isinstance(row, Fault)] == list(range(readable))


@pytest.mark.parametrize("between", [" ", ", 7,", " junk ", ",,"])
def test_what_stands_between_elements_makes_a_row_unreadable(between, tmp_path):
    rows = open_rows(write(tmp_path / "rows.json", f'[{{"n": 0}}, {{"n": 1}}{between}{{"n": 2}}]'))
    assert [isinstance(rows.row_or_fault(index), Fault) for index in range(3)] == [False, True, False]
    with pytest.raises(RecordError, match=r"rows\.json\[1\]"):
        rows[1]


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", f'{{"n": "{name}0"}}\n{{"n": "{name}1"}}\n')
    expected = ["a0", "a1", "b0", "b1", "c0", "c1"]
    files = [tmp_path / f"{name}.jsonl" for name in "cab"]
    for path in (files, str(tmp_path / "*.jsonl"), tmp_path, [tmp_path / "[ab].jsonl", tmp_path / "c.jsonl"]):
        rows = open_rows(path)
        assert isinstance(rows, ConcatenatedRows)
        assert [row.values["n"] for row in rows] == expected
        assert rows[3].place == f"{tmp_path / 'b.jsonl'}:2"
        assert rows.root == tmp_path
    write(tmp_path / "b.jsonl", '{"n": "b0"}\n{"n"')
    assert codes(open_rows(tmp_path).faults()) == ["half-written"]


def test_paths_that_name_nothing_usable_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", '{"n": 0}\n')
    write(tmp_path / "x" / "b.jsonl", '{"n": 0}\n')
    write(tmp_path / "prose.txt", "Hello.\nThis is no data.\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.png").write_bytes(picture("PNG"))
    for path, said in [
        (tmp_path / "missing.jsonl", "cannot be read"),
        (tmp_path / "*.nothing", "0 files that match"),
        ([tmp_path / "a.jsonl", str(tmp_path / "*.jsonl")], "twice"),
        ([tmp_path / "a.jsonl", tmp_path / "x" / "b.jsonl"], "image_root"),
        (tmp_path / "prose.txt", "begins with"),
        (tmp_path / "p.png", "begins with"),
        (tmp_path / "empty", "no file of records"),
        ([], "0 paths"),
    ]:
        with pytest.raises(RecordError, match=said):
            open_rows(path)
    both = open_rows([tmp_path / "a.jsonl", tmp_path / "x" / "b.jsonl"], image_root=tmp_path)
    assert (len(both), both.root) == (2, tmp_path)


@pytest.mark.parametrize(("module", "ending"), [("gzip", "gz"), ("bz2", "bz2"), ("lzma", "xz")])
def test_compressed_files_are_refused_with_a_remedy(module, ending, tmp_path):
    tar = write_tar(tmp_path / "pairs.tar", [("1.jpg", JPEG), ("1.txt", b"red")])
    packed = tmp_path / f"pairs.tar.{ending}"
    packed.write_bytes(__import__(module).compress(tar.read_bytes()))
    with pytest.raises(RecordError, match=r"Unpack it: \w+ pairs"):
        open_rows(packed)


@pytest.mark.parametrize("columns", [("file_name", "text"), ("image", "caption"), ("path", "caption")])
@pytest.mark.parametrize("name", ["metadata.csv", "captions.tsv", "metadata.jsonl", "anything.jsonl", "anything.csv"])
def test_a_folder_of_images_with_captions(name, columns, tmp_path):
    for image in ("a.jpg", "sub/b.jpg"):
        (tmp_path / image).parent.mkdir(exist_ok=True)
        (tmp_path / image).write_bytes(JPEG)
    values = [("a.jpg", 'a "red", big\nbus'), ("sub/b.jpg", "blue")]
    if name.endswith("jsonl"):
        text = "".join(json.dumps({**dict(zip(columns, row, strict=True)), "n": 1}) + "\n" for row in values)
    else:
        comma = "\t" if name.endswith("tsv") else ","
        quoted = [[f'"{cell}"' for cell in (row[0], row[1].replace('"', '""'), "1")] for row in values]
        text = "".join(comma.join(row) + "\r\n" for row in [[*columns, "n"], *quoted])
    write(tmp_path / name, text)
    rows = open_rows(tmp_path)
    assert isinstance(rows, CaptionedImages)
    assert [(row.values["image"], row.values["caption"], str(row.values["n"])) for row in rows] == [(*value, "1") for value in values]
    assert rows.root == tmp_path
    assert rows[1].place == f"{tmp_path / name}:{2 if name.endswith('jsonl') else 4}"
    assert not list(rows.faults())
    assert open_rows(tmp_path / name)[1].values == rows[1].values
    (tmp_path / "c.png").write_bytes(picture("PNG"))
    (fault,) = rows.faults()
    assert (fault.code, fault.severity, "c.png" in fault.found) == ("unlisted", "warning", True)
    with (tmp_path / name).open("a") as file:
        file.write("{half a row\n")  # which may name it
    assert "unlisted" not in [fault.code for fault in open_rows(tmp_path).faults()]


def test_images_are_missed_only_where_one_file_describes_the_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(picture("PNG"))
        write(tmp_path / f"{name}.jsonl", json.dumps({"image": f"images/{name}.png", "caption": name}) + "\n")
    assert not list(open_rows(tmp_path / "a.jsonl").faults())
    assert not list(open_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).faults()) and not list(open_rows(tmp_path).faults())
    (tmp_path / "b.jsonl").unlink()
    assert [fault.code for fault in open_rows(tmp_path).faults()] == ["unlisted"]


def test_captions_in_folders_below_are_relative_to_themselves(tmp_path):
    for folder in ("cats", "dogs"):
        write(tmp_path / folder / "metadata.csv", f"file_name,text\n{folder}.jpg,of {folder}\n")
        (tmp_path / folder / f"{folder}.jpg").write_bytes(JPEG)
    rows = open_rows(tmp_path)
    assert [row.values["image"] for row in rows] == ["cats/cats.jpg", "dogs/dogs.jpg"]
    assert all((rows.root / row.values["image"]).is_file() for row in rows)
    assert not list(rows.faults())


def test_images_without_captions_say_what_to_add(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with pytest.raises(RecordError, match=r"metadata\.csv"):
        open_rows(tmp_path)


def test_conversations_beside_their_images_stay_what_they_are(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    write(tmp_path / "train.json", '[{"image": "a.jpg", "text": "x", "conversations": []}]')
    write(tmp_path / "more.jsonl", '{"image": "a.jpg", "text": "x", "conversations": []}')
    rows = open_rows(tmp_path)
    assert [type(part) for part in rows.parts] == [JsonLines, JsonArray]
    assert "caption" not in rows[0].values


@pytest.mark.parametrize(
    ("row", "code"), [("a.jpg,one,two", "csv"), ("a.jpg", "csv"), ('a.jpg,"one" more', "csv"), ("a.jpg,\udcff", "encoding")]
)
def test_a_broken_row_of_csv_is_named(row, code, tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(f"file_name,text\nz.jpg,zero\n{row}\nb.jpg,two\n".encode("utf-8", "surrogateescape"))
    rows = open_rows(path)
    fault = rows.row_or_fault(1)
    assert (fault.code, fault.place) == (code, f"{path}:3")
    assert rows[2].values["caption"] == "two"


@pytest.mark.parametrize("broken", ["z.jpg,one,two", "z.jpg", 'z.jpg,"one" more'])
@pytest.mark.parametrize("columns", ["file_name,text", "picture,words"])
def test_a_broken_first_row_hides_neither_a_csv_nor_its_captions(columns, broken, tmp_path):
    path = write(tmp_path / "table.csv", f"{columns}\n{broken}\na.jpg,one\nb.jpg,two\nc.jpg,three\n")
    rows = open_rows(path)
    assert isinstance(rows, CaptionedImages if columns == "file_name,text" else CsvLines)
    assert (rows.row_or_fault(0).code, rows.row_or_fault(0).place) == ("csv", f"{path}:2")
    assert rows[1].values["caption" if columns == "file_name,text" else "words"] == "one"


@pytest.mark.parametrize("broken", ['{"file_name": "a.jpg", "text', '{"file_name": "a.jpg"}', "7"])
def test_a_broken_first_line_does_not_hide_captions_in_json(broken, tmp_path):
    good = "".join(json.dumps({"file_name": f"{n}.jpg", "text": "red"}) + "\n" for n in range(3))
    rows = open_rows(write(tmp_path / "captions.jsonl", f"{broken}\n{good}"))
    assert isinstance(rows, CaptionedImages)
    assert rows[1].values["caption"] == "red"
    talk = json.dumps({"image": "a.jpg", "text": "x", "conversations": []})
    assert isinstance(open_rows(write(tmp_path / "talk.jsonl", f"{broken}\n{talk}\n{talk}\n{talk}\n")), JsonLines)


def test_a_value_of_csv_over_the_modules_limit_is_named_as_such_and_the_limit_stays(tmp_path):
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    path = write(tmp_path / "captions.csv", f'file_name,text\na.jpg,{long}\nb.jpg,two\nc.jpg,"open\n{long}\nd.jpg,four\n')
    rows = open_rows(path)
    assert len(rows) == 3  # the quote that is not closed takes all that follows
    for index, place in ((0, ":2"), (2, ":4")):
        fault = rows.row_or_fault(index)
        assert (fault.code, fault.place, fault.severity) == ("csv", f"{path}{place}", "error")
        assert f"more than {limit} characters" in fault.found and "quote that is not closed" in fault.remedy
    assert rows[1].values["caption"] == "two"
    assert csv.field_size_limit() == limit
    path.write_text('file_name,text\na.jpg,one\nb.jpg,"two\nc.jpg,three\n')
    fault = open_rows(path).row_or_fault(1)
    assert (fault.code, fault.place, fault.found) == ("csv", f"{path}:3", "a double quote that is not closed")
    assert open_rows(write(tmp_path / "whole.csv", f'file_name,text\na.jpg,"{long[2:]}"\n'))[0].values["caption"] == long[2:]


@pytest.mark.parametrize(
    ("header", "number", "said"),
    [
        (b'file_name,"text', 2, "not closed"),
        (b'file_name,"text', 20_000, "more than"),
        (b"file_name,te\xffxt", 2, "not UTF-8"),
        (b"file_name," + b"x" * 140_000, 2, "more than"),
    ],
)
def test_a_broken_header_of_csv_is_a_fault_of_the_file(header, number, said, tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(header + b"\n" + b"a.jpg,one\n" * number)
    rows = CsvLines(path)
    (fault,) = rows.faults()
    assert (fault.place, fault.severity, said in fault.found) == (f"{path}:1", "error", True)
    with pytest.raises(RecordError, match=said):
        refuse_broken_files(rows)
    if len(rows):
        assert rows.row_or_fault(0) == fault


def test_rows_of_csv_that_a_carriage_return_parts_are_not_joined(tmp_path):
    rows = open_rows(write(tmp_path / "captions.csv", "file_name,text\na.jpg,one\nb.jpg\rtwo\n"))
    assert "carriage return" in rows.row_or_fault(1).found


def test_other_columns_of_csv_are_left_to_a_mapping(tmp_path):
    rows = open_rows(write(tmp_path / "table.csv", "picture;words\na.jpg;hello\n"))
    assert isinstance(rows, CsvLines)
    assert rows[0].values == {"picture": "a.jpg", "words": "hello"}


def test_samples_of_a_tar_are_read_where_they_lie(tmp_path):
    members = [
        ("x/1.jpg", JPEG),
        ("x/2.png", picture("PNG")),
        ("x/1.txt", b"one\n"),  # not beside its image
        ("x/2.json", b'{"caption": "two", "score": 0.5}'),
        ("3.10.jpg", b"ten"),
        ("3.9.jpg", b"nine"),
        ("3.json", b'{"messages": []}'),
        ("4.before.jpg", b"b"),
        ("4.after.JPG", b"a"),
        ("4.txt", b"edit"),
        ("4.cls", b"7"),
        ("5.json", b'{"conversations": []}'),
        ("._5.json", b"of a Mac"),
        ("sehr-" + "lang-" * 30 + "é.webp", b"long"),
        ("sehr-" + "lang-" * 30 + "é.txt", "größer".encode()),
    ]
    path = write_tar(tmp_path / "shard.tar", members)
    rows = open_rows(path)
    assert isinstance(rows, TarSamples)
    assert rows.root is None
    assert rows[0].values == {"caption": "one", "image": {"bytes": JPEG, "path": "x/1.jpg"}}
    assert (rows[1].values["caption"], rows[1].values["score"], rows[1].place) == ("two", 0.5, f"{path} sample x/2")
    assert [image["bytes"] for image in rows[2].values["images"]] == [b"nine", b"ten"]
    assert {name: rows[3].values[name]["bytes"] for name in ("before", "after")} == {"before": b"b", "after": b"a"}
    assert (rows[3].values["cls"], len(rows[3].values["images"])) == (b"7", 2)
    assert rows[4].values == {"conversations": []}
    assert rows[5].values["caption"] == "größer"
    assert len(rows) == 6
    assert not list(rows.faults())
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]  # noqa: S301


def test_paths_from_before_packing_give_way_to_the_pictures_in_the_tar(tmp_path):
    table = {"image": ["coco/1.png", "coco/2.png"], "conversations": []}
    members = [("a.json", json.dumps(table).encode()), ("a.0.png", b"first"), ("a.1.png", b"second")]
    row = open_rows(write_tar(tmp_path / "a.tar", members))[0]
    assert [image["bytes"] for image in row.values["images"]] == [b"first", b"second"]
    assert "image" not in row.values


def test_pictures_of_a_tar_come_in_the_order_of_its_record(tmp_path):
    members = [("1.json", b'{"image": ["x/second.png", "first.png"]}'), ("1.first.png", b"1"), ("1.second.png", b"2")]
    row = open_rows(write_tar(tmp_path / "a.tar", members))[0]
    assert [image["bytes"] for image in row.values["images"]] == [b"2", b"1"]
    members[0] = ("1.json", b'{"image": ["third.png", "first.png"]}')
    fault = open_rows(write_tar(tmp_path / "b.tar", members)).row_or_fault(0)
    assert (fault.code, fault.found) == ("orphan", "'third.png' named beside 'first.png'")


def test_a_folder_of_several_splits_is_not_one_source(tmp_path):
    write(tmp_path / "train-0001.jsonl", '{"n": 0}\n')
    write(tmp_path / "trainable.jsonl", '{"n": 1}\n')
    assert len(open_rows(tmp_path)) == 2
    write(tmp_path / "test.jsonl", '{"n": 2}\n')
    with pytest.raises(RecordError, match=r"splits test, train .*Name it: .*\*"):
        open_rows(tmp_path)
    assert len(open_rows(f"{tmp_path}/train*")) == 2


def test_images_with_capital_letters_are_named_by_their_rows(tmp_path):
    (tmp_path / "IMG_1.JPG").write_bytes(JPEG)
    write(tmp_path / "metadata.csv", "file_name,text\nIMG_1.JPG,one\n")
    assert not list(open_rows(tmp_path).faults())


def test_orphans_of_a_tar_are_named(tmp_path):
    members = [("1.jpg", JPEG), ("1.txt", b"one"), ("2.txt", b"two"), ("3.jpg", JPEG), ("4.json", b'{"caption": "four"}')]
    path = write_tar(tmp_path / "shard.tar", members)
    rows = open_rows(path)
    assert [(fault.code, fault.place) for fault in rows.faults()] == [("orphan", f"{path} sample {key}") for key in "234"]
    assert list(rows.faults()) == [rows.row_or_fault(index) for index in (1, 2, 3)]
    with pytest.raises(RecordError, match="sample 3"):
        rows[2]


def test_files_of_one_ending_and_broken_texts_in_a_tar(tmp_path):
    members = [("1.jpg", JPEG), ("1.txt", b"a"), ("1.txt", b"b"), ("2.jpg", JPEG), ("2.json", b"{"), ("3.jpg", JPEG), ("3.txt", b"\xff")]
    rows = open_rows(write_tar(tmp_path / "shard.tar", members))
    assert codes(map(rows.row_or_fault, range(3))) == ["repeated-member", "json", "encoding"]


@pytest.mark.parametrize(("cut", "code", "rows"), [(200, "truncated", 1), (1024 + 512 + 200, "truncated", 1), (2048, "truncated", 2)])
def test_a_tar_that_is_cut_off_is_told(cut, code, rows, tmp_path):
    """Cut off in the second image, in the header of its text, and behind it, where only the mark of the end is missing."""
    whole = write_tar(tmp_path / "whole.tar", [("1.txt", b"one"), ("1.jpg", b"j"), ("2.txt", b"two"), ("2.jpg", b"k" * 300)]).read_bytes()
    path = tmp_path / "cut.tar"
    ends = {200: 512 * 7 + 200, 1024 + 512 + 200: 512 * 6 + 200, 2048: 512 * 8}
    path.write_bytes(whole[: ends[cut]])
    found = open_rows(path)
    faults = [fault for fault in found.faults() if fault.code == code]
    assert [fault.severity for fault in faults] == ["warning" if cut == 2048 else "error"]
    assert sum(not isinstance(found.row_or_fault(index), Fault) for index in range(len(found))) == rows
    broken = bytearray(whole)
    broken[512 * 4 : 512 * 5] = b"x" * 512
    path.write_bytes(broken)
    assert "broken at byte 2048" in next(open_rows(path).faults()).found


def test_a_folder_of_tars_may_hold_their_tables(tmp_path):
    for name in ("00001", "00000"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", JPEG), (f"{name}.txt", name.encode())])
        write_parquet(tmp_path / f"{name}.parquet", caption=[name])
        write(tmp_path / f"{name}_stats.json", "{}")
    assert [row.values["caption"] for row in open_rows(tmp_path)] == ["00000", "00001"]
    write_parquet(tmp_path / "train.parquet", caption=["x"])
    with pytest.raises(RecordError, match="one kind of shards"):
        open_rows(tmp_path)


@pytest.fixture
def shards(tmp_path):
    image = {"bytes": JPEG, "path": "a.jpg"}
    for number in range(2):
        rows = range(10 * number, 10 * number + 10)
        columns = {"n": list(rows), "image": [image] * 10, "images": [[image, None]] * 10, "raw": [JPEG] * 10}
        write_parquet(tmp_path / f"train-{number}.parquet", **columns)
    return tmp_path


def test_parquet_keeps_what_it_holds(shards):
    rows = open_rows(shards, cache_dir=shards / "cache")
    assert isinstance(rows, TableRows)
    assert [row.values["n"] for row in rows] == list(range(20))
    assert rows.columns == ["n", "image", "images", "raw"]
    assert rows[13].values == {
        "n": 13,
        "image": {"bytes": JPEG, "path": "a.jpg"},
        "images": [{"bytes": JPEG, "path": "a.jpg"}, None],
        "raw": JPEG,
    }
    assert rows[13].place == f"{shards / 'train-1.parquet'} row 3"
    sent = pickle.dumps(rows)
    assert len(sent) < 20_000
    assert pickle.loads(sent)[13] == rows[13]  # noqa: S301


def test_what_describes_a_data_set_is_no_file_of_records(tmp_path):
    info = write(tmp_path / "dataset_info.json", json.dumps({"demo": {"file_name": "train.json"}}, indent=2))
    with pytest.raises(RecordError, match="one JSON object over several lines but one object on each line, or an array"):
        open_rows(info)
    with pytest.raises(RecordError, match="no file of records"):
        open_rows(tmp_path)
    write(tmp_path / "state.json", json.dumps({"_data_files": []}, indent=2))
    with pytest.raises(RecordError, match=r"save_to_disk.*to_parquet"):
        open_rows(tmp_path)
    write(tmp_path / "train.json", json.dumps([{"n": 1}], indent=2))
    assert [row.values["n"] for row in open_rows(tmp_path)] == [1]


def test_the_remedy_for_several_splits_names_one_that_opens(tmp_path):
    for name in ("a/data/train-0.jsonl", "a/data/test-0.jsonl", "b/test/x.jsonl", "b/train/x.jsonl"):
        write(tmp_path / name, '{"n": 1}\n')
    for folder in ("a", "b"):
        with pytest.raises(RecordError, match="splits test, train") as refused:
            open_rows(tmp_path / folder)
        named = re.search(r"Name it: (.*)\.$", str(refused.value))[1]
        assert len(open_rows(named)) == 1


def test_headers_alone_and_zeros_are_named_for_what_they_are(tmp_path):
    rows = open_rows(write(tmp_path / "metadata.csv", "file_name,text\n"))
    assert [fault.code for fault in rows.faults()] == ["empty"]
    rows = open_rows(write(tmp_path / "pandas.csv", ",file_name,text\n0,a.png,a bus\n"))
    assert rows[0].values["caption"] == "a bus"
    with pytest.raises(RecordError, match="begins with 1024 zero bytes"):
        open_rows(write(tmp_path / "empty.tar", "\0" * 1024))


def test_names_of_parquet_files_are_no_patterns(tmp_path):
    for name, value in (("a[1]", "asked for"), ("a1", "another's"), ("b*", "asked for"), ("bb", "another's")):
        write_parquet(tmp_path / f"{name}.parquet", n=[value])
    for name in ("a[1]", "b*"):
        path = tmp_path / f"{name}.parquet"
        assert [row.values["n"] for row in open_rows([path], cache_dir=tmp_path / "cache")] == ["asked for"]
        assert [row.values["n"] for row in stream_rows([path], seed=None)] == ["asked for"]


def test_images_of_the_hubs_feature_stay_encoded(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "list": datasets.List(datasets.Image())})
    image = {"bytes": JPEG, "path": None}
    datasets.Dataset.from_dict({"picture": [image], "list": [[image]]}, features=features).to_parquet(tmp_path / "train.parquet")
    row = open_rows(tmp_path / "train.parquet", cache_dir=tmp_path / "cache")[0]
    assert row.values == {"picture": image, "list": [image]}


def test_broken_and_unequal_parquet_files_are_named(shards):
    whole = (shards / "train-0.parquet").read_bytes()
    (shards / "train-0.parquet").write_bytes(whole[:-20])
    rows = open_rows([shards / "train-0.parquet", shards / "train-1.parquet"], cache_dir=shards / "cache")
    assert [(fault.code, fault.place) for fault in rows.faults()] == [("truncated", str(shards / "train-0.parquet"))]
    assert rows[0].values["n"] == 10
    write_parquet(shards / "train-2.parquet", other=["x"])
    with pytest.raises(RecordError, match="equal columns"):
        open_rows([shards / "train-1.parquet", shards / "train-2.parquet"], cache_dir=shards / "cache")


def test_a_local_folder_is_read_as_the_hub_lays_it_out(shards):
    rows = open_hub(str(shards), cache_dir=shards / "cache")
    assert [row.values["n"] for row in rows] == list(range(20))
    with pytest.raises(RecordError, match="validation"):
        open_hub(str(shards), split="validation", cache_dir=shards / "cache")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("hf://datasets/o/n", ("o/n", None, None, "train")),
        ("hf://datasets/o/n/test", ("o/n", None, None, "test")),
        ("hf://datasets/o/n:c", ("o/n", None, "c", "train")),
        ("hf://datasets/o/n@abc:c/test", ("o/n", "abc", "c", "test")),
        ("hf://datasets/n", ("n", None, None, "train")),
    ],
)
def test_names_on_the_hub(reference, expected):
    assert parse_reference(reference) == expected


@pytest.mark.parametrize("reference", ["hf://models/o/n", "hf://datasets/", "hf://datasets/o/n/test/more", "hf://datasets/o//n"])
def test_other_names_on_the_hub_are_refused(reference):
    with pytest.raises(RecordError, match="OWNER/NAME"):
        parse_reference(reference)


def numbers(stream, count=None):
    return [row.values["n"] for row, _ in zip(stream, range(count or 10_000))]  # noqa: B905


@pytest.mark.parametrize(("seed", "world_size"), [(None, 1), (5, 1), (5, 2), (5, 3)])
def test_a_stream_gives_every_row_once_and_resumes_exactly(seed, world_size, shards, caplog):
    files = sorted(shards.glob("*.parquet"))

    def opened(rank):
        return stream_rows(files, seed=seed, block=4, rank=rank, world_size=world_size)

    ranks = [opened(rank) for rank in range(world_size)]
    first, second = [numbers(rank) for rank in ranks], [numbers(rank) for rank in ranks]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20))
    assert (first == second) == (seed is None)
    for stop in (0, 1, 4, 6):
        reading = opened(0)
        taken = iter(reading)
        assert [next(taken).values["n"] for _ in range(stop)] == first[0][:stop]
        state = json.loads(json.dumps(reading.state_dict()))
        resumed = opened(0)
        resumed.load_state_dict(state)
        assert numbers(resumed) == first[0][stop:]
        assert numbers(resumed) == second[0]
    assert not caplog.text


def test_streams_refuse_what_does_not_fit(shards):
    files = sorted(shards.glob("*.parquet"))
    with pytest.raises(ConfigError, match="rank 2"):
        stream_rows(files, seed=0, rank=2, world_size=2)
    state = stream_rows(files, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="seed 0"):
        stream_rows(files, seed=1).load_state_dict(state)
    row = next(iter(stream_rows(str(shards), seed=0)))
    assert row.values["image"]["bytes"] == JPEG
    assert "rank 0 of 1" in row.place


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stream_is_shared_out_over_ranks_and_workers(tmp_path):
    from torch.utils.data import DataLoader

    for number in range(6):
        write_parquet(tmp_path / f"train-{number}.parquet", n=list(range(7 * number, 7 * number + 7)))
    found = []
    for rank in range(3):
        stream = stream_rows(sorted(tmp_path.glob("*.parquet")), seed=3, block=5, rank=rank, world_size=3)
        found += [row.values["n"] for row in DataLoader(stream.dataset(), batch_size=None, num_workers=2, multiprocessing_context="spawn")]
    assert sorted(found) == list(range(42))


@dataclass(frozen=True)
class Named:
    """Rows as examples whose id is the row's number."""

    rows: Rows

    @property
    def name(self):
        return self.rows.name

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Example((Message.user("n"), Message.assistant("y")), str(self.rows[index].values["n"]), self.name)


def identity(example):
    """The number that an example carries, and the process that read it."""
    return int(example.id), multiprocessing.current_process().name


def blank(item):
    return -1, item[1]


def test_ranks_and_workers_together_read_every_row_of_an_index_once(tmp_path):
    """3 ranks x 2 workers over 101 rows, which neither number divides."""
    path = write(tmp_path / "rows.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(101)))
    seen, processes = [], set()
    for rank in range(3):
        mixture = Mixture([WeightedSource(Named(open_rows(path)))], seed=1, order="epoch")
        steps = BatchStream(mixture, identity, batch_size=6, collate=list, rank=rank, world_size=3, workers=2, blank=blank)
        items = [item for step in steps for batch in step for item in batch if item[0] >= 0]
        seen += [number for number, _ in items]
        processes |= {(rank, process) for _, process in items}
    assert sorted(seen) == list(range(101))
    assert len(processes) == 6
    assert multiprocessing.current_process().name not in {name for _, name in processes}
