"""Files as a source of examples: quick to open, checked when asked for, and every error names file, line and field."""

import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from tests.dataset_fixtures import cut_video, video

from metamorph.data.check import check
from metamorph.data.mixture import ExampleSource
from metamorph.data.record_files import write_jsonl
from metamorph.data.source import open_source
from metamorph.errors import ConfigError, MediaError, RecordError
from metamorph.messages import Example, Message, VideoPart
from metamorph.training.assembly import load_source
from metamorph.training.config import SourceConfig


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
    path = write(tmp_path / "rows.jsonl", line(0), line(1, id="x", source="s", kind="qa", weight=2), line(2), end="")
    source = open_source(path)
    assert isinstance(source, ExampleSource)
    assert (len(source), source.name) == (3, "rows")
    assert [source[i].messages[1].text for i in range(3)] == ["answer 0", "answer 1", "answer 2"]
    assert (source[0].id, source[0].source) == (f"{path}:1", "rows")
    assert (source[1].id, source[1].source, source[1].kind, source[1].weight) == ("x", "s", "qa", 2.0)
    assert source[1].place == f"{path}:2"
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("{", "JSON"),
        ("5", "object"),
        ("x" * 10, "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"messages": [], "messages": []}', "'messages' twice"),
        ('{"messages": []}', "an empty list but a list of turns"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
        ('{"massages": []}', "Did you mean 'messages'"),
        ('{"Messages": []}', "Did you mean 'messages'"),
        ('{"messages": [], }', "behind a comma that nothing follows"),
        ('{"messages": "a\tb"}', "Invalid control character at character 15"),
        (line(1, wieght=2), "Did you mean 'weight'"),
        (picture_line("../x.png"), "but a path inside"),
        ("9" * 5000, "JSON"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]}', "surrogate"),
    ],
)
def test_a_broken_line_is_named_when_it_is_asked_for(tmp_path, broken, found):
    source = open_source(write(tmp_path / "rows.jsonl", line(0), broken, line(2)), format="metamorph")
    assert source[0].messages[0].text == "question 0"
    with pytest.raises((RecordError, MediaError), match=found) as caught:
        source[1]
    assert "rows.jsonl:2" in str(caught.value)
    assert source[2].messages[0].text == "question 2"


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(0).encode() + b"\n\xff\xfe\n5\n")  # a byte-order mark at the start can be read
    source = open_source(path)
    assert source[0].messages[0].text == "question 0"
    for index in (1, 2):
        with pytest.raises(RecordError, match=rf"rows\.jsonl:{index + 1}"):
            source[index]


def test_files_that_are_broken_as_a_whole_are_refused_when_they_are_opened(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "wide.jsonl").write_bytes(line(0).encode("utf-16"))
    (tmp_path / "cut.json").write_text(f"[{line(0)},\n{line(1)},\n{line(2)[:20]}")
    for name in ("empty.jsonl", "blank.jsonl", "wide.jsonl", "cut.json", "none.jsonl"):
        with pytest.raises(RecordError, match=name):
            open_source(tmp_path / name)
    assert len(open_source(tmp_path / "cut.json", whole_files=False)) >= 2  # to look at what is left


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"format 'lava' but one of llava, .* is expected"):
        open_source(write(tmp_path / "rows.jsonl", line(0)), format="lava")


def test_a_column_for_no_field_and_a_root_that_is_no_folder_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", line())
    with pytest.raises(ConfigError, match=r"a column for 'imgae' but one of .*open_source.*Did you mean 'image' by 'imgae'\?"):
        open_source(path, columns={"imgae": "img"})
    for root in (tmp_path / "nowhere", path):
        with pytest.raises(ConfigError, match=r"is no folder, but the one to which paths are relative is needed"):
            open_source(path, image_root=root)


def test_a_column_that_no_row_has_is_refused(tmp_path, caplog):
    lines = [json.dumps({"id": str(number), "question": "What?", "answer": "That."}) for number in range(3000)]
    lines[1700] = json.dumps({"img": "a.png", "question": "<image> What?", "answer": "That."})
    path = write(tmp_path / "rows.jsonl", *lines[:5])
    found = r"columns id, question, answer but 'quest' is named \(columns of rows, 5 rows read\)\. Did you mean 'question'"
    with pytest.raises(ConfigError, match=found):
        open_source(path, columns={"question": "quest"})
    source = open_source(write(path, *lines[:1701]), columns={"image": "img"})  # which one row of them has
    assert len(source[1700].messages[0].images) == 1 and not caplog.text
    source = open_source(write(path, *lines), columns={"image": "imgg"})  # more rows than are read for it: a check tells
    assert "'imgg' is named (columns of rows, 2000 rows read)" in caplog.text
    fault, *_ = check(source, sample=None).faults
    assert (fault.code, fault.place, fault.field) == ("column-unknown", str(path), "image")
    assert fault.found == "'imgg' in none of 3000 rows read" and fault.remedy == "Did you mean 'img'?"
    assert open_source(write(path, "broken"), columns={"image": "img"}, whole_files=False)  # nothing could be compared


