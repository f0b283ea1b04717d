"""Messages: construction, validation, and the JSON round trip."""

import base64
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metamorph.errors import MediaError, RecordError
from metamorph.messages import (
    Example,
    ImagePart,
    Message,
    TextPart,
    VideoPart,
    as_part,
    from_json,
    messages_from_json,
    messages_to_json,
    to_json,
    validate_messages,
)

PICTURE = Image.new("RGB", (3, 2), (250, 10, 20))


def test_plain_values_become_the_obvious_parts():
    message = Message.user("a", PICTURE, Path("x.png"), b"bytes", [PICTURE, b"frame"])
    assert [type(part) for part in message.parts] == [TextPart, ImagePart, ImagePart, ImagePart, VideoPart]
    assert len(message.images) == 5  # frames included, in reading order
    assert message.text == "a"


@pytest.mark.parametrize("value", [3, None, ["text"], {"a": 1}])
def test_other_values_are_refused(value):
    with pytest.raises(RecordError, match="but text, an image or a list of images is needed"):
        as_part(value)


def test_an_image_part_holds_exactly_one_thing():
    with pytest.raises(RecordError, match=r"0 of \(image, visual_tokens\) but exactly 1"):
        ImagePart()
    with pytest.raises(RecordError, match=r"2 of \(image, visual_tokens\) but exactly 1"):
        ImagePart(PICTURE, visual_tokens=torch.ones(2, 3))
    with pytest.raises(RecordError, match=r"shape \(1, 2, 3\) but \(k, v\)"):
        ImagePart(visual_tokens=torch.ones(1, 2, 3))


def test_image_parts_compare_by_content():
    assert ImagePart(PICTURE) == ImagePart(PICTURE.copy())
    assert ImagePart(b"a") != ImagePart(b"b")
    assert ImagePart(b"a") != ImagePart(Path("a"))
    assert ImagePart(visual_tokens=torch.ones(2, 3)) == ImagePart(visual_tokens=torch.ones(2, 3))
    assert ImagePart(visual_tokens=torch.ones(2, 3)) != ImagePart(visual_tokens=torch.zeros(2, 3))
    assert ImagePart(visual_tokens=torch.ones(2, 3)) != ImagePart(PICTURE)


SYSTEM, USER, ASSISTANT = Message.system("s"), Message.user("u"), Message.assistant("a")


@pytest.mark.parametrize("conversation", [[USER], [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER], [Message.user(PICTURE)]])
def test_well_formed_conversations_pass(conversation):
    validate_messages(conversation, "here")


@pytest.mark.parametrize(
    ("conversation", "found"),
    [
        ([], "0 messages but at least 1"),
        ([SYSTEM], "0 others but at least 1 user message"),
        ([ASSISTANT], "role 'assistant' but 'user' is expected"),
        ([USER, USER], r"role 'user' but 'assistant' is expected \(here, message 2 of 2; roles: user, user\)"),
        ([USER, ASSISTANT, ASSISTANT], "message 3 of 3"),
        ([USER, SYSTEM], "role 'system' but 'assistant'"),
        ([SYSTEM, SYSTEM, USER], "message 2 of 3"),
        ([Message("system", (TextPart("see"), ImagePart(PICTURE))), USER], r"1 image\(s\) in a system turn but 0"),
        ([Message("system", (VideoPart((ImagePart(PICTURE),) * 3),)), USER], r"3 image\(s\) in a system turn but 0"),
        ([Message("user", ())], "an empty user turn"),
        ([USER, Message.assistant("")], r"an empty assistant turn .*message 2 of 2"),
        ([Message.user("look", [])], "a video of 0 frames"),
        ([Message.user("\ud800")], "half a surrogate pair"),
    ],
)
def test_malformed_conversations_are_refused_with_the_place(conversation, found):
    with pytest.raises(RecordError, match=found) as caught:
        validate_messages(conversation, "here")
    assert "here" in str(caught.value)


def test_an_answer_is_asked_for_only_when_learning():
    validate_messages([USER])
    with pytest.raises(RecordError, match="0 assistant messages but at least 1"):
        validate_messages([USER], needs_answer=True)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
images = st.one_of(st.binary(min_size=1, max_size=9), st.just(Path("sub/a.png")), st.integers(1, 3))
videos = st.lists(images, min_size=1, max_size=3)


def part(value):
    """Integers stand for that many visual tokens: parts are built in the test, since the shape checks use `random`."""
    if isinstance(value, int):
        return ImagePart(visual_tokens=torch.arange(4.0 * value).reshape(value, 4) / 7)
    return VideoPart(tuple(part(frame) for frame in value), fps=29.97) if isinstance(value, list) else as_part(value)


