"""What `metamorph data show` shows is what the model is trained on: the same tokens, targets, pixels and packs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.planted import LAYOUTS, Layout, Row, file_of, make_media, rows_for
from typer.testing import CliRunner

from metamorph.cli.main import app
from metamorph.data.packing import Packing, RowPacker
from metamorph.data.showing import look, pack_table, packed, page_of, position_table
from metamorph.errors import ConfigError
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


def test_packs_of_rows_filled_ahead_are_those_of_training(processor):
    views = [look(example("Yes. " * number, name=str(number)), processor) for number in (1, 9, 3, 12, 2, 7, 5, 1)]
    length = max(len(view.sequence) for view in views) + 40
    packing = Packing(length, 2)
    packer, expected = RowPacker(iter([view.sequence for view in views]), packing), []
    while row := packer.next_row():
        expected.append([sequence.id for sequence in row])
    rows = packed(views, length, packing.look_ahead)
    assert [[name for name, _, _ in row.documents] for row in rows] == expected
    assert expected != [[name for name, _, _ in row.documents] for row in packed(views, length)]


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
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    file.write_text("".join(f"{json.dumps(row)}\n" for row in (good, {**good, "image": "cut.png"}, good)))
    shown = CliRunner().invoke(app, ["data", "show", str(file), "--html", str(page)])
    assert shown.exit_code == 1 and "does not decode" in shown.output and f"{file}:2" in shown.output
    assert f"{file}:3" in shown.output and f"{file}:3" in page.read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory):
    """Pictures and clips of planted rows; Arrow files of `datasets` go there as well."""
    import datasets.config

    folder = tmp_path_factory.mktemp("layouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "arrow"))
        yield make_media(folder / "root")


def said_in(row: Row, layout: Layout) -> str:
    """What the assistant says in a row, without white space."""
    if "captions" in layout.has:
        return "Hereisanimagebasedonyourrequest:[image]"
    return re.sub(r"\s", "", "".join(text for role, text in row.turns if role == "assistant").replace("<image>", "[image]"))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_rows_of_every_layout_are_shown(layout: Layout, root: Path, monkeypatch: pytest.MonkeyPatch):
    """All kinds of rows: their places, exactly what the assistant says as targets, and a slot for each image and frame."""
    rows = rows_for(layout, 9)
    file = layout.write(file_of(layout, root, "shown"), rows)
    monkeypatch.setenv("NO_COLOR", "1")
    page = root / f"{layout.name}.html"
    shown = CliRunner().invoke(app, ["data", "show", str(file), "-n", str(len(rows)), "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    output = shown.output[shown.output.index(layout.place(file, 0)) :]
    heads = [output.index(f"{layout.place(file, index)}  (") for index in range(len(rows))]
    frames = 2 if layout.name == "own" else 3  # of the clip, at one a second
    slots = 0
    for row, start, end in zip(rows, heads, [*heads[1:], None], strict=True):
        text = output[start:end]
        targets = "".join(re.findall("⟦(.*?)⟧", text, re.DOTALL))
        spoken = re.sub(r"<image_start>|<image_end>|<\|end\|>|\s", "", re.sub(r"\[image \d+: 16 visual tokens\]", "[image]", targets))
        assert spoken == said_in(row, layout), text
        found = re.findall(r"\[image (\d+): 16 visual tokens\]", text)
        assert found == [str(number) for number in range(len(row.images or ()) + frames * len(row.videos))], text
        slots += len(found)
    assert page.read_text().count("data:image/png;base64,") == slots > 0


@pytest.mark.parametrize("command", ["check", "show", "encode"])
def test_options_of_files_are_refused_where_a_recipe_names_the_data(command: str, tmp_path: Path):
    """The recipe is not even looked at: that there is none does not matter."""
    options = ["--image-root", str(tmp_path), "--columns", "image=img", "--allow-urls"]
    for given, named in ((options, "--image-root, --columns, --allow-urls"), (options[2:4], "--columns"), (options[4:], "--allow-urls")):
        refused = CliRunner().invoke(app, ["data", command, "--recipe", "none.yaml", *given]).exception
        assert isinstance(refused, ConfigError)
        assert str(refused).startswith(f"{named} but no files (metamorph data {command})")
    refused = CliRunner().invoke(app, ["data", command]).exception
    assert isinstance(refused, ConfigError) and f"no files but some, or --recipe, are needed (metamorph data {command})" in str(refused)
