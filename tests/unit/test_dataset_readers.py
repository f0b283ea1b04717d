"""What the readers of the ten data sets say: roles, words, which images are shown and which are targets, and faults of each layout."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests import dataset_fixtures
from tests.dataset_fixtures import by_id, colour, opened, texts

from metamorph.data.check import check
from metamorph.errors import ConfigError, DataError, MediaError, RecordError
from metamorph.media import open_image
from metamorph.messages import ImagePart, Message, TextPart, VideoPart


def test_cambrian_reads_images_system_prompts_and_plain_text(tmp_path):
    rows = by_id(opened("cambrian", tmp_path))
    first = rows["000000033471"]
    assert [message.role for message in first.messages] == ["user", "assistant", "user", "assistant"]
    assert first.messages[0].parts == (ImagePart(tmp_path / "coco/train2017/000000033471.jpg"), TextPart("What colour is it?"))
    assert rows["q1"].messages[0] == Message.system("Answer the question using a single word or phrase.")
    assert rows["t1"].messages == (Message.user("What is 2 + 2?"), Message.assistant("4"))
    assert rows["t2"].kind == "text"


def test_cambrian_says_which_file_a_path_of_another_case_means(tmp_path):
    source = opened("cambrian", tmp_path)
    (tmp_path / "coco").rename(tmp_path / "COCO")
    with pytest.raises(MediaError, match=r"COCO/train2017/000000033471\.jpg.*Cambrian7M_withsystemprompt\.jsonl:1"):
        source[0]


def test_cambrian_refuses_paths_that_leave_its_folder(tmp_path):
    directory = dataset_fixtures.cambrian(tmp_path / "data")
    dataset_fixtures.picture(tmp_path / "secret.png")
    row = {"image": "../secret.png", "conversations": dataset_fixtures._turns("<image>\nWhat?", "That.")}
    (directory / "jsons" / "Cambrian7M_withsystemprompt.jsonl").write_text(json.dumps(row))
    from metamorph.data.datasets.cambrian import source

    with pytest.raises(DataError, match=r"outside|inside"):
        source(str(directory))[0]


def test_video_star_shows_a_frame_a_second_before_the_question(tmp_path):
    rows = by_id(opened("video_star", tmp_path))
    for name, number in (("k700_0", 4), ("k700_1", 4), ("starb_0", 3), ("fd_0", 2)):
        video, question = rows[name].messages[0].parts
        assert isinstance(video, VideoPart)
        assert (len(video.frames), video.fps) == (number, 1.0)
        assert isinstance(question, TextPart) and "<" not in question.text
    assert texts(rows["k700_1"].messages[0]) == ["Where?"]
    assert not any(message.images for row in rows.values() for message in row.messages if message.role == "assistant")


def test_video_star_also_reads_videos_in_the_field_image_and_bounds_frames(tmp_path):
    directory = dataset_fixtures.video_star(tmp_path)
    rows = [{"id": "k700_9", "image": "FineDiving/17_8.mp4", "conversations": dataset_fixtures._turns("How good?", "7.5")}]
    (directory / "mine.json").write_text(json.dumps(rows))
    from metamorph.data.datasets.video_star import source

    assert len(source(str(directory), files=["mine.json"], max_frames=1)[0].messages[0].images) == 1
    with pytest.raises(RecordError, match=r"nothing\.json"):
        source(str(directory), files=["nothing.json"])


def test_share_video_takes_every_second_of_two_frames_a_second(tmp_path):
    rows = by_id(opened("share_video", tmp_path))
    video = rows["v_XNTy5ZTMqVU-Scene-011_1"].messages[0].parts[0]
    assert isinstance(video, VideoPart)
    assert [colour(frame) for frame in video.frames] == [(4, 0, 0), (0, 0, 4), (4, 0, 4)]  # red, blue, magenta: numbers 1, 3, 5
    assert rows["SRhIRNhtdxQ"].messages[1] == Message.assistant("Someone cooks.")
    with pytest.raises(ConfigError, match=r"fps 3\.0"):
        opened("share_video", tmp_path / "again", fps=3.0)


def test_share_video_names_the_row_whose_frames_are_missing(tmp_path):
    source = opened("share_video", tmp_path)
    (tmp_path / "train_300k" / "SRhIRNhtdxQ").rename(tmp_path / "gone")
    with pytest.raises(MediaError, match=r"video_240k_caption_15k\.jsonl:2, video\)\. Unpack"):
        source[1]


@pytest.mark.parametrize(
    ("reader", "file", "field"),
    [
        ("video_star", "FineDiving/17_8.mp4", "video"),
        ("share_video", "train_300k/v_XNTy5ZTMqVU-Scene-011/c01_0003.jpeg", "video"),
        ("howto100m", "videos/nVbIUDjzWY4.mp4", "video_id"),
        ("something_something", "20bn-something-something-v2/1420.webm", "id"),
    ],
)
def test_a_damaged_video_is_refused_or_shortened_in_training_and_in_a_check(reader, file, field, tmp_path, caplog):
    source = opened(reader, tmp_path)
    if reader == "share_video":
        (tmp_path / file).write_bytes(b"no image")
    else:
        (tmp_path / file).write_bytes(dataset_fixtures.cut_video(tmp_path / "cut.webm", 16.0).read_bytes())
    with pytest.raises(
        MediaError, match=rf"only \d+ frames of \d+ .*{Path(file).name}.* but a whole video is expected \(\S+, {field}\)\. Fetch"
    ) as error:
        source[0]
    assert error.value.fault is not None and error.value.fault[0] == "video-broken"
    module = importlib.import_module(f"metamorph.data.datasets.{reader}")
    shortened = module.source(str(tmp_path), damaged_videos="shorten")
    for one, severity in ((source, "error"), (shortened, "warning")):
        found = [fault for fault in check(one, sample=1).faults if fault.code == "video-broken"]
        assert [(fault.severity, fault.field) for fault in found] == [(severity, field)]
        assert found[0].place in str(error.value)
        assert not caplog.text
    assert shortened[0].messages[0].images == shortened[0].messages[0].images != ()
    record, _ = (record for record in caplog.records if record.levelname == "WARNING")  # of two readings
    assert "only" in record.message and str(tmp_path / file if reader != "share_video" else (tmp_path / file).parent) in record.message
    with pytest.raises(ConfigError, match="damaged_videos 'cut'"):
        module.source(str(tmp_path), damaged_videos="cut")


def test_pairs_ask_with_the_caption_and_answer_with_the_image(tmp_path):
    source = opened("pairs", tmp_path)
    rows = by_id(source)
    assert list(rows) == ["000000000", "000000001", "000000002", "000010000", "000010001", "000010002"]
    sea = rows["000000002"]
    assert texts(sea.messages[0])[0].endswith("the sea")  # without the white space around it
    assert not sea.messages[0].images
    assert texts(sea.messages[1]) == ["Here is an image based on your request:"]
    assert [colour(image) for image in sea.messages[1].images] == [(0, 0, 4)]


def test_pairs_are_left_out_only_by_rules_that_were_asked_for(tmp_path, caplog):
    with caplog.at_level("INFO"):
        source = opened("pairs", tmp_path, min_caption_length=8, max_caption_length=15)
    assert [source[index].id for index in range(len(source))] == ["000000000", "000010000"]
    assert "4 of 6 pairs are left out (source pairs): max_caption_length 2, min_caption_length 2" in caplog.text
    assert len(opened("pairs", tmp_path, min_side=24, max_aspect_ratio=1.5)) == 6
    for kwargs, error in (({"min_side": 25}, RecordError), ({"min_side": 0}, ConfigError), ({"max_aspect_ratio": 0.5}, ConfigError)):
        with pytest.raises(error, match=r"min_side|max_aspect_ratio"):
            opened("pairs", tmp_path, **kwargs)


def test_pairs_without_caption_or_with_a_blank_one_name_their_sample(tmp_path):
    import io
    import tarfile

    def write(name, members):
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        from metamorph.data.datasets.pairs import source

        return source(str(tmp_path / name))

    image = dataset_fixtures.encoded("red", kind="JPEG")
    source = write(
        "a.tar", {"1.jpg": image, "1.txt": b" ", "2.jpg": image, "2.json": b'{"text": "a cat"}', "3.jpg": image, "3.json": b"{}"}
    )
    assert texts(source[1].messages[0])[0].endswith("a cat")
    for index, name in ((0, "1"), (2, "3")):
        with pytest.raises(RecordError, match=rf"a\.tar sample {name}"):
            source[index]


def test_one_orphan_does_not_close_the_other_pairs(tmp_path):
    import io
    import tarfile

    directory = dataset_fixtures.pairs(tmp_path, shards=1)
    with tarfile.open(directory / "00000.tar", "a") as archive:
        entry = tarfile.TarInfo("lonely.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"a cat"))
    from metamorph.data.datasets.pairs import source

    opened_source = source(str(directory))
    assert texts(opened_source[2].messages[0])[0].endswith("the sea")
    with pytest.raises(MediaError, match=r"00000\.tar sample lonely"):
        opened_source[3]


@pytest.mark.parametrize("name", ["howto100m", "something_something"])
def test_clips_ask_for_frames_that_follow_from_those_shown(name, tmp_path):
    """Over many seeds each task occurs, and of an answer with images all are targets; the clips' grey tells the order of time."""
    module = importlib.import_module(f"metamorph.data.datasets.{name}")
    directory = str(getattr(dataset_fixtures, name)(tmp_path))
    spoken = shown = 0
    for seed in range(12):
        question, answer = module.source(directory, seed=seed)[0].messages
        assert question.images and question.text
        if answer.images:
            shown += 1
            assert not answer.text
        else:
            spoken += 1
            assert "second" in answer.text
    assert spoken and shown
    forward = module.source(directory, variants=["forward"], max_frames=3)
    question, answer = forward[0].messages
    greys = [np.asarray(image.image).mean() for image in (*question.images, *answer.images)]
    assert 2 <= len(greys) <= 3 and greys == sorted(greys)
    for kwargs in ({"variants": ["sideways"]}, {"variants": []}, {"max_frames": 1}):
        with pytest.raises(ConfigError, match="pure video"):
            module.source(directory, **kwargs)