@given(
    turns=st.lists(st.lists(st.one_of(texts, images, videos), min_size=1, max_size=4), min_size=1, max_size=4),
    system=st.none() | texts,
    weight=st.floats(0, 10),
    kind=st.just("") | texts,
)
def test_json_round_trip_is_the_identity(turns, system, weight, kind):
    messages = [Message.system(system)] if system else []
    messages += [Message(("user", "assistant")[i % 2], tuple(part(value) for value in turn)) for i, turn in enumerate(turns)]
    example = Example(tuple(messages), id="7", source="s", kind=kind, weight=weight)
    again = from_json(json.loads(json.dumps(to_json(example))))
    assert again == example
    assert messages_from_json(json.loads(json.dumps(messages_to_json(messages)))) == tuple(messages)


def test_pil_images_are_written_without_loss_and_half_tokens_exactly():
    example = Example((Message.user(PICTURE, ImagePart(visual_tokens=torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16))),), "1", "s")
    part, tokens = from_json(to_json(example)).messages[0].parts
    assert part.image.startswith(b"\x89PNG")
    assert tokens.visual_tokens.dtype == torch.float32
    assert tokens.visual_tokens.tolist() == [[0.5, 0.25]]


def test_paths_are_relative_to_the_root(tmp_path):
    example = Example((Message.user(tmp_path / "a" / "b.png"),), "1", "s")
    record = to_json(example, root=tmp_path)
    assert record["messages"][0]["content"] == [{"type": "image", "path": "a/b.png"}]
    assert from_json(record, root=tmp_path) == example
    with pytest.raises(MediaError, match="but a path inside"):
        to_json(example, root=tmp_path / "other")


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "link/secret.png", "a\0b"])
def test_paths_that_leave_the_root_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    record = {"messages": [{"role": "user", "content": [{"type": "image", "path": path}]}]}
    with pytest.raises(MediaError, match=r"but a path inside .*rows.jsonl:4"):
        from_json(record, root=root, place="rows.jsonl:4")


def record_with(part=None, **fields):
    content = "hi" if part is None else [part]
    return {"messages": [{"role": "user", "content": content}], **fields}


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ([], "object of type list but Mapping"),
        ({}, r"\['messages'\] is missing"),
        (record_with(wieght=2), r"unknown field \['wieght'\] but only"),
        (record_with(weight="2"), "weight '2' but a finite number"),
        (record_with(weight=float("nan")), "weight nan but a finite number"),
        (record_with(weight=-1), "weight -1"),
        (record_with(id=1.5), r"id 1\.5 but a string or integer"),
        (record_with(source=3), "source of type int but str"),
        ({"messages": "hi"}, "messages of type str but list"),
        ({"messages": [{"role": "user"}]}, r"\['content'\] is missing .*message 1 of 1"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' but one of system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content of type int but list"),
        (record_with("hi"), "part of type str but dict"),
        (record_with({"type": "audio"}), "part of type 'audio'"),
        (record_with({"type": "text", "text": 5}), "text of type int but str"),
        (record_with({"type": "image"}), "0 of path, base64, visual_tokens but exactly 1"),
        (record_with({"type": "image", "path": "a", "base64": "aa=="}), "2 of path"),
        (record_with({"type": "image", "url": "http://x"}), "unknown field"),
        (record_with({"type": "image", "base64": "%%%"}), "base64 that does not decode"),
        (record_with({"type": "image", "base64": "äö"}), "base64 that does not decode"),
        (
            record_with({"type": "image", "visual_tokens": {"shape": [2, 3], "float32": "AAAA"}}),
            r"3 bytes of visual tokens but shape \[2, 3\]",
        ),
        (record_with({"type": "image", "visual_tokens": {"shape": [True, -1], "float32": ""}}), "0 bytes of visual tokens"),
        (record_with({"type": "video", "frames": []}), "a video of 0 frames"),
        (record_with({"type": "video", "frames": [{"type": "text", "text": "x"}]}), "unknown field"),
        (record_with({"type": "video", "frames": [{"path": "a"}], "fps": 0}), "fps 0 but a number above 0"),
    ],
)
def test_malformed_records_are_refused_with_the_place(record, found):
    with pytest.raises(RecordError, match=found) as caught:
        from_json(record, place="rows.jsonl:12")
    assert "rows.jsonl:12" in str(caught.value)


def test_a_record_without_id_is_named_by_its_place():
    example = from_json(record_with(), place="rows.jsonl:12")
    assert (example.id, example.place) == ("rows.jsonl:12", "rows.jsonl:12")
    assert from_json(record_with(id=9, source="s"), place="rows.jsonl:12").place == "rows.jsonl:12"
    assert Example((USER,), "9", "s").place == "s:9"


def test_reading_text_records_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, metamorph.messages, metamorph.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_base64_of_the_record_is_the_file_itself():
    record = to_json(Example((Message.user(b"raw file"),), "1", "s"))
    assert base64.b64decode(record["messages"][0]["content"][0]["base64"]) == b"raw file"
