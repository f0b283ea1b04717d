"""Records of every published format become the same messages; what is wrong with one is told with its field and a remedy."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamorph.data.record_fields import detect
from metamorph.data.records import RecordSettings, kind_of, to_example
from metamorph.data.references import Roots
from metamorph.data.rows import RawRow
from metamorph.errors import RecordError
from metamorph.messages import ImagePart, Message, TextPart, VideoPart

ROOT = Path("/data/images")
SETTINGS = RecordSettings(Roots(ROOT), source="mine")
A, B = ImagePart(ROOT / "a.png"), ImagePart(ROOT / "b.png")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def read(settings=SETTINGS, **values):
    return to_example(RawRow(values, "rows.jsonl:7"), settings)


def faults(settings=SETTINGS, **values):
    found = []
    example = to_example(RawRow(values, "rows.jsonl:7"), settings, found.append)
    assert (example is None) == any(fault.severity == "error" for fault in found)
    assert all(fault.place == "rows.jsonl:7" and fault.remedy for fault in found)
    return [(fault.code, fault.field) for fault in found]


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def said(*turns):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 5, turns, strict=False)]


def test_five_spellings_of_one_conversation_are_one_example():
    question = "What is it?"
    expected = (Message.user(ROOT / "a.png", question), Message.assistant("A cat."))
    path, inline = {"type": "image", "path": "a.png"}, {"type": "text", "text": question}
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    rows = [
        {"image": "a.png", "conversations": [human(f"<image>\n{question}"), gpt("A cat.")]},
        {"image": ["a.png"], "conversations": [human(f"<image> {question}"), gpt("A cat.")]},
        {"images": ["a.png"], "messages": said(f"<image>{question}", "A cat.")},
        {"images": ["a.png"], "messages": said([{"type": "image"}, inline], "A cat.")},
        {"messages": said([url, inline], [{"type": "text", "text": "A cat."}])},
        {"messages": said([path, inline], "A cat.")},
        {"image": "a.png", "question": question, "answer": "A cat."},
    ]
    for values in rows:
        example = read(**values)
        assert example.messages == expected, values
        assert (example.kind, example.source, example.origin) == ("image_qa", "mine", "rows.jsonl:7")


def test_an_image_in_the_answer_stays_where_the_tag_stands():
    example = read(image=["a.png", "b.png"], conversations=[human("<image>\nMake it rain."), gpt("Here:\n<image>\nWet.")])
    assert example.messages == (Message.user(ROOT / "a.png", "Make it rain."), Message.assistant("Here:", ROOT / "b.png", "Wet."))
    assert example.kind == "thinking"


def test_media_come_in_the_order_of_the_tags_whatever_the_turn():
    turns = [human("Compare <image> with <image>."), gpt("No."), human("And <image>?"), gpt("Yes.")]
    example = read(image=["a.png", "b.png", "a.png"], conversations=turns)
    assert example.messages[0].parts == (TextPart("Compare "), A, TextPart(" with "), B, TextPart("."))
    assert example.messages[2].parts == (TextPart("And "), A, TextPart("?"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", [A, "What?"]),
        ("What?\n<image>", ["What?", A]),
        ("<image> What?", [A, "What?"]),
        ("What? <image>", ["What?", A]),
        ("\n<image>\n\n What?\n", [A, "What?\n"]),
        ("a\n<image>\nb", ["a", A, "b"]),
        ("look:<image>now", ["look:", A, "now"]),
        ("看<image>图", ["看", A, "图"]),
        ("`code` <image>", ["`code`", A]),
        ("```\nx\n```\n<image>", ["```\nx\n```", A]),
    ],
)
def test_white_space_that_sets_a_tag_apart_is_no_text(text, parts):
    found = read(image="a.png", conversations=[human(text), gpt("Yes.")]).messages[0].parts
    assert list(found) == [TextPart(part) if isinstance(part, str) else part for part in parts]


def test_images_may_be_bytes_structs_data_urls_and_base64():
    data = png()
    coded = base64.b64encode(data).decode()
    for value in (data, {"bytes": data, "path": "x.png"}, {"bytes": data, "path": None}, f"data:image/png;base64,{coded}"):
        assert read(image=value, question="?", answer="!").messages[0].images == (ImagePart(data),)
    part = {"type": "image", "base64": coded}
    assert read(messages=said([part, {"type": "text", "text": "?"}], "!")).messages[0].images == (ImagePart(data),)
    assert read(image={"bytes": None, "path": "a.png"}, question="?", answer="!").messages[0].images == (A,)


def test_a_video_is_a_list_of_frames_or_a_file():
    opened = []

    def open_video(path, warn):
        opened.append(path)
        return VideoPart((A, B), 1.0)

    settings = RecordSettings(Roots(ROOT), open_video=open_video)
    for tag in ("<video>", "<image>"):  # published video data writes either
        example = read(settings, video="v.mp4", conversations=[human(f"{tag}\nWhat happens?"), gpt("Rain.")])
        assert example.messages[0].parts == (VideoPart((A, B), 1.0), TextPart("What happens?"))
        assert example.kind == "video_qa"
    assert opened == [ROOT / "v.mp4"] * 2
    listed = read(videos=[["a.png", "b.png"]], messages=said("<video>Next?", "Rain."))
    assert listed.messages[0].parts[0] == VideoPart((A, B))
    frames = [{"type": "image", "path": "a.png"}, {"type": "image", "path": "b.png"}]
    own = read(messages=said([{"type": "video", "frames": frames, "fps": 2.0}, {"type": "text", "text": "?"}], "Rain."))
    assert own.messages[0].parts[0] == VideoPart((A, B), 2.0)


def test_a_pair_asks_for_its_caption_in_words_that_follow_from_its_id():
    rows = [read(id=name, image="a.png", caption="a red bus") for name in "abcdefghij"]
    assert rows == [read(id=name, image="a.png", caption="a red bus") for name in "abcdefghij"]
    assert all("a red bus" in row.messages[0].text and row.messages[1].images == (A,) for row in rows)
    assert len({row.messages[0].text for row in rows}) > 1
    assert {row.kind for row in rows} == {"generation"}


def test_columns_of_other_names():
    settings = RecordSettings(Roots(ROOT), columns={"image": "img", "question": "prompt", "answer": "reply"})
    assert read(settings, img="a.png", prompt="What?", reply="A cat.").messages[0].images == (A,)
    assert faults(settings, img="a.png", prompt="What?", reply=None) == [("answer-null", "reply")]
    assert faults(settings, img="../a.png", prompt="What?", reply="x") == [("image-outside", "img")]


def test_header_of_a_record():
    example = read(id=42, source="s", kind="k", weight=2, messages=said("a", "b"))
    assert (example.id, example.source, example.kind, example.weight) == ("42", "s", "k", 2.0)
    assert read(messages=said("a", "b")).id == "rows.jsonl:7"
    assert faults(id=[1], question="a", answer="b") == [("id-type", "id")]
    assert faults(weight=-1, question="a", answer="b") == [("weight", "weight")]


def test_rows_without_an_image_are_text():
    assert read(image=None, conversations=[human("Hi."), gpt("Hello.")]).kind == "text"


C = "conversations"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image": "a.png", C: [human("What?"), gpt("A.")]}, [("too-many-media", "image")]),
        ({C: [human("<image> What?"), gpt("A.")]}, [("too-few-media", f"{C}[0].value")]),
        ({"image": "a.png", C: [human("<image><image>"), gpt("A.")]}, [("too-few-media", "image")]),
        ({"image": "a.png", C: [human("pre<image>fix"), gpt("A.")]}, [("tag-in-text", f"{C}[0].value")]),
        ({"image": "a.png", C: [human("`<image>` is a tag"), gpt("A.")]}, [("tag-in-text", f"{C}[0].value")]),
        ({"image": "a.png", C: [human("```\n<image>\n```"), gpt("A.")]}, [("tag-in-text", f"{C}[0].value")]),
        (
            {"image": "a.png", C: [{"from": "system", "value": "<image>"}, human("a"), gpt("b")]},
            [("image-in-system", f"{C}[0].value")],
        ),
        ({C: [human("a"), gpt("say <image_start>")]}, [("marker-in-text", f"{C}[1].value")]),
        ({C: [human("a"), gpt("b<|im_end|>")]}, [("marker-in-text", f"{C}[1].value")]),
        ({C: [human("a"), gpt("b\nUSER: c")]}, [("marker-in-text", f"{C}[1].value")]),
        ({"image": [], C: [human("a"), gpt("b")]}, [("images-empty", "image")]),
        ({"image": "", C: [human("<image> a"), gpt("b")]}, [("image-empty", "image"), ("too-few-media", f"{C}[0].value")]),
        ({C: [human("a"), gpt(None)]}, [("answer-null", f"{C}[1].value")]),
        ({C: [human("a"), gpt("  ")]}, [("answer-empty", f"{C}[1].value")]),
        ({C: [human(""), gpt("b")]}, [("turn-empty", f"{C}[0].value")]),
        ({C: [human("a"), gpt(7)]}, [("text-type", f"{C}[1].value")]),
        ({C: []}, [("turns-missing", C)]),
        ({C: None}, [("turns-missing", C)]),
        ({C: ["a", gpt("b")]}, [("turn-type", f"{C}[0]")]),
        ({C: [{"from": "human"}, gpt("b")]}, [("field-missing", f"{C}[0].value")]),
        ({C: [{"from": "humna", "value": "a"}, gpt("b")]}, [("role-unknown", f"{C}[0].from")]),
        ({C: [human("a"), human("b"), gpt("c")]}, [("roles-repeat", f"{C}[1].value")]),
        ({C: [gpt("a"), human("b")]}, [("assistant-first", f"{C}[0].value")]),
        ({C: [human("a"), {"from": "system", "value": "s"}, gpt("b")]}, [("system-late", f"{C}[1].value")]),
        ({C: [human("a")]}, [("no-answer", C)]),
        ({"image": "/etc/passwd", C: [human("<image>"), gpt("b")]}, [("image-outside", "image")]),
        ({"image": "../../etc/passwd", C: [human("<image>"), gpt("b")]}, [("image-outside", "image")]),
        ({"image": "C:\\pictures\\a.png", C: [human("<image>"), gpt("b")]}, [("image-windows-path", "image")]),
        ({"image": "https://x.org/a.png", C: [human("<image>"), gpt("b")]}, [("image-url", "image")]),
        ({"image": 3, C: [human("<image>"), gpt("b")]}, [("image-type", "image")]),
        ({"image": "data:image/png;base64,???", C: [human("<image>"), gpt("b")]}, [("image-base64", "image")]),
        ({"messages": said([{"type": "img", "path": "a.png"}], "b")}, [("part-type", "messages[0].content[0]")]),
        ({"messages": said([{"type": "text", "text": "see <image>"}], "b")}, [("tag-literal", "messages[0].content[0].text")]),
        ({"convesations": [human("a"), gpt("b")]}, [("format-unknown", "")]),
        ({"image": "a.png", "caption": None}, [("turn-null", "caption")]),
        ({"caption": "a bus", "image": None}, [("image-missing", "image")]),
        ({"videos": [[]], "messages": said("<video> a", "b")}, [("video-empty", "videos[0]")]),
        ({C: [human("What is in <Image>?"), gpt("b")]}, [("tag-unknown", f"{C}[0].value")]),
        ({C: [human("a"), gpt("<|image_1|> <img>")]}, [("tag-unknown", f"{C}[1].value")]),
        ({C: [human("a </image> b"), gpt("c")]}, [("tag-unknown", f"{C}[0].value")]),
        ({"image": "a.png", "images": ["b.png"], C: [human("<image>"), gpt("b")]}, [("media-twice", "images")]),
        ({"image": "a.png", "images": ["a.png"], C: [human("<image>"), gpt("b")]}, []),
        ({"image": ["a.png"], "images": [], C: [human("<image>"), gpt("b")]}, []),
        ({C: [human("a"), {**gpt("b"), "weight": 0}, human("c"), gpt("d")]}, [("answer-unlearned", f"{C}[1].weight")]),
        ({C: [human("a"), {**gpt("b"), "loss": False}]}, [("answer-unlearned", f"{C}[1].loss")]),
        ({C: [{**human("a"), "weight": 0}, {**gpt("b"), "weight": 1, "loss": True}]}, []),
        ({"messages": said([{"type": "image"}], "b")}, [("image-empty", "messages[0].content[0]")]),
        ({"messages": said([{"type": "image", "source": {"data": "A"}}], "b")}, [("image-empty", "messages[0].content[0]")]),
        ({"messages": said([{"type": "text", "text": " "}], "b")}, [("turn-empty", "messages[0].content[0].text")]),
        ({"question": "a", "img": "a.png"}, [("format-unknown", "")]),
        ({"image": ["a.png", "b.png"], "caption": "a bus"}, [("too-many-media", "image")]),
        ({"video": [["a.png"]], C: [human("<video>"), gpt("b")]}, [("video-short", "video[0]")]),
        ({"file_name": "a.png", "messages": said("a", "b")}, [("too-many-media", "file_name")]),
        ({"file_name": "chat-7.txt", "messages": said("a", "b")}, []),
        ({"file_name": "a.png", "messages": said([{"type": "image", "path": "a.png"}], "b")}, []),
        ({"image": {"bytes": None, "path": None}, C: [human("a"), gpt("b")]}, []),
        ({C: [human("a"), gpt("```html\n</s>\n``` and `<|im_end|>`")]}, []),
        ({"system": 7, C: [human("a"), gpt("b")]}, [("text-type", "system")]),
        ({"system": "See <image>.", "image": "a.png", C: [human("<image>"), gpt("b")]}, [("image-in-system", "system")]),
        ({"system": "a", C: [{"from": "system", "value": "b"}, human("a"), gpt("b")]}, [("system-twice", "system")]),
    ],
)
def test_each_fault_is_named_by_its_field(values, expected):
    assert faults(**values) == expected


def test_a_field_of_its_own_holds_the_words_of_the_system():
    for values in ({C: [human("a"), gpt("b")]}, {"messages": said("a", "b")}, {"question": "a", "answer": "b"}):
        assert read(system="Be brief.", **values).messages == (Message.system("Be brief."), Message.user("a"), Message.assistant("b"))
        for nothing in ("", " ", None):
            assert [message.role for message in read(system=nothing, **values).messages] == ["user", "assistant"]
    twice = read(system="Be brief.", **{C: [{"from": "system", "value": "Be brief."}, human("a"), gpt("b")]})
    assert [message.role for message in twice.messages] == ["system", "user", "assistant"]


def test_white_space_beside_an_image_part_says_nothing():
    image = {"type": "image", "path": "a.png"}
    content = [{"type": "text", "text": ""}, image, {"type": "text", "text": "\n"}, {"type": "image", "path": "b.png"}, "What?"]
    assert read(messages=said(content, "b")).messages[0] == Message.user(ROOT / "a.png", ROOT / "b.png", "What?")


def test_an_imagefolders_file_name_is_the_image_of_any_record():
    for values in ({"question": "What?", "answer": "That."}, {"messages": said("<image>What?", "That.")}):
        assert read(file_name="a.png", **values).messages[0] == Message.user(ROOT / "a.png", "What?")
    assert len(read(file_name="a.png", text="a bus").messages[1].images) == 1


def test_a_question_without_its_answer_lacks_a_field():
    qa = RecordSettings(Roots(ROOT), format="qa")
    assert faults(qa, question="a", id="7") == [("field-missing", "answer")]
    assert faults(qa, question="a", answer=None) == [("answer-null", "answer")]
    assert faults(RecordSettings(Roots(ROOT), format="pairs"), image="a.png") == [("field-missing", "caption")]


def test_too_many_videos_are_told_by_the_tag_that_stands_there():
    found = []
    to_example(RawRow({"video": ["a.mp4", "b.mp4"], C: [human("<video> a"), gpt("b")]}, "rows.jsonl:7"), SETTINGS, found.append)
    assert "1 <video> in the text" in found[0].found and "<image>" not in found[0].remedy


def test_code_may_hold_what_is_nearly_a_tag():
    assert faults(**{C: [human("a"), gpt("Write `<img>` or\n```\n<video/> <Image>\n```\nand 3 <images of 4> or <imaginary>.")]}) == []


def test_a_row_of_another_shape_than_its_file_lacks_a_field():
    settings = RecordSettings(Roots(ROOT), format="llava")
    found = []
    assert to_example(RawRow({"id": "1", "image": "a.png"}, "rows.jsonl:7"), settings, found.append) is None
    assert [(fault.code, fault.field) for fault in found] == [("field-missing", "conversations")]


def test_a_typo_in_our_own_records_is_no_default():
    settings = RecordSettings(Roots(ROOT), format="metamorph")
    found = []
    to_example(RawRow({"messages": said("a", "b"), "wieght": 2}, "rows.jsonl:7"), settings, found.append)
    assert [(fault.code, fault.field) for fault in found] == [("field-unknown", "wieght")]
    assert "'weight'" in found[0].remedy


def test_rows_of_another_publisher_are_not_held_to_our_fields():
    settings = RecordSettings(Roots(ROOT), format="metamorph")  # as told from the first rows, which were plain text
    example = read(settings, messages=said("<image>\nWhat?", "A cat."), images=["a.png"], category="animals")
    assert example.messages[0].parts == (A, TextPart("What?"))


def test_a_tag_in_a_question_is_the_place_of_its_image():
    assert read(image="a.png", question="<image>\nWhat?", answer="A cat.").messages[0].parts == (A, TextPart("What?"))
    assert read(image="a.png", question="Draw it.", answer="Here:\n<image>").messages[1].parts == (TextPart("Here:"), A)
    assert faults(image="a.png", question="<image> and <image>?", answer="b") == [("too-few-media", "image")]
    assert faults(image="a.png", caption="<image> a bus") == [("tag-literal", "caption")]


def test_a_pair_is_asked_for_in_the_same_words_wherever_its_file_lies():
    row = {"image": "a.png", "caption": "a red bus"}
    here, there = (to_example(RawRow(row, place), SETTINGS) for place in ("here/rows.jsonl:7", "there/rows.jsonl:9"))
    assert here.messages == there.messages


@pytest.mark.parametrize("url", ["https://x.org/v.mp4", "s3://bucket/v.mp4", "file:///v.mp4"])
def test_a_video_that_is_named_by_a_url_is_no_missing_file(url):
    assert faults(video=url, conversations=[human("<video>"), gpt("b")]) == [("video-url", "video")]
    assert faults(image=url, conversations=[human("<image>"), gpt("b")]) == [("image-url", "image")]


def test_reading_raises_what_a_check_collects():
    with pytest.raises(RecordError, match=r"null but text is needed \(rows.jsonl:7, conversations\[1\].value\). Fill it"):
        read(conversations=[human("a"), gpt(None)])
    with pytest.raises(RecordError, match="inside"):
        read(image="../a.png", conversations=[human("<image>"), gpt("b")])
    assert read(conversations=[human("a"), gpt("b</s>")]).messages[1].text == "b</s>"  # a warning does not stop


def test_urls_are_fetched_only_where_asked_for():
    asked = []
    settings = RecordSettings(Roots(ROOT, fetch=lambda url: asked.append(url) or png()))
    example = read(settings, image="https://x.org/a.png", conversations=[human("<image>"), gpt("b")])
    assert asked == ["https://x.org/a.png"]
    assert example.messages[0].images == (ImagePart(png()),)
    assert faults(settings, image="s3://bucket/a.png", conversations=[human("<image>"), gpt("b")]) == [("image-url", "image")]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"conversations": []}, "llava"),
        ({"messages": said("a", "b")}, "metamorph"),
        ({"messages": said("a", "b"), "images": []}, "messages"),
        ({"messages": said("<image>", "b")}, "messages"),
        ({"messages": said([{"type": "image"}], "b")}, "messages"),
        ({"messages": said([{"type": "image_url", "image_url": {"url": "x"}}], "b")}, "messages"),
        ({"question": "", "answer": ""}, "qa"),
        ({"image": "", "text": ""}, "pairs"),
        ({"image": ""}, None),
    ],
)
def test_formats_are_told_by_their_fields(values, kind):
    assert detect(values) == kind


def test_kinds_are_told_by_who_shows_what():
    video = VideoPart((A, B))
    assert kind_of((Message.user("a"), Message.assistant(A))) == "generation"
    assert kind_of((Message.user(A, "a"), Message.assistant(B))) == "edit"
    assert kind_of((Message.user(A, "a"), Message.assistant("x", B, "y"))) == "thinking"
    assert kind_of((Message.user(video, "a"), Message.assistant(B))) == "frames"
