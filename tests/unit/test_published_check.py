"""The paper's data sets under `metamorph data check`: faults of rows and of files, with place, field, found, expected and remedy."""

import io
import json
import pickle
import resource
import tarfile

import pytest
from tests import dataset_fixtures
from tests.dataset_fixtures import opened
from typer.testing import CliRunner

from metamorph.cli.main import app
from metamorph.data.check import check
from metamorph.data.datasets import aurora, cambrian, pairs, video_star, visual_cot
from metamorph.data.faults import Fault
from metamorph.errors import RecordError


def by_code(report) -> dict[str, Fault]:
    """The faults of a report, which has one of each kind, all of them whole."""
    found = {fault.code: fault for fault in report.faults}
    assert len(found) == len(report.faults), report.faults
    for fault in report.faults:
        assert fault.place and fault.found and fault.expected and fault.remedy.endswith("."), fault
    return found


def rewrite(path, change, *, at: dict[int, str] | None = None) -> None:
    """A file of records with rows changed, one to a line; `at`: text that stands for a line (JSON lines only)."""
    is_array = path.read_text().startswith("[")
    rows = json.loads(path.read_text()) if is_array else [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    lines = [json.dumps(row) for row in rows]
    for number, text in (at or {}).items():
        lines[number] = text
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if is_array else "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("layout", "reader", "kinds"),
    [
        ("cambrian", None, {"image_qa": 2, "text": 2}),
        ("share_video", None, {"video_qa": 3}),
        ("pairs", None, {"generation": 6}),
        ("something_something", None, {"frames": 4}),
        ("visual_cot", None, {"thinking": 2}),
        ("instruct_pix2pix", None, {"edit": 2}),
        ("aurora_parquet", "aurora", {"edit": 2}),
    ],
)
def test_good_data_give_counts_and_no_alarm(layout, reader, kinds, tmp_path):
    report = check(opened(layout, tmp_path, reader))
    assert (report.faults, report.kinds) == ((), kinds)
    assert sum(kinds.values()) == sum(report.images_per_row.values()) == report.rows


def test_faults_of_cambrian(tmp_path):
    path = dataset_fixtures.cambrian(tmp_path) / cambrian.RECORDS

    def change(rows):
        rows += [dict(rows[0], id=f"more{number}") for number in range(4)]
        rows[0]["image"] = "coco/train2017/none.jpg"
        rows[4]["conversations"] = list(reversed(rows[4]["conversations"][:2]))
        rows[5]["conversations"] = [rows[5]["conversations"][0], {"from": "gpt", "value": None}]
        rows[7]["image"] = "../elsewhere.jpg"

    rewrite(path, change, at={6: '{"id": "more2", "image": '})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b'{"id": "last", "conver')
    source = cambrian.source(str(tmp_path), whole_files=False)
    report = check(source)
    found = by_code(report)
    assert {code: (fault.place.removeprefix(str(path)), fault.field) for code, fault in found.items()} == {
        "bom": ("", ""),
        "crlf": ("", ""),
        "half-written": (":9", ""),
        "image-missing": (":1", "image"),
        "assistant-first": (":5", "conversations[0].value"),
        "answer-null": (":6", "conversations[1].value"),
        "json": (":7", ""),
        "image-outside": (":8", "image"),
    }
    assert found["image-missing"].found == f"no file 'coco/train2017/none.jpg' in {tmp_path}"
    assert found["answer-null"].expected == "text is needed"
    assert (report.container, report.rows, report.kinds) == ("JSON lines", 9, {"image_qa": 1, "text": 2})
    assert check(source, jobs=2).faults == report.faults
    with pytest.raises(RecordError, match="breaks off at the end of the file"):
        cambrian.source(str(tmp_path))  # as training opens it


def test_faults_of_video_star(tmp_path):
    path = dataset_fixtures.video_star(tmp_path) / video_star.FILES[0]
    (tmp_path / "Kinetics700" / "torn.mp4").write_bytes(b"no video at all")

    def change(rows):
        rows += [dict(rows[0], id=f"more{number}") for number in range(4)]
        rows[1]["video"] = "Kinetics700/none.mp4"
        rows[2]["conversations"] = list(reversed(rows[2]["conversations"]))
        rows[3]["conversations"] = [rows[3]["conversations"][0], {"from": "gpt", "value": None}]
        rows[4]["video"] = "Kinetics700/torn.mp4"
        rows[5]["conversations"] = rows[5]["conversations"][:1]

    rewrite(path, change)
    report = check(video_star.source(str(tmp_path)))
    found = by_code(report)
    assert {code: (fault.place.removeprefix(str(path)), fault.field) for code, fault in found.items()} == {
        "video-missing": (":3", "video"),
        "assistant-first": (":4", "conversations[0]"),
        "answer-null": (":5", "conversations[1].value"),
        "video-broken": (":6", "video"),
        "no-answer": (":7", "conversations"),
    }
    assert "torn.mp4" in found["video-broken"].found
    assert report.container == "JSON array (3 files)"
    assert report.kinds == {"video_qa": 3}


def test_faults_of_visual_cot(tmp_path):
    path = dataset_fixtures.visual_cot(tmp_path) / "viscot_363k.json"

    def change(rows):
        rows += [dict(rows[0], question_id=2 + number) for number in range(5)]
        rows[1]["image"] = ["cot/gqa/none.png", "cot/gqa/none.png###[20, 10, 60, 40]"]
        rows[2]["conversations"] = [dict(turn, **{"from": "human"}) for turn in rows[2]["conversations"]]
        rows[3]["conversations"] = [*rows[3]["conversations"][:3], {"from": "gpt", "value": None}]
        rows[4]["image"] = rows[4]["image"][:1]
        rows[5]["image"] = None

    rewrite(path, change)
    text = path.read_text().splitlines()
    text[7] = text[7].replace('"split": "train"', '"split": train')
    path.write_text("\n".join(text) + "\n")
    report = check(visual_cot.source(str(tmp_path), whole_files=False))
    assert {code: (fault.place.removeprefix(str(path)), fault.field) for code, fault in by_code(report).items()} == {
        "image-missing": (":3", "image[0]"),
        "roles-repeat": (":4", "conversations[1]"),
        "answer-null": (":5", "conversations[3].value"),
        "row-refused": (":6", "image"),
        "field-missing": (":7", "image"),
        "json": (":8", ""),
    }
    assert report.kinds == {"thinking": 1}


