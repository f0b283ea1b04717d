"""What `metamorph data show` shows is what the model is trained on: the same tokens, targets, pixels and packs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from metamorph.cli.main import app
from metamorph.data.showing import look, pack_table, packed, page_of, position_table
from metamorph.messages import Example, ImagePart, Message
from metamorph.reporting.page import render

RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def processor():
    from metamorph.microworld.components import shipped
    from metamorph.model.processing import MetaMorphProcessor

    return MetaMorphProcessor.from_pretrained(shipped("metamorph"))


def example(*answer: object, name: str = "a", question: str = "Draw <b> a square.") -> Example:
    messages = (Message.user(ImagePart(RED), question), Message.assistant(*answer))  # pyright: ignore[reportArgumentType]
    return Example(messages, name, "source", "edit", origin=f"train.jsonl:{name}")


def test_runs_hold_every_position_once_and_mark_the_answer(processor):
    view = look(example("Here: ", ImagePart(RED)), processor)
    assert [run.start for run in view.runs] == list(np.cumsum([0, *(run.length for run in view.runs)])[:-1])
    assert sum(run.length for run in view.runs) == len(view.sequence)
    said = "".join(run.text for run in view.runs if run.is_target)
    assert said.startswith("Here:") and "[image 1: 16 visual tokens]" in said and "[image 0" not in said
    assert "targets:" in view.summary and "16 visual tokens" in view.summary


def test_pictures_are_what_the_encoder_gets(processor):
    view = look(example("Yes."), processor)
    (picture,) = view.pictures
    assert picture is not None and picture.size == (64, 64)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(RED)).max() <= 1
    tokens = ImagePart(visual_tokens=__import__("torch").zeros(16, 32))
    assert look(Example((Message.user(tokens, "What?"), Message.assistant("A.")), "t", "s"), processor).pictures == (None,)


def test_a_row_that_is_too_long_is_shown_and_said_to_be(processor):
    view = look(example("Here.", ImagePart(RED)), processor, limit=30)
    assert "Too long: at most 30 positions are allowed; 1 image(s)" in view.summary
    assert look(example("Here."), processor, limit=300).cut == ""


def test_packs_hold_each_document_once_and_count_from_0(processor):
    views = [look(example("Yes." * number, name=str(number)), processor) for number in (1, 4, 2)]
    lengths = {view.example.id: len(view.sequence) for view in views}
    length = lengths["1"] + lengths["2"]
    rows = packed(views, length)
    documents = [document for row in rows for document in row.documents]
    assert {name: size for name, _, size in documents} == {name: size for name, size in lengths.items() if size <= length}
    assert rows[0].documents == (("1", 0, lengths["1"]), ("2", lengths["1"], lengths["2"])) and rows[0].fill == 1
    assert pack_table(rows).rows[1][2:4] == [f"{lengths['1']} to {length - 1}", f"0 to {lengths['2'] - 1}"]


def test_page_escapes_text_and_carries_its_pictures(processor):
    view = look(example("<script>", ImagePart(RED)), processor, limit=20)
    html = render(page_of([view], "rows & more", "a <model>", processor.decode, packed([view], 500)))
    assert "&lt;b&gt;" in html and "<b> a" not in html and "<script>" not in html
    assert html.count("data:image/png;base64,") == 2
    assert re.search(r'class="good"[^>]*title="positions \d+ to \d+, targets">', html)
    table = position_table(view, processor.decode)
    assert len(table.rows) == len(view.sequence)
    assert sum(row[3] == "visual" for row in table.rows) == 16
    assert sum(row[3] not in (None, "visual") for row in table.rows) == view.sequence.num_text_targets


def test_the_command_shows_rows_and_names_those_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    RED.save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A [red] square."}]
    good, bad = {"id": "x", "image": "a.png", "conversations": turns}, {"id": "y", "image": "a.png", "conversations": turns[:1]}
    file = tmp_path / "train.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    monkeypatch.setenv("NO_COLOR", "1")
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(app, ["data", "show", str(file), "--row", "0", "--html", str(page), "--pack"])
    assert shown.exit_code == 0, shown.output
    assert "⟦A [red] square.<|end|>⟧" in shown.output and "[image 0: 16 visual tokens]" in shown.output
    assert "shipped microworld model" in shown.output and "Packing" in shown.output
    assert "data:image/png;base64," in page.read_text()
    shown = CliRunner().invoke(app, ["data", "show", str(file)])
    assert shown.exit_code == 1
    assert f"error: {file}:2 conversations: no assistant turn but at least one is needed" in shown.output
    assert CliRunner().invoke(app, ["data", "show", str(file), "--row", "7"]).exit_code != 0
