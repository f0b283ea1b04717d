"""The check around its faults: what is sampled, what several processes find, what lengths mean, what the command accepts and says."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.dataset_fixtures import cut_video, video
from typer.testing import CliRunner

from metamorph.cli.main import app
from metamorph.data.check import check, spread
from metamorph.data.check_report import grouped, to_json
from metamorph.data.cross_checks import repeats
from metamorph.data.lengths import CountedLengths, EstimatedLengths
from metamorph.data.row_checks import CheckSettings
from metamorph.data.source import open_source
from metamorph.errors import MediaError, RecordError
from metamorph.messages import Example, ImagePart, Message, VideoPart


def write(path: Path, rows: int, **fields: object) -> Path:
    """Rows about one picture; `fields` are written into all of them."""
    Image.new("RGB", (8, 8), "red").save(path.parent / "a.png")
    lines = []
    for row in range(rows):
        turns = [{"from": "human", "value": f"<image>\nWhat is it, {row}?"}, {"from": "gpt", "value": "Red."}]
        lines.append(json.dumps({"id": str(row), "image": "a.png", "conversations": turns, **fields}) + "\n")
    path.write_text("".join(lines))
    return path


@given(st.integers(1, 3000), st.integers(1, 300))
def test_a_sample_is_spread_over_all_rows_and_the_same_each_time(rows: int, wanted: int):
    picked = list(spread(rows, wanted))
    assert picked == list(spread(rows, wanted)) == sorted(set(picked))
    assert len(picked) == min(rows, wanted) and picked[0] == 0 and picked[-1] < rows
    if wanted > 1:
        assert picked[-1] == rows - 1
        assert max(np.diff(picked), default=0) <= 2 * -(-rows // wanted)


@given(st.lists(st.integers(-3, 3), max_size=30))
def test_repeats_are_those_of_a_slow_twin(hashes: list[int]):
    pairs = np.array([(value, row) for row, value in enumerate(hashes)], dtype=np.int64).reshape(-1, 2)
    shuffled = pairs[np.random.default_rng(0).permutation(len(pairs))]
    assert list(repeats(shuffled)) == [(row, hashes.index(value)) for row, value in enumerate(hashes) if hashes.index(value) < row]


def test_two_processes_find_what_one_does(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", 600)
    lines = path.read_text().splitlines()
    lines[300] = lines[300].replace("a.png", "b.png")
    lines[599] = lines[7]
    path.write_text("\n".join(lines) + "\n")
    source, told = open_source(path), []
    one = check(source)
    two = check(source, jobs=2, told=lambda done, total: told.append((done, total)))
    assert [fault.code for fault in one.faults] == ["image-missing", "row-duplicate"]
    assert {**to_json([one])["sources"][0], "seconds": 0} == {**to_json([two])["sources"][0], "seconds": 0}
    assert told == [(256, 600), (512, 600), (600, 600)]


def test_a_sample_says_that_it_is_one(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", 50)
    report = check(open_source(path), sample=10)
    assert (report.rows, report.checked, report.complete, report.faults) == (50, 10, False, ())
    shown = CliRunner().invoke(app, ["data", "check", str(path), "--sample", "10"])
    assert shown.exit_code == 0 and "A sample: 10 of 50 rows of train" in shown.output and "--all" in shown.output
    shown = CliRunner().invoke(app, ["data", "check", str(path), "--sample", "10", "--all", "--jobs", "1"])
    assert shown.exit_code == 0 and "A sample" not in shown.output and "No problems in 50 rows" in shown.output


def test_counted_lengths_are_those_of_training_and_open_no_image():
    from metamorph.microworld.components import shipped
    from metamorph.model.processing import MetaMorphProcessor

    processor = MetaMorphProcessor.from_pretrained(shipped("metamorph"))
    red = Image.new("RGB", (64, 64), "red")
    turns = (Message.system("Be brief."), Message.user(VideoPart((ImagePart(red), ImagePart(red))), "What?"),
             Message.assistant("A square: ", red, "And more."), Message.user("Why?"), Message.assistant("So."))  # fmt: skip
    sequence = processor.encode(turns)
    gone = Path("nowhere.png")
    blind = (turns[0], Message.user(VideoPart((ImagePart(gone), ImagePart(gone))), "What?"),
             Message.assistant("A square: ", gone, "And more."), *turns[3:])  # fmt: skip
    lengths = CountedLengths(processor)(Example(blind, "a", "s"))
    assert lengths.positions == len(sequence) and lengths.is_target == (False, False, True)
    assert (lengths.num_text_targets, lengths.num_visual_targets) == (sequence.num_text_targets, sequence.num_visual_targets)
    for start, end in lengths.images:
        assert sequence.input_ids[start] == processor.image_start_id and sequence.input_ids[end - 1] == processor.image_end_id
    cut = lengths.images[2][1] - 1
    assert lengths.images_cut_at(cut) == (2,) and lengths.images_cut_at(cut + 1) == ()
    assert lengths.text_targets_from(0) == lengths.num_text_targets and lengths.text_targets_from(len(sequence)) == 0


def test_estimated_lengths_count_images_wholly_and_text_by_bytes():
    messages = (Message.user(Path("a.png"), "x" * 40), Message.assistant("猫" * 4, Path("b.png")))
    lengths = EstimatedLengths()(Example(messages, "a", "s"))
    assert lengths.positions == 4 + 66 + 10 + 4 + 3 + 66
    assert (lengths.num_text_targets, lengths.num_visual_targets) == (3 + 1, 64)
    assert lengths.images[1] == (lengths.positions - 67, lengths.positions - 1)


def test_an_estimate_over_the_limit_is_a_warning(tmp_path: Path):
    settings = CheckSettings(max_length=60)
    (fault, *_) = check(open_source(write(tmp_path / "a.jsonl", 1)), settings).faults
    assert (fault.code, fault.severity) == ("row-too-long", "warning") and fault.found.startswith("about ")


def test_equal_problems_are_grouped_on_the_terminal_and_whole_in_the_json(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", 9, image="b.png")
    report = check(open_source(path))
    assert [(code, number, len(first)) for code, number, first in grouped(report.faults)] == [("image-missing", 9, 3)]
    out = tmp_path / "new" / "report.json"
    shown = CliRunner().invoke(app, ["data", "check", str(path), "--json", str(out)])
    assert shown.exit_code == 1
    assert "error image-missing: 9" in shown.output and "... and 6 more" in shown.output
    assert f"{path}:1 image: no file 'b.png' in {tmp_path} but an image is needed. Check the path and the root." in shown.output
    written = json.loads(out.read_text())
    assert (written["version"], written["problems"], len(written["sources"][0]["problems"])) == (1, 9, 9)
    assert set(written["sources"][0]["problems"][0]) == {"code", "severity", "place", "field", "found", "expected", "remedy"}


def test_columns_and_the_image_root_are_the_users(tmp_path: Path):
    rows = write(tmp_path / "train.jsonl", 2)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "train.jsonl"
    path.write_text("".join(json.dumps({"img": "a.png", "talk": line["conversations"]}) + "\n" for line in lines))
    command = ["data", "check", str(path), "--image-root", str(tmp_path), "--columns", "image=img"]
    assert CliRunner().invoke(app, [*command, "--columns", "conversations=talk"]).exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, [*command[:-1], "image"]).exit_code != 0


def test_fields_that_nobody_reads_are_told(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", 3, topic="colours", n=1, system="Be brief.")
    report = check(open_source(path))
    assert (report.unread, report.faults) == (("topic", "n"), ())
    assert to_json([report])["sources"][0]["unread"] == ("topic", "n")
    assert "fields not read" in (output := CliRunner().invoke(app, ["data", "check", str(path)]).output) and "topic, n" in output
    assert check(open_source(write(path, 3))).unread == ()
    path.write_text(path.read_text().replace('"image"', '"img"'))
    assert check(open_source(path, columns={"image": "img"})).unread == ()
    assert check(open_source(write(path, 3, messages=[], question="a"))).unread == ("messages", "question")  # conversations are read


def test_an_error_and_a_warning_of_one_code_are_shown_apart(tmp_path: Path):
    path = write(tmp_path / "train.jsonl", 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", format="JPEG")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace("a.png", "b.png"), lines[1].replace('"a.png"', "7"), lines[2]]))
    report = check(open_source(path))
    assert [(code, number, first[0].severity) for code, number, first in grouped(report.faults) if code == "image-type"] == [
        ("image-type", 1, "error"),
        ("image-type", 1, "warning"),
    ]


def test_a_tag_in_a_few_rows_is_no_missing_column(tmp_path: Path):
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": [{**turns[0], "value": f"{number}?"}, turns[1]]} for number in range(20)]
    for number in (4, 9):
        rows[number]["conversations"][0]["value"] = f"Explain vector<image> {number}"
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = check(open_source(path)).faults
    assert [(one.code, one.place, one.field) for one in faults] == [
        ("too-few-media", f"{path}:{line}", "conversations[0].value") for line in (5, 10)
    ]
    assert "list of parts" in faults[0].remedy


def test_names_that_are_not_utf8_are_written_down(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("café.txt"))  # a caption without a picture
    out = tmp_path / "report.json"
    shown = subprocess.run(
        [sys.executable, "-c", "from metamorph.cli.main import main; main()", "data", "check", str(tmp_path / "a.tar"), "--json", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert shown.returncode == 1 and "caf\\udce9" in shown.stdout, shown.stderr
    (problem,) = json.loads(out.read_text())["sources"][0]["problems"]
    assert problem["place"].endswith("caf\udce9")


def test_rows_that_are_compared_keep_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, kept = write(tmp_path / "train.jsonl", 5, id="same"), []
    monkeypatch.setattr("metamorph.data.check.repeated_ids", lambda ids, read, known: kept.extend(read(row) for row in range(5)) or ())
    check(open_source(path))
    assert [(found.id, found.example) for found in kept] == [("same", None)] * 5


def test_a_recipes_sources_are_checked_under_its_limit(tmp_path: Path):
    write(tmp_path / "a.jsonl", 3)
    write(tmp_path / "b.jsonl", 2, image="none.png")
    from metamorph.microworld.components import shipped
    from metamorph.recipes import load_recipe

    config = load_recipe("microworld").to_dict()
    sources = [{"source": "metamorph.data.source.open_source", "kwargs": {"path": str(tmp_path / name)}} for name in ("a.jsonl", "b.jsonl")]
    config["data"] = {"sources": sources, "max_length": 20}
    config["model"] = {"start": str(shipped("metamorph"))}
    config["stages"] = [{**stage, "data": None} for stage in config["stages"]]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["data", "check", "--recipe", str(recipe), "--json", "-"])
    assert shown.exit_code == 1, shown.output
    first, second = json.loads(shown.stdout)["sources"]
    assert [problem["code"] for problem in first["problems"]] == ["row-too-long"] * 3
    assert [problem["code"] for problem in second["problems"]] == ["image-missing"] * 2
    assert first["max_length"] == 20 and first["measure"].startswith("counted with the processor of microworld")


@pytest.mark.parametrize(
    ("settings", "severity", "frames"),
    [({}, "error", None), ({"damaged_videos": "shorten"}, "warning", 4), ({"damaged_videos": "shorten", "min_frames": 5}, "error", None)],
    ids=["refuse", "shorten", "shorten to enough"],
)
def test_a_check_and_training_judge_a_damaged_video_alike(tmp_path: Path, caplog, settings: dict, severity: str, frames: int | None):
    clip = cut_video(tmp_path / "clip.mkv")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"movie": "clip.mkv", "question": "What happens?", "answer": "Rain."}\n')
    source = open_source(path, columns={"video": "movie"}, **settings)
    report = check(source)
    (fault,) = report.faults
    assert (fault.code, fault.severity, fault.place, fault.field) == ("video-broken", severity, f"{path}:1", "movie")
    assert str(clip) in fault.found and fault.remedy
    assert not caplog.text  # the report says it
    assert report.images_per_row == ({} if frames is None else {frames: 1})
    if frames is None:
        with pytest.raises(MediaError, match=re.escape(fault.found)):
            source[0]
    else:
        assert len(source[0].messages[0].images) == frames


def test_a_check_and_training_judge_a_short_video_alike(tmp_path: Path, caplog):
    video(tmp_path / "clip.mkv", seconds=0.8)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"video": "clip.mkv", "question": "What happens?", "answer": "Rain."}\n')
    source = open_source(path)
    (fault,) = check(source).faults
    assert (fault.code, fault.severity, fault.field) == ("video-short", "warning", "video")
    assert len(source[0].messages[0].images) == 1 and not caplog.text
    assert not check(open_source(path, max_frames=1)).faults  # one frame is what was asked for
    source = open_source(path, min_frames=2)
    (fault,) = check(source).faults
    assert (fault.code, fault.severity) == ("video-short", "error")
    with pytest.raises(MediaError, match=re.escape(fault.found)):
        source[0]


def test_what_is_no_data_is_refused(tmp_path: Path):
    shown = CliRunner().invoke(app, ["data", "check", str(tmp_path / "none.jsonl")])
    assert isinstance(shown.exception, RecordError)  # which the command's frame turns into one line and exit code 2
    assert CliRunner().invoke(app, ["data", "check"]).exit_code != 0