def test_an_image_that_is_broken_inside_is_named_by_its_field(tmp_path):
    directory = dataset_fixtures.aurora(tmp_path)
    for file in (directory / "data" / "ag" / "images").glob("*_right.png"):
        file.write_bytes(file.read_bytes()[:60])
    (fault,) = (fault for fault in check(aurora.source(str(directory))).faults if fault.severity == "error")
    assert (fault.code, fault.place, fault.field) == ("image-broken", f"{directory}/data/ag/train.json[0]", "output")


def test_faults_of_tars_of_pairs_also_behind_a_filter(tmp_path):
    directory = dataset_fixtures.pairs(tmp_path)
    tar = directory / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:4500])  # within the second image
    for kwargs in ({}, {"min_caption_length": 3}):
        with pytest.raises(RecordError, match="breaks off"):
            pairs.source(str(directory), **kwargs)
        report = check(pairs.source(str(directory), whole_files=False, **kwargs))
        assert [(fault.code, fault.place) for fault in report.faults] == [("truncated", str(tar))]
        assert report.container == f"WebDataset tar{', filtered' if kwargs else ''} (2 files)"
        assert report.rows == sum(report.kinds.values()) < 6


def test_the_command_checks_a_recipe_with_broken_files_to_its_end(tmp_path):
    path = dataset_fixtures.cambrian(tmp_path) / cambrian.RECORDS
    path.write_text(path.read_text() + '{"id": "la')
    dataset_fixtures.howto100m(tmp_path / "howto100m")  # whose reader has no such files
    from metamorph.microworld.components import shipped
    from metamorph.recipes import load_recipe

    config = load_recipe("microworld").to_dict()
    reader = "metamorph.data.datasets.{}.source"
    folders = {"cambrian": tmp_path, "howto100m": tmp_path / "howto100m"}
    sources = [{"source": reader.format(name), "kwargs": {"directory": str(folder)}} for name, folder in folders.items()]
    config["data"] = {"sources": sources, "max_length": 4096}
    config["model"] = {"start": str(shipped("metamorph"))}
    config["stages"] = [{**stage, "data": None} for stage in config["stages"]]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["data", "check", "--recipe", str(recipe), "--json", "-"])
    assert shown.exit_code == 1, shown.output
    first, second = json.loads(shown.stdout)["sources"]
    assert [(problem["code"], problem["place"]) for problem in first["problems"]] == [("half-written", f"{path}:5")]
    assert (first["rows"], first["kinds"]) == (5, {"image_qa": 2, "text": 2})
    assert (second["problems"], second["kinds"]) == ([], {"frames": 3})


# ---- filters of pairs ---------------------------------------------------------------------------------------


def test_a_filter_reads_texts_once_and_again_only_if_it_or_a_tar_changes(tmp_path, monkeypatch):
    directory = dataset_fixtures.pairs(tmp_path)
    read = []
    rule = pairs._rule_broken
    monkeypatch.setattr(pairs, "_rule_broken", lambda file, rows, *rest: read.append(rows.path.name) or rule(file, rows, *rest))

    def ids(**kwargs):
        read.clear()
        source = pairs.source(str(directory), **kwargs)
        return [source[index].id for index in range(len(source))]

    short, long = ["000000002", "000010002"], ["000000001", "000010001"]
    assert ids(max_caption_length=8) == short
    assert sorted(read) == ["00000.tar"] * 3 + ["00001.tar"] * 3
    assert ids(max_caption_length=8) == short and not read
    assert ids(min_caption_length=15) == long and len(read) == 6
    assert ids(max_caption_length=8) == short and ids(min_caption_length=15) == long and not read  # each has an index of its own
    (directory / "00001.tar").write_bytes((directory / "00000.tar").read_bytes())
    assert ids(max_caption_length=8) == ["000000002", "000000002"]
    assert read == ["00001.tar"] * 3


def test_a_filter_by_size_keeps_what_states_none_for_it_is_broken(tmp_path):
    """One orphan does not keep the rest from being read, and its fault is told."""
    directory = dataset_fixtures.pairs(tmp_path)
    with tarfile.open(directory / "00001.tar", "a") as tar:
        for name, data in (("8.jpg", b"no text"), ("9.jpg", b"no facts"), ("9.json", b"{broken")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = pairs.source(str(directory), min_side=24)
    assert len(source) == 8
    assert [(fault.code, fault.place.rpartition(" ")[2]) for fault in check(source).faults] == [("orphan", "8"), ("json", "9")]


def test_worker_processes_are_sent_the_place_of_a_filters_rows(tmp_path):
    source = opened("pairs", tmp_path, max_caption_length=8)
    sent = pickle.dumps(source.rows.parts[0])
    assert len(sent) < 3000
    assert pickle.loads(sent)[0].values["key"] == "000000002"  # noqa: S301


def test_more_tars_than_files_may_be_open(tmp_path):
    directory = dataset_fixtures.pairs(tmp_path, shards=150)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        source = pairs.source(str(directory), max_caption_length=8)
        assert [source[index].id for index in range(150)] == [f"{index:05}0002" for index in range(150)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