def test_a_prompt_without_answer_may_be_allowed(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    assert open_source(path, needs_answer=False)[0].messages == (Message.user("hi"),)


def test_images_lie_below_the_root(tmp_path):
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "rows.jsonl", picture_line("images/a.png"))
    assert open_source(path)[0].messages[0].images[0].image == tmp_path / "images" / "a.png"
    inside = open_source(path, image_root=tmp_path / "images")
    assert inside[0].messages[0].images[0].image == tmp_path / "images" / "images" / "a.png"


def test_written_examples_are_read_back(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    examples = [
        Example((Message.user(tmp_path / "a.png", "naïve ☃"), Message.assistant(b"drawn")), str(i), "s", "qa", 0.5) for i in range(3)
    ]
    write_jsonl(tmp_path / "rows.jsonl", examples)
    source = open_source(tmp_path / "rows.jsonl")
    assert [source[i] for i in range(3)] == examples
    assert not list(tmp_path.glob("*.partial"))


def test_a_source_is_shared_by_threads_and_processes(tmp_path):
    source = open_source(write(tmp_path / "rows.jsonl", *map(line, range(50))))
    with ThreadPoolExecutor(4) as pool:
        assert [e.messages[0].text for e in pool.map(source.__getitem__, range(50))] == [f"question {i}" for i in range(50)]
    assert pickle.loads(pickle.dumps(source))[7] == source[7]  # noqa: S301  # our own bytes, as spawning does


def test_a_recipe_names_files_with_plain_values(tmp_path):
    rows = [json.dumps({"picture": "a.png", "ask": f"What is {i}?", "reply": str(i)}) for i in range(3)]
    path = write(tmp_path / "rows.jsonl", *rows)
    columns = {"image": "picture", "question": "ask", "answer": "reply"}
    source = load_source(SourceConfig(source="metamorph.data.source.open_source", kwargs={"path": str(path), "columns": columns}))
    assert [source[i].messages[1].text for i in range(3)] == ["0", "1", "2"]
    assert source[1].messages[0].images[0].image == tmp_path / "a.png"


def test_a_file_in_which_our_records_and_others_mix_is_read_by_the_looser_rule(tmp_path):
    other = json.dumps({"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}], "images": ["a.png"]})
    source = open_source(write(tmp_path / "rows.jsonl", line(0), other))
    assert source.settings.format == "messages"
    assert len(source[1].messages[0].images) == 1


def about_videos(*names):
    return [json.dumps({"video": name, "question": f"What happens in {number}?", "answer": "Rain."}) for number, name in enumerate(names)]


def test_a_damaged_video_is_refused_or_shortened_with_a_warning(tmp_path, caplog):
    clip = cut_video(tmp_path / "clip.mkv")
    path = write(tmp_path / "rows.jsonl", *about_videos("clip.mkv", "clip.mkv"))
    with pytest.raises(
        MediaError, match=r"only 4 frames of 8 .*but a whole video is expected \(.*rows\.jsonl:1, video\)\. Fetch it again, or"
    ) as error:
        open_source(path)[0]
    assert error.value.fault is not None and error.value.fault[0] == "video-broken"
    source = open_source(path, damaged_videos="shorten")
    for index in (0, 1, 0):
        (part,) = (part for part in source[index].messages[0].parts if isinstance(part, VideoPart))
        assert (len(part.frames), part.fps) == (4, 1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert all(str(clip) in record.message and "only 4 frames of 8" in record.message for record in caplog.records)
    assert len(open_source(path, max_frames=3)[0].messages[0].images) == 3  # all of them lie before the break


def test_a_damaged_video_within_a_row_is_named_by_its_row(tmp_path, caplog):
    members = {"1.mkv": cut_video(tmp_path / "clip.mkv").read_bytes(), "1.json": b'{"question": "What happens?", "answer": "Rain."}'}
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert len(open_source(tmp_path / "shard.tar", damaged_videos="shorten")[0].messages[0].images) == 4
    assert f"{tmp_path / 'shard.tar'} sample 1 video: only 4 frames of 8" in caplog.text
    with pytest.raises(MediaError, match=r"shard\.tar sample 1, video"):
        open_source(tmp_path / "shard.tar")[0]


def test_videos_may_be_required_to_give_some_frames(tmp_path):
    video(tmp_path / "clip.mkv", seconds=2)
    path = write(tmp_path / "rows.jsonl", *about_videos("clip.mkv"))
    assert len(open_source(path, min_frames=2)[0].messages[0].images) == 2
    with pytest.raises(MediaError, match=r"2 frame\(s\) from 2 s .* but at least 3 are needed .*rows\.jsonl:1, video"):
        open_source(path, min_frames=3)[0]
    for wrong in ({"min_frames": 0}, {"min_frames": 46}, {"min_frames": 3, "max_frames": 2}, {"fps": 0.0}, {"damaged_videos": "cut"}):
        with pytest.raises(ConfigError):
            open_source(path, **wrong)
