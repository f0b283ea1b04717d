"""JSON-lines records: quick to open, checked when asked for, and every error names file and line."""

import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metamorph.data import readers
from metamorph.data.mixture import ExampleSource
from metamorph.data.readers import JsonlSource, Quarantine, write_jsonl
from metamorph.errors import MediaError, RecordError
from metamorph.messages import Example, Message


def line(number=0, **fields):
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
    return json.dumps({"messages": messages, **fields})


def picture_line(path):
    parts = [{"type": "image", "path": path}, {"type": "text", "text": "What?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]})


def write(path, *lines, end="\n"):
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


def test_records_are_read_in_order(tmp_path):
    source = JsonlSource(write(tmp_path / "rows.jsonl", line(0), line(1, id="x", source="s", kind="qa", weight=2), line(2), end=""))
    assert isinstance(source, ExampleSource)
    assert len(source) == 3
    assert [example.messages[1].text for example in (source[0], source[1], source[2])] == ["answer 0", "answer 1", "answer 2"]
    assert (source[0].id, source[0].source) == (f"{tmp_path}/rows.jsonl:1", "rows")
    assert (source[1].id, source[1].source, source[1].kind, source[1].weight) == ("x", "s", "qa", 2.0)
    assert source[1].place == source.place(1) == f"{tmp_path}/rows.jsonl:2"
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.booleans(), st.integers(1, 300))
def test_blank_lines_are_passed_over_but_counted(blanks, newline_at_end, chunk):
    text = "".join("\n" * blank + line(number) + "\n" for number, blank in enumerate(blanks))
    path = Path(write_temporary(text if newline_at_end else text[:-1]))
    before, readers._CHUNK = readers._CHUNK, chunk  # line ends fall anywhere within a chunk
    try:
        source = JsonlSource(path)
        assert [source[i].messages[0].text for i in range(len(source))] == [f"question {i}" for i in range(len(blanks))]
        numbers = [int(source.place(i).rsplit(":", 1)[1]) for i in range(len(source))]
        assert numbers == [int(n) for n in np.cumsum(np.array(blanks) + 1)]
    finally:
        readers._CHUNK = before
        path.unlink()


def write_temporary(text):
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        file.write(text)
    return file.name


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("{", "no JSON"),
        ("5", "object of type int"),
        ("x" * 10, "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"messages": [], "messages": []}', "'messages' twice"),
        ('{"messages": []}', "0 messages"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "0 assistant messages"),
        ('{"massages": []}', r"\['messages'\] is missing"),
        (picture_line("../x.png"), "but a path inside"),
        ("9" * 5000, "no JSON"),
    ],
)
def test_a_broken_line_is_named_when_it_is_asked_for(tmp_path, broken, found):
    source = JsonlSource(write(tmp_path / "rows.jsonl", line(0), broken, line(2)))
    assert source[0].messages[0].text == "question 0"
    with pytest.raises((RecordError, MediaError), match=found) as caught:
        source[1]
    assert "rows.jsonl:2" in str(caught.value)
    assert source[2].messages[0].text == "question 2"


def test_bytes_that_are_not_text_and_lines_too_long(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(0).encode() + b"\n\xff\xfe\n5")  # a byte-order mark at the start is fine
    source = JsonlSource(path)
    assert source[0].messages[0].text == "question 0"
    for index in (1, 2):
        with pytest.raises(RecordError, match=rf"rows\.jsonl:{index + 1}"):
            source[index]
    with pytest.raises(RecordError, match=r"bytes but a line of at most 20 is allowed .*rows\.jsonl:1"):
        JsonlSource(path, max_line_bytes=20)[0]


def test_files_without_records_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name in ("empty.jsonl", "blank.jsonl"):
        with pytest.raises(RecordError, match=f"0 records .*{name}"):
            JsonlSource(tmp_path / name)
    for name in ("none.jsonl", "."):
        with pytest.raises(RecordError, match="cannot be read"):
            JsonlSource(tmp_path / name)


def test_a_prompt_without_answer_may_be_allowed(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    assert JsonlSource(path, needs_answer=False)[0].messages == (Message.user("hi"),)


def test_images_lie_below_the_root(tmp_path):
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "rows.jsonl", picture_line("images/a.png"))
    assert JsonlSource(path)[0].messages[0].images[0].image == tmp_path / "images" / "a.png"
    assert JsonlSource(path, root=tmp_path / "images")[0].messages[0].images[0].image == tmp_path / "images" / "images" / "a.png"


