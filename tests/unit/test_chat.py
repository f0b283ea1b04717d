"""`metamorph chat` on the shipped model: turns, drawings, commands, and that nothing a user types ends or spoils a conversation."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from metamorph.cli.chat import Chat, completions, preview, split_command
from metamorph.cli.generate import load
from metamorph.cli.main import app
from metamorph.microworld.reader import read_scene
from metamorph.provenance import read

DRAW = "Draw a small red star at the top left"
FAST = {"steps": 2, "max_new_tokens": 64}


def chat(tmp_path: Path, *lines: str | bytes, options: tuple[str, ...] = ()):
    """The whole command with these lines on its stdin."""
    typed = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    arguments = ["chat", "--folder", str(tmp_path / "drawings"), "--device", "cpu", "--steps", "2", *options]
    result = CliRunner().invoke(app, arguments, input=typed)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def pipeline():
    return load(None, None, "cpu", needs_decoder=True)


@pytest.fixture
def talk(pipeline, tmp_path) -> Chat:
    return Chat(pipeline, tmp_path / "drawings", seed=0, settings=FAST)


def test_it_draws_answers_about_its_drawing_and_saves_it(tmp_path):
    result = chat(tmp_path, DRAW, "What colour is the star?", "/seed 7", DRAW, f"/save {tmp_path}/mine/star.png", "/quit", "never said")
    first, second, mine = tmp_path / "drawings" / "drawing-1.png", tmp_path / "drawings" / "drawing-2.png", tmp_path / "mine" / "star.png"
    said = result.stdout.splitlines()
    assert f"[saved {first}]" in said and f"[saved {second}]" in said and f"[saved {mine}]" in said
    assert "red" in said[said.index(f"[saved {first}]") + 1 : said.index(f"[saved {second}]")]
    assert (read(first).seed, read(second).seed) == (0, 7)
    assert mine.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        (thing,) = read_scene(image.convert("RGB")).scene.objects
    assert (thing.size, thing.colour, thing.shape, thing.cell) == ("small", "red", "star", 0)
    assert "Traceback" not in result.output and not result.stderr


def test_what_is_refused_is_one_line_and_the_chat_goes_on(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    result = chat(
        tmp_path,
        "/image nope.png",
        "/image ~nobody-of-this-name/cat.png",
        f"/image {tmp_path / 'broken.png'}",
        "/image",
        "/imagine a star",
        "/seed seven",
        "/save star.png",
        '/image "half',
        "word " * 3000,
        b"\xff\xfe not UTF-8",
        "",
        "   ",
        DRAW,
    )
    refused = result.stderr.splitlines()
    expected = ["nope.png", "~nobody", "broken.png", "/help", "/help", "stays 0", "Nothing was drawn", '"half', "positions"]
    assert len(refused) == len(expected), refused
    for line, part in zip(refused, expected, strict=True):
        assert part in line
    assert (tmp_path / "drawings" / "drawing-1.png").is_file()


def test_options_are_those_of_generate(tmp_path):
    result = chat(tmp_path, DRAW, options=("--max-new-tokens", "3", "--seed", "4"))
    assert "cut (length)" in result.stderr and "--max-new-tokens" in result.stderr
    assert chat(tmp_path, DRAW, options=("--no-metadata", "--guidance", "2")).exit_code == 0
    assert read(tmp_path / "drawings" / "drawing-1.png") is None
    again = chat(tmp_path, "Where is the star?", options=("--image", str(tmp_path / "drawings" / "drawing-1.png")))
    assert "64 x 64" in again.stdout and "top left" in again.stdout


def test_a_later_question_is_answered_from_the_tokens_that_were_drawn(talk):
    talk.say(DRAW)
    question, answer = talk.messages
    assert (question.role, answer.role) == ("user", "assistant")
    assert [image.visual_tokens is not None for image in answer.images] == [True]
    talk.say("What shape is at the top left?")
    assert len(talk.messages) == 4 and talk.messages[3].text.strip() == "star"
    talk.say("/reset")
    assert talk.messages == []


def test_images_wait_for_the_next_message_and_survive_a_refusal(talk, tmp_path):
    talk.say(DRAW)
    talk.say("/reset")
    talk.say(f"/image '{tmp_path}/drawings/drawing-1.png'")
    talk.say("word " * 3000)  # refused: longer than the context
    assert talk.messages == [] and len(talk.attached) == 1
    talk.say("What colour is the star?")
    assert talk.attached == [] and talk.messages[1].text.strip() == "red"


@pytest.mark.parametrize(
    ("line", "argument"),
    [
        (r"/image C:\Users\me\cat.png", r"C:\Users\me\cat.png"),
        (r'/image "C:\My Pictures\cat.png"', r"C:\My Pictures\cat.png"),
        ("/image my cat.png ", "my cat.png"),
        ("/image '/srv/o'neil/cat.png'", "/srv/o'neil/cat.png"),
        ("/image 'half", "'half"),
        ("/image '", "'"),
        ("/reset", ""),
    ],
)
def test_the_rest_of_a_commands_line_is_its_argument(line, argument):
    assert split_command(line) == (line.split()[0], argument)


@pytest.mark.parametrize("spelling", ["my cat's.png", "'my cat's.png'", r"my\ cat\'s.png"])
def test_a_path_with_spaces_is_attached_however_it_is_spelt(talk, tmp_path, spelling, capsys, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "my cat's.png")
    monkeypatch.chdir(tmp_path)
    talk.say(f"/image {spelling}")
    assert len(talk.attached) == 1, capsys.readouterr().err
    assert completions("/image my c") == ["/image my cat's.png"]
    assert completions("/im") == ["/image "] and completions("a my c") == []


def test_ctrl_c_stops_the_answer_and_forgets_the_question(talk, capsys):
    talk.say(DRAW)
    before, steps = list(talk.messages), []

    def interrupt(*_) -> None:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    hook = talk.pipeline.model.vision_head.register_forward_hook(interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background without one
    try:
        assert talk.say(DRAW)
    finally:
        signal.signal(signal.SIGINT, handler)
        hook.remove()
    assert len(steps) < 16  # it stopped inside the image
    assert talk.messages == before
    assert "Stopped" in capsys.readouterr().err
    assert talk.say("What colour is the star?") and len(talk.messages) == 4


def test_without_a_decoder_it_says_so(talk, capsys, pipeline):
    from metamorph.pipeline import MetaMorphPipeline

    talk.pipeline = MetaMorphPipeline(pipeline.model, pipeline.processor)
    talk.say(DRAW)
    assert "no decoder" in capsys.readouterr().out
    assert talk.messages[1].images and not talk.folder.exists()


def test_drawings_never_replace_a_file(talk):
    talk.folder.mkdir()
    (talk.folder / "drawing-1.png").write_text("mine")
    talk.say(DRAW)
    assert (talk.folder / "drawing-1.png").read_text() == "mine"
    assert (talk.folder / "drawing-2.png").is_file()


def test_the_preview_shows_two_pixels_for_each_character():
    image = Image.new("RGB", (4, 4), "red")
    image.paste("blue", (0, 2, 4, 4))
    rows = list(preview(image, 4))
    assert len(rows) == 2
    assert rows[0].count("38;2;255;0;0;48;2;255;0;0m\N{UPPER HALF BLOCK}") == 4
    assert rows[1].count("38;2;0;0;255;48;2;0;0;255m\N{UPPER HALF BLOCK}") == 4
    assert len(list(preview(Image.new("RGB", (100, 1))))) == 1
