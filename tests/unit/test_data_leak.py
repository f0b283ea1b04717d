"""Leaks: equal, nearly equal and overlapping prompts are found with both places; others are not, however many processes search."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metamorph.cli.main import app
from metamorph.data.leak import Benchmark, Prompt, find_leaks, ngrams, read_prompts, words
from metamorph.data.source import open_source
from metamorph.errors import ConfigError, RecordError

QUESTION = "How many red apples are lying on the wooden table next to the window?"


def benchmark(*texts: str, n: int = 8, threshold: float = 0.7) -> Benchmark:
    return Benchmark([Prompt(text, f"bench.txt:{number}") for number, text in enumerate(texts, start=1)], n, threshold)


def rows(path: Path, *asked: str) -> Path:
    turns = ([{"from": "human", "value": text}, {"from": "gpt", "value": "Three."}] for text in asked)
    path.write_text("".join(json.dumps({"conversations": one, "image": "a.png"}) + "\n" for one in turns))
    return path


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (QUESTION, "exact"),
        (f"<image>\n{QUESTION}", "exact"),
        (QUESTION.upper().replace(" ", "  ").replace("?", " !"), "normalised"),
        ("Ｈow many red apples are lying on the wooden table next to the window", "normalised"),
        (f"Look closely. {QUESTION} Answer with one word.", "n-gram"),
        ("How many red apples are lying on the wooden table next to the door?", "n-gram"),
        ("How many green apples are lying on the wooden bench next to the window?", None),
        ("What colour is the car?", None),
        ("", None),
        ("<image>", None),
    ],
)
def test_how_a_prompt_is_found(asked: str, match: str | None):
    leak = benchmark("What is this?", QUESTION).leak_of(Prompt(asked, "train.jsonl:3"))
    assert (None if leak is None else leak.match) == match
    if leak is not None:
        assert (leak.train.place, leak.benchmark.place) == ("train.jsonl:3", "bench.txt:2")
        assert 0.7 <= leak.overlap <= 1


def test_overlap_is_the_share_of_the_prompts_ngrams():
    leak = benchmark("a b c d e f", n=3, threshold=0.5).leak_of(Prompt("x a b c d y e f", "t:1"))
    assert leak is not None and leak.overlap == pytest.approx(2 / 4)  # abc, bcd of abc, bcd, cde, def
    assert benchmark("a b c d e f", n=3, threshold=0.51).leak_of(Prompt("x a b c d y e f", "t:1")) is None


def test_prompts_shorter_than_an_ngram_are_compared_whole():
    short = benchmark("Is the tall man smiling?")
    assert short.leak_of(Prompt("Tell me: is the tall man smiling? Yes or no.", "t:1")) is not None
    assert benchmark("What is this?").leak_of(Prompt("Well, what is this? Tell me.", "t:1")) is None  # too short to mean anything


def test_text_without_spaces_is_cut_into_letters():
    assert words("图中有几只猫？Two CATS!") == ["图", "中", "有", "几", "只", "猫", "two", "cats"]
    assert benchmark("图中的桌子上一共有几只黑色的猫").leak_of(Prompt("请问图中的桌子上一共有几只黑色的猫？", "t:1")) is not None
    assert len(ngrams(words("a b c"), 8)) == 1 and ngrams([], 8) == set()


def test_rows_of_files_with_one_process_and_with_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    others = [f"What number is written on the door of house {number} in this street of mine?" for number in range(20)]
    source = open_source(rows(tmp_path / "train.jsonl", *others, QUESTION, f"Now then: {QUESTION}"))  # the image need not exist
    report = find_leaks(source, benchmark(QUESTION))
    assert [(leak.match, leak.train.place) for leak in report.leaks] == [
        ("exact", f"{tmp_path / 'train.jsonl'}:21"),
        ("n-gram", f"{tmp_path / 'train.jsonl'}:22"),
    ]
    assert (report.rows, report.prompts, report.unread) == (22, 1, 0)
    monkeypatch.setattr("metamorph.data.leak._CHUNK", 11)
    seen = []
    assert find_leaks(source, benchmark(QUESTION), jobs=2, told=lambda done, total: seen.append((done, total))) == report
    assert seen == [(11, 22), (22, 22)]


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path):
    path = rows(tmp_path / "train.jsonl", QUESTION)
    path.write_text(
        path.read_text() + "{broken\n" + json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]})
    )
    report = find_leaks(open_source(path), benchmark(QUESTION))
    assert (len(report.leaks), report.unread) == (2, 1)


def test_rows_without_a_prompt_are_no_all_clear(tmp_path: Path):
    (tmp_path / "bench.txt").write_text(QUESTION + "\n")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"image": "a.png", "txt": QUESTION}) + "\n")
    assert [leak.match for leak in find_leaks(open_source(path), benchmark(QUESTION)).leaks] == ["exact"]
    path.write_text(json.dumps({"user": QUESTION, "reply": "Three."}) + "\n")
    assert find_leaks(open_source(path), benchmark(QUESTION)).unread == 1
    command = ["data", "leak", str(path), "--against", str(tmp_path / "bench.txt")]
    refused = CliRunner().invoke(app, command).exception
    assert isinstance(refused, ConfigError) and "prompts in none of 1 rows" in str(refused)
    assert CliRunner().invoke(app, [*command, "--columns", "question=user"]).exit_code == 1


def test_prompts_from_text_json_and_data(tmp_path: Path):
    text = tmp_path / "p.txt"
    text.write_text("First?\n\n Second? \n", encoding="utf-8-sig")
    assert read_prompts(text) == [Prompt("First?", f"{text}:1"), Prompt("Second?", f"{text}:3")]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"question": "First?", "answer": "a"}\n{"prompt": "Second?"}\n')
    assert [prompt.text for prompt in read_prompts(lines)] == ["First?", "Second?"]
    assert [prompt.text for prompt in read_prompts(rows(tmp_path / "data.jsonl", "<image> Third?"))] == ["<image> Third?"]
    text.write_text("\n")
    with pytest.raises(RecordError, match="0 prompts but at least 1 is needed"):
        read_prompts(text)
    with pytest.raises(RecordError):
        read_prompts(tmp_path / "none.txt")


def test_settings_out_of_range_are_refused():
    for settings in ({"n": 0}, {"threshold": 0.0}, {"threshold": 1.5}):
        with pytest.raises(ConfigError):
            benchmark("a", **settings)
    with pytest.raises(ConfigError):
        Benchmark([])


def test_the_command(tmp_path: Path):
    train, prompts = rows(tmp_path / "train.jsonl", "Nothing of that.", QUESTION), tmp_path / "p.txt"
    prompts.write_text(QUESTION.lower() + "\n")
    shown = CliRunner().invoke(app, ["data", "leak", str(train), "--against", str(prompts)])
    assert shown.exit_code == 1
    assert f"normalised 100%: {train}:2 and {prompts}:1" in shown.output
    shown = CliRunner().invoke(app, ["data", "leak", str(train), "--against", str(prompts), "--json", "-"])
    (leak,) = json.loads(shown.stdout)["leaks"]
    assert (leak["match"], leak["train"]["place"], leak["benchmark"]["text"]) == ("normalised", f"{train}:2", QUESTION.lower())
    prompts.write_text("Something else entirely?\n")
    assert CliRunner().invoke(app, ["data", "leak", str(train), "--against", str(prompts)]).exit_code == 0