def test_howto100m_leaves_out_what_is_gone_only_if_asked_to(tmp_path, caplog):
    source = opened("howto100m", tmp_path)
    (tmp_path / "videos" / "nVbIUDjzWY4.mp4").unlink()
    with pytest.raises(MediaError, match=r"HowTo100M_v1\.csv:2, video_id\)\..*leave_out"):
        source[0]
    from metamorph.data.datasets import howto100m

    kept = howto100m.source(str(tmp_path), missing="leave_out")
    assert [kept[index].id for index in range(len(kept))] == ["CTPAZ2euJ2Q", "_97kyZVWVG0"]
    assert kept[0].origin.endswith("HowTo100M_v1.csv:3")
    assert "1 of 3 videos" in caplog.text
    with pytest.raises(ConfigError, match="'skip'"):
        howto100m.source(str(tmp_path), missing="skip")


@pytest.mark.parametrize(
    ("text", "place"),
    [("id,task\na,1\n", "csv:1"), ("video_id,task\n", "HowTo100M_v1"), ("video_id\na\n../b\n", "csv:3"), ("video_id\nä\n", "csv:2")],
)
def test_howto100m_refuses_a_list_that_is_none(text, place, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "HowTo100M_v1.csv").write_text(text)
    from metamorph.data.datasets.howto100m import source

    with pytest.raises(RecordError, match=place):
        source(str(tmp_path))


