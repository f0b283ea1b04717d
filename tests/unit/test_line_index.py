"""Indexes of text files: every row at its place whatever lies between, kept beside the file, never trusted when the file has changed."""

import json
import os
import pickle
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metamorph.data import array_index, file_index, line_index
from metamorph.data.array_index import ArrayIndex
from metamorph.data.json_files import JsonArray, JsonLines
from metamorph.data.line_index import LineIndex, read_span
from metamorph.errors import RecordError

ANYWHERE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pieces = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"  \n", b"\t", b"ab", b'"', b"\r", b" x", "é".encode(), b"longer than a chunk"]), max_size=40
)


def twin_of_lines(data):
    """Slow and obvious: (line number, content) of each line that is not blank."""
    return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r\n")]


def read_all(path, index):
    return [(index.line(row), read_span(path, *index.span(row)).split(b"\n")[0]) for row in range(len(index))]


@ANYWHERE
@given(content=pieces, chunk=st.integers(1, 9))
def test_lines_are_found_wherever_chunks_end(content, chunk, tmp_path):
    data = b"".join(content)
    path = tmp_path / "lines"
    path.write_bytes(data)
    (tmp_path / "lines.index").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_index.chunks, "__defaults__", (chunk,))
        index = LineIndex(path)
    assert read_all(path, index) == twin_of_lines(data)
    assert index.num_crlf == data.count(b"\r\n")
    assert index.ends_open == bool(data.rpartition(b"\n")[2].strip(b" \t\r\n"))


@ANYWHERE
@given(values=st.lists(st.text(st.sampled_from('a"\n, ;\r'), max_size=6), min_size=1, max_size=12), chunk=st.integers(1, 9))
def test_line_ends_in_quotes_belong_to_a_value(values, chunk, tmp_path):
    quoted = ['"{}"'.format(value.replace('"', '""')) for value in values]
    path = tmp_path / "table.csv"
    path.write_bytes("\n".join(quoted).encode())
    (tmp_path / "table.csv.index").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_index.chunks, "__defaults__", (chunk,))
        index = LineIndex(path, quoted=True)
    assert [read_span(path, *index.span(row)).decode().removesuffix("\n") for row in range(len(index))] == quoted
    ends = np.cumsum([0, *(value.count("\n") + 1 for value in quoted)])
    assert [index.line(row) for row in range(len(index))] == (ends[:-1] + 1).tolist()


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\[]{},: \n\tüYy_'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('k"\\]}'), max_size=3), inner, max_size=3),
    max_leaves=8,
)


@ANYWHERE
@given(
    records=st.lists(st.dictionaries(st.sampled_from(["a", 'b"', "c\\"]), nested, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_elements_of_an_array_are_found_wherever_chunks_end(records, indent, ascii_only, chunk, tmp_path):
    path = tmp_path / "array.json"
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8")
    (tmp_path / "array.json.index").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_index, "CHUNK", chunk)
        rows = JsonArray(path)
    assert [dict(row.values) for row in rows] == records
    assert not list(rows.faults())
    if indent and len(records) > 1:
        places = [int(row.place.rpartition(":")[2]) for row in rows]
        assert all(text.split("\n")[line - 1].startswith(" {") for line in places)
        assert sorted(set(places)) == places


def test_the_index_takes_eight_bytes_a_row_and_is_used_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(1000)))
    first = LineIndex(path)
    assert first.location == tmp_path / "rows.jsonl.index"
    assert first.location.stat().st_size == 1024 + 8 * 1001
    built = first.location.stat().st_ino
    assert LineIndex(path).location.stat().st_ino == built
    assert [name.name for name in tmp_path.iterdir() if "partial" in name.name] == []


@pytest.mark.parametrize("change", ["longer", "same size", "times kept", "other kind", "damaged index", "short index"])
def test_an_index_that_does_not_fit_is_built_anew(change, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 10}\n{"n": 11}\n')
    before = path.stat()
    location = LineIndex(path).location
    if change == "longer":
        path.write_text('{"n": 1000}\n{"n": 11}\n{"n": 12}\n')
    elif change in ("same size", "times kept"):
        path.write_text('{"n": 1}\n{"n": 111}\n')
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "same size")))
    elif change == "other kind":
        location.unlink()
        LineIndex(path, quoted=True)
    elif change == "damaged index":
        location.write_bytes(b"{}" + location.read_bytes()[2:])
    else:
        location.write_bytes(location.read_bytes()[:-8])
    rows = JsonLines(path)
    assert [row.values["n"] for row in rows] == [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_an_index_goes_to_the_cache_where_none_can_lie_beside_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("METAMORPH_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / ("n" * 250)  # with .index behind it, longer than a name may be
    path.write_text('{"n": 1}\n')
    index = LineIndex(path)
    assert index.location.parent == tmp_path / "cache" / "indexes"
    assert str(index.location) in caplog.text
    caplog.clear()
    assert len(LineIndex(path)) == 1
    assert not caplog.text  # found there, not built again


def test_no_place_for_an_index_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAMORPH_CACHE_DIR", str(tmp_path / "file" / "below"))
    path = tmp_path / ("n" * 250)
    path.write_text("{}\n")
    with pytest.raises(RecordError, match="METAMORPH_CACHE_DIR"):
        LineIndex(path)


def test_a_full_disk_is_not_taken_for_an_unreadable_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 1000)
    (tmp_path / "small").mkdir()
    script = (
        "import resource, sys; from pathlib import Path; from metamorph.data.line_index import LineIndex\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); LineIndex(Path(sys.argv[1]))"
    )
    place = {**os.environ, "METAMORPH_CACHE_DIR": str(tmp_path / "small")}
    shown = subprocess.run([sys.executable, "-c", script, str(path)], env=place, capture_output=True, text=True)
    assert "RecordError: no folder in which an index can be written" in shown.stderr and "METAMORPH_CACHE_DIR" in shown.stderr
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["rows.jsonl"]


def test_those_who_build_at_once_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(20_000)))
    start, found = threading.Barrier(4), []

    def build():
        start.wait()
        found.append(JsonLines(path))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(len(rows), rows[19_999].values["n"]) for rows in found] == [(20_000, 19_999)] * 4
    assert sorted(one.name for one in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.index"]


def test_a_file_that_grows_meanwhile_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n')

    def scan(file, writer):
        writer.stream(np.array([0, 9], dtype=np.int64))
        with path.open("a") as more:
            more.write("{}\n")
        return {}

    with pytest.raises(RecordError, match="changes while it is read"):
        file_index.open_index(path, "test", scan)
    assert not (tmp_path / "rows.jsonl.index").exists()


def test_a_process_that_is_given_an_index_notices_another_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    sent = pickle.dumps(JsonLines(path))
    assert len(sent) < 2000  # the place of the index, not its numbers
    assert pickle.loads(sent)[1].values == {"n": 2}  # noqa: S301
    path.write_text('{"n": 1}\n')
    JsonLines(path)
    with pytest.raises(RecordError, match="under a running process"):
        pickle.loads(sent)[0]  # noqa: S301


def test_progress_counts_every_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n' * 1000)
    told = []
    LineIndex(path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (9000, 9000)
    (tmp_path / "array.json").write_text(json.dumps([{"n": 1}] * 1000))
    ArrayIndex(tmp_path / "array.json", progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == (tmp_path / "array.json").stat().st_size


def test_an_index_is_readable_by_whoever_may_read_the_folder(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    assert stat.S_IMODE(LineIndex(path).location.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)