def test_written_examples_are_read_back(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    examples = [
        Example((Message.user(tmp_path / "a.png", "naïve ☃"), Message.assistant(b"drawn")), str(i), "s", "qa", 0.5) for i in range(3)
    ]
    write_jsonl(tmp_path / "rows.jsonl", examples)
    source = JsonlSource(tmp_path / "rows.jsonl")
    assert [source[i] for i in range(3)] == examples
    assert not list(tmp_path.glob("*.partial"))


def test_a_source_is_shared_by_threads_and_processes(tmp_path):
    source = JsonlSource(write(tmp_path / "rows.jsonl", *map(line, range(50))))
    with ThreadPoolExecutor(4) as pool:
        assert [e.messages[0].text for e in pool.map(source.__getitem__, range(50))] == [f"question {i}" for i in range(50)]
    assert pickle.loads(pickle.dumps(source))[7] == source[7]  # noqa: S301  # our own bytes, as spawning does


def test_quarantine_sets_a_bounded_number_of_lines_aside_and_reports_them(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", line(0), "{", line(2), '{"messages": 1}', line(4))
    with caplog.at_level(logging.WARNING):
        source = JsonlSource(path, quarantine=Quarantine(limit=2))
    assert [source[i].messages[0].text for i in range(len(source))] == ["question 0", "question 2", "question 4"]
    assert "2 of 5 lines" in caplog.text
    listing = [json.loads(entry) for entry in (tmp_path / "rows.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listing[1:]] == [2, 4]
    assert "rows.jsonl:4" in listing[2]["error"]
    for _ in range(2):  # by the list, and by reading
        with pytest.raises(RecordError, match=r"at least 2 broken lines but at most 1 may be set aside .*rows.jsonl:2"):
            JsonlSource(path, quarantine=Quarantine(limit=1))
        (tmp_path / "rows.jsonl.quarantine.jsonl").unlink(missing_ok=True)


def test_the_list_is_used_again_only_for_the_same_file_and_question(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", line(0), "{")
    JsonlSource(path, quarantine=Quarantine(limit=1))
    scans = []
    original = readers._find_broken
    monkeypatch.setattr(readers, "_find_broken", lambda *args: scans.append(1) or original(*args))
    assert len(JsonlSource(path, quarantine=Quarantine(limit=1))) == 1
    assert not scans
    write(path, line(0), "{", line(2), line(3))
    assert len(JsonlSource(path, quarantine=Quarantine(limit=1))) == 3
    assert len(scans) == 1
    (tmp_path / "rows.jsonl.quarantine.jsonl").write_text("half a li")
    assert len(JsonlSource(path, quarantine=Quarantine(limit=1))) == 3
    assert len(scans) == 2


def test_quarantine_may_look_at_the_images(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    path = write(
        tmp_path / "rows.jsonl", picture_line("good.png"), picture_line("bad.png"), picture_line("none.png"), picture_line("good.png")
    )
    assert len(JsonlSource(path, quarantine=Quarantine(limit=0))) == 4  # structure alone is fine
    listing = tmp_path / "elsewhere.jsonl"
    assert len(JsonlSource(path, quarantine=Quarantine(limit=2, check_images=True, path=listing))) == 2
    assert [json.loads(entry).get("line") for entry in listing.read_text().splitlines()] == [None, 2, 3]


def test_a_recipe_may_set_broken_lines_aside(tmp_path):
    """As YAML asks for it: `source: metamorph.training.assembly.jsonl_source`."""
    from metamorph.training.assembly import load_source
    from metamorph.training.config import SourceConfig

    path = write(tmp_path / "rows.jsonl", line(0), "{", picture_line("missing.png"))

    def load(**kwargs):
        return load_source(SourceConfig(source="metamorph.training.assembly.jsonl_source", kwargs={"path": str(path), **kwargs}))

    assert len(load()) == 3  # nothing is looked at before it is asked for
    assert len(load(set_aside=1)) == 2
    assert len(load(set_aside=2, check_images=True)) == 1
    with pytest.raises(RecordError, match="at most 1 may be set aside"):
        load(set_aside=1, check_images=True)
    with pytest.raises(RecordError, match="at most 0 may be set aside"):
        load(check_images=True)