def test_something_something_reads_the_parts_that_are_named(tmp_path):
    assert set(by_id(opened("something_something", tmp_path))) == {"78687", "42326", "74225", "1420"}
    assert set(by_id(opened("something_something", tmp_path, splits=["validation"]))) == {"74225"}


def test_visual_cot_answers_with_the_key_region(tmp_path):
    rows = by_id(opened("visual_cot", tmp_path, asked_share=0.0))
    question, answer = rows["flickr30k:0"].messages
    assert question.parts == (ImagePart(tmp_path / "cot/flickr30k/2618322793.jpg"), TextPart("What colour is the sign?"))
    region = answer.images[0].image
    assert isinstance(region, Image.Image) and region.size == (40, 30)
    assert texts(answer)[-1] == "It is red."
    assert len(answer.parts) == 3
    assert rows["gqa:1"].messages[1].images[0].image.size == (80, 30)  # the box reaches one pixel over the edge
    asked = opened("visual_cot", tmp_path, asked_share=1.0)[0].messages[0].text
    assert asked.startswith("What colour is the sign?") and len(asked) > len("What colour is the sign?")
    padded = opened("visual_cot", tmp_path, padding=0.1)[0].messages[1].images[0].image
    assert padded.size == (48, 38)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda row: row["image"].pop(), "1 images"),
        (lambda row: row["image"].__setitem__(1, row["image"][0]), "###"),
        (lambda row: row["image"].__setitem__(1, row["image"][0] + "###[60, 10, 20, 40]"), "box"),
        (lambda row: row["image"].__setitem__(1, row["image"][0] + "###[200, 10, 240, 40]"), "100 x 50"),
        (lambda row: row["conversations"].pop(), "3 turns"),
        (lambda row: row.__setitem__("conversations", row["conversations"][:2]), "1 exchanges"),
        (lambda row: row["conversations"].__setitem__(1, {"from": "human", "value": "?"}), "a turn of the user"),
        (lambda row: row["conversations"][3].__setitem__("value", ""), "empty"),
        (lambda row: row.pop("image"), "no field"),
    ],
)
def test_visual_cot_says_what_is_wrong_and_where(change, found, tmp_path):
    directory = dataset_fixtures.visual_cot(tmp_path)
    rows = json.loads((directory / "viscot_363k.json").read_text())
    change(rows[1])
    (directory / "viscot_363k.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    from metamorph.data.datasets.visual_cot import source

    with pytest.raises(RecordError, match=rf"{found}.*viscot_363k\.json(:3|\[1\])"):
        source(str(directory))[1]


def test_vstar_shows_the_objects_and_goes_on(tmp_path):
    source = opened("vstar", tmp_path, asked_share=0.0)
    rows = {texts(source[index].messages[0])[0]: source[index] for index in range(len(source))}
    assert set(rows) == {"Is the cup left of the dog?", "Where is the cup?", "What colour is the cup?", "What is there?"}
    question, answer = rows["Is the cup left of the dog?"].messages
    plain, marked = open_image(question.images[0].image), answer.images[0].image
    assert isinstance(marked, Image.Image) and marked.size == plain.size
    drawn = (np.asarray(marked).astype(int) - np.asarray(plain)).any(axis=-1)
    assert (
        drawn[30:50, 10].all() and drawn[30:50, 60].all() and drawn[69, 60:].all()
    )  # left sides of both boxes; the second is cut at the edge
    assert not drawn[:, :10].any() and not drawn[70:].any()
    focus = rows["What is there?"].messages
    assert focus[2:] == (Message.user("What does it do?"), Message.assistant("It sits."))


def test_vstar_refuses_rows_without_boxes(tmp_path):
    source = opened("vstar", tmp_path, files=["negative_data.json"])
    with pytest.raises(RecordError, match=r"negative_data\.json.*target_instances"):
        source[0]


def test_instruct_pix2pix_goes_from_before_to_after_in_both_layouts(tmp_path):
    folders = opened("instruct_pix2pix", tmp_path / "a")
    seen = set()
    for seed in range(8):
        question, answer = opened("instruct_pix2pix", tmp_path / "a", seed=seed)[0].messages
        assert texts(question) == ["make it winter"]
        seen.add((colour(question.images[0]), colour(answer.images[0])))
    assert seen == {((4, 0, 0), (0, 0, 4)), ((0, 2, 0), (4, 4, 0))}  # red to blue, green to yellow
    assert folders[1].messages[1].parts == (ImagePart(tmp_path / "a/shard-00/0000001/771_1.jpg"),)
    question, answer = opened("instruct_pix2pix_parquet", tmp_path / "b", "instruct_pix2pix")[1].messages
    assert (texts(question), colour(question.images[0]), colour(answer.images[0])) == (["as a drawing"], (0, 2, 0), (4, 4, 0))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '[["shard-00/0000000"]]', '[[1, ["2"]]]', '[["a", []]]'])
def test_instruct_pix2pix_refuses_a_list_of_seeds_that_is_none(text, tmp_path):
    (tmp_path / "seeds.json").write_text(text)
    from metamorph.data.datasets.instruct_pix2pix import source

    with pytest.raises(RecordError, match=r"seeds\.json"):
        source(str(tmp_path))[0]


def test_instruct_pix2pix_names_the_prompt_that_is_missing(tmp_path):
    source = opened("instruct_pix2pix", tmp_path)
    (tmp_path / "shard-00/0000001/prompt.json").write_text('{"output": "x"}')
    with pytest.raises(RecordError, match=r"seeds\.json\[1\].*prompt\.json"):
        source[1]


def test_aurora_reads_the_parts_of_the_repository_or_the_rows_of_the_hub(tmp_path):
    source = opened("aurora", tmp_path / "a")
    said = [texts(source[index].messages[0])[0] for index in range(len(source))]
    assert said == ["Leave the door in ag", "Leave the door in kubric", "Leave the door in magicbrush"]
    question, answer = source[0].messages
    assert (colour(question.images[0]), colour(answer.images[0]), texts(answer)) == ((4, 0, 0), (0, 0, 4), [])
    assert len(opened("aurora", tmp_path / "a", parts=["kubric"])) == 1
    with pytest.raises(RecordError, match="something"):
        opened("aurora", tmp_path / "a", parts=["something"])
    hub = opened("aurora_parquet", tmp_path / "b", "aurora")
    assert [texts(hub[index].messages[0])[0] for index in range(2)] == ["Leave the door while standing closer", "move the cube left"]
