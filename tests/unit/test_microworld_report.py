import json
import math
from pathlib import Path

import pytest

from metamorph.errors import ConfigError, DataError
from metamorph.evaluation.metrics import Metric, proportion
from metamorph.evaluation.runner import Results
from metamorph.microworld import report_curves, suite
from metamorph.microworld.report import demo_page, demo_report, metrics_of, summary_table, verdict
from metamorph.microworld.report_rows import data_page, truth
from metamorph.reporting.page import render

TASK_NAMES = [
    "vqa", "video", "names_in_text", "text_perplexity_ratio", "drawing", "held_out_combinations", "reconstruction", "edits",
    "next_frames", "visual_thinking", "named_drawing", "puzzle_drawing",
]  # fmt: skip


def figures(value: float) -> dict[str, Metric]:
    """Every metric of the table and its baselines, all with one value."""
    keys = {line.key for line in suite.LINES} | {line.baseline for line in suite.LINES if line.baseline}
    keys |= {f"vqa_{sort}/{kind}" for sort in ("accuracy", "blind", "majority") for kind in ("colour", "glyph")} | {"vqa_majority"}
    return {key: Metric(value, max(0.0, value - 0.05), min(1.0, value + 0.05), 500) for key in sorted(keys)}


def logged(offset: float = 0.0, stages: tuple[str, ...] = ("projector", "vpit")) -> list[dict]:
    rows: list[dict] = []
    for stage in stages:
        for step in range(10, 101, 10):
            visual = None if stage == "projector" else -1 + math.exp(-step / 50) + offset
            rows.append({"step": step, "stage": stage, "loss": 1.0, "text_loss": 3 * math.exp(-step / 50) + offset, "visual_loss": visual})
        rows.append({"step": 100, "stage": stage, "evaluation": "accuracy", "value": 1.0})
    return rows


def report(value: float = 0.9) -> dict:
    results = Results(figures(value), {"vqa": 1.0}, {"seed": 0, "samples": {"vqa": 540}})
    early = Results(figures(0.1), {"vqa": 1.0}, {"seed": 0, "samples": {"vqa": 540}})
    return demo_report(
        results,
        {"at_step_0": early, "after_stage_1": early},
        seed=0,
        seconds={"evaluation start": 1.0, "training vpit": 60.0, "evaluation vpit": 20.0},
        rows=logged(),
        band=None,
        more={"resumed": False},
    )


@pytest.mark.parametrize("full", [False, True])
def test_every_task_is_there_and_has_enough_samples(full: bool):
    tasks = suite.evaluation_tasks(full)
    assert [task.name for task in tasks] == TASK_NAMES
    least = 500 if full else 200
    groups = {"named_drawing": least if full else 50, "puzzle_drawing": 48, "text_perplexity_ratio": 128}
    assert all(task.samples >= groups.get(task.name, least) for task in tasks)


def test_floors_are_those_asked_for():
    at_demo = {line.key: line.demo for line in suite.LINES if line.demo is not None}
    assert at_demo == {
        "vqa_accuracy": 0.75,
        "vqa_over_blind": 0.30,
        "drawing_exact": 0.40,
        "drawing_attribute_accuracy": 0.80,
        "reconstruction_exact": 0.85,
        "token_skill": 0.60,
    }
    shipped = {line.key: line.shipped for line in suite.LINES if line.shipped is not None}
    assert len(shipped) == 14 and shipped["text_perplexity_ratio"] == 1.2 and shipped["named_drawing/both"] == 0.90


def test_a_ceiling_is_missed_from_above_and_a_floor_from_below():
    found = suite.requirements({"text_perplexity_ratio": Metric(1.3, 1.2, 1.4, 500), "edit_exact": Metric(0.7, 0.6, 0.8, 500)}, "shipped")
    assert found["text_perplexity_ratio"] == {"at_most": 1.2, "value": 1.3, "reached": False}
    assert found["edit_exact"]["reached"] is True
    assert suite.requirements({"edit_exact": Metric(0.1, 0.0, 0.2, 500)}, "demo") == {}


def test_baselines_stand_beside_what_they_belong_to():
    found = suite.baselines(figures(0.3))
    assert found["drawing_attribute_accuracy"] == {"chance": 0.3}
    assert found["vqa_accuracy"]["majority"] == 0.3 and found["vqa_accuracy/glyph"] == {"blind": 0.3, "majority": 0.3}


def test_the_report_is_json_with_the_same_keys_at_every_moment():
    values = json.loads(json.dumps(report()))
    assert values["metrics"].keys() == values["at_step_0"].keys() == values["after_stage_1"].keys()
    assert values["metrics"]["vqa_accuracy"] == {"value": 0.9, "low": pytest.approx(0.85), "high": pytest.approx(0.95), "n": 500}
    assert values["peak_memory_bytes"] > 10 * 2**20 and values["versions"]["torch"] and values["machine"]["cores"] >= 1
    assert metrics_of(values) == figures(0.9)


def test_the_verdict_names_what_was_missed():
    assert verdict(report(0.9)) == "6 of 6 required figures reached."
    assert verdict(report(0.79)).startswith("4 of 6") and "reconstruction_exact" in verdict(report(0.79))


def test_the_terminal_table_shows_floor_and_earlier_figures():
    table = summary_table(report(), "demo")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["metric"], row["asked"], row[""]) == ("vqa_accuracy", "≥ 0.75", "✓")
    assert row["step 0"] == 0.1 and row["baseline"] == 0.9


def test_the_page_states_figures_warnings_and_what_to_try():
    values = report()
    html = render(demo_page(values, logged(), None, [], "metamorph generate"))
    for words in ("6 of 6", "the thought is not used", "No expected band", "metamorph generate", "memory peaked"):
        assert words in html
    assert html.count("<svg") == 2 and "http" not in html.replace("http://www.w3.org", "")


def test_losses_inside_and_outside_the_band():
    band = report_curves.expected_band([logged(0.0), logged(0.02), logged(-0.02)])
    shares = report_curves.share_in_band(logged(0.01), band)
    assert shares == {"projector/text_loss": 1.0, "vpit/text_loss": 1.0, "vpit/visual_loss": 1.0}
    assert report_curves.share_in_band(logged(5.0), band)["vpit/text_loss"] == 0.0
    assert "expected" in report_curves.curve_blocks(logged(), band)[0].html()


def test_a_band_of_other_steps_is_not_drawn():
    band = report_curves.expected_band([logged(0.0), logged(0.1)])
    longer = [{**row, "step": row["step"] * 2} for row in logged()]
    assert report_curves.share_in_band(longer, band) == {}
    assert "No expected band" in report_curves.curve_blocks(longer, band)[-1].html()
    with pytest.raises(DataError, match="different steps"):
        report_curves.expected_band([logged(), longer])
    with pytest.raises(DataError, match="1 run"):
        report_curves.expected_band([logged()])


def test_the_data_page_shows_every_kind_with_its_truth():
    html = render(data_page(2))
    assert html.count('class="talk"') == 14
    for kind in ("image qa", "generation", "video qa", "frames", "thinking", "edit", "text"):
        assert f">{kind}</h2>" in html


def test_the_truth_of_a_row_tells_its_pictures():
    from metamorph.microworld.examples import make_row
    from metamorph.microworld.world import caption

    row = make_row("generation", 0, "train", 3)
    assert truth(row) == caption(row.pictures("assistant")[0].scene)
    assert truth(make_row("text", 0, "train", 3)) == ""


def test_show_and_wrong_options_of_the_command(tmp_path: Path):
    from typer.testing import CliRunner

    from metamorph.cli.main import app

    shown = CliRunner().invoke(app, ["microworld", "show", "--rows", "1", "--out", str(tmp_path / "data.html")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "data.html").stat().st_size > 10_000
    for options, words in ((["--size", "smal"], "'small'"), (["--only", "llm,encodr"], "'encoder'")):
        refused = CliRunner().invoke(app, ["microworld", "build", "--out", str(tmp_path), *options])
        assert isinstance(refused.exception, ConfigError) and words in str(refused.exception)


def save_random_parts(root: Path) -> dict[str, Path]:
    """The microworld's parts as they are before any training."""
    import torch

    from metamorph.decoder import VisualDecoderPipeline
    from metamorph.microworld.components import save_encoder
    from metamorph.microworld.diffusion import decoder_from_base, new_base
    from metamorph.microworld.language import build_llama
    from metamorph.microworld.tokenizer import build_tokenizer
    from metamorph.microworld.vision import build_siglip

    torch.manual_seed(0)
    tokenizer = build_tokenizer(0)
    tokenizer.save_pretrained(root / "llm")
    build_llama("tiny", tokenizer).save_pretrained(root / "llm")
    save_encoder(build_siglip(len(tokenizer), tokenizer.pad_token_id), tokenizer, root / "encoder")
    VisualDecoderPipeline.from_model(new_base()).save_pretrained(root / "base")
    VisualDecoderPipeline.from_model(decoder_from_base(root / "base")).save_pretrained(root / "decoder")
    return {name: root / name for name in ("llm", "encoder", "decoder")}


@pytest.mark.slow
def test_the_whole_demo_in_miniature_is_made_once_and_resumed(tmp_path: Path):
    from metamorph.microworld.demo import Demo, clear, run_demo
    from metamorph.microworld.measuring import Measured, measure
    from metamorph.recipes.microworld import microworld_demo
    from metamorph.training.trackers import SilentTracker

    parts = save_random_parts(tmp_path)
    changes = {"output_dir": str(tmp_path / "run"), "model.llm": str(parts["llm"]), "model.vision": str(parts["encoder"])}
    for stage in (0, 1):
        changes |= {f"stages.{stage}.training.{name}": value for name, value in (("steps", 2), ("batch_size", 4), ("log_every", 1))}
    samples = dict.fromkeys(TASK_NAMES, 4) | {"vqa": 9, "named_drawing": 1}
    demo = Demo(microworld_demo().with_overrides(changes), parts["decoder"], samples=samples, few=True, steps=1)
    said: list[str] = []
    outcome = run_demo(demo, told=said.append, tracker=lambda stage: SilentTracker())
    values = json.loads(outcome.json.read_text())
    assert values["metrics"].keys() == values["at_step_0"].keys() == values["after_stage_1"].keys()
    assert values["metrics"]["reconstruction_exact"] == values["at_step_0"]["reconstruction_exact"]
    assert values["metrics"]["vqa_accuracy"]["n"] == 9 and values["resumed"] is False
    assert {"training projector", "training vpit", "evaluation start", "evaluation vpit"} <= values["seconds"].keys()
    html = outcome.page.read_text()
    for heading in (
        "Figures",
        "Losses",
        "A conversation",
        "Editing a picture",
        "Thinking visually",
        "Things with names",
        "What to try next",
    ):
        assert f">{heading}</h2>" in html
    assert "data:image/png;base64," in html and "<script" not in html

    again: list[str] = []
    assert run_demo(demo, told=again.append) == outcome and "nothing is left to do" in again[0]
    outcome.page.unlink()
    (tmp_path / "run" / "evaluations" / "vpit.json").unlink()
    again.clear()
    resumed = run_demo(demo, told=again.append, tracker=lambda stage: SilentTracker())
    assert "going on where it stopped" in again[0] and "start: evaluated before" in again and "evaluating after stage vpit" in again
    assert resumed.report["metrics"] == outcome.report["metrics"] and resumed.report["resumed"] is True

    measured = measure(
        Measured(tmp_path / "run" / "model", tmp_path / "run" / "model" / "decoder", parts["llm"]),
        samples=2,
        output=tmp_path / "table.json",
    )
    assert json.loads((tmp_path / "table.json").read_text())["metrics"].keys() == measured["metrics"].keys()
    assert {line.key for line in suite.LINES} <= measured["metrics"].keys() <= values["metrics"].keys()  # two questions, two types
    assert len(measured["sha256"]["model"]) == 64

    (tmp_path / "run" / "mine.txt").write_text("kept")
    clear(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_metric_row_takes_a_share_as_it_is_measured():
    rows = suite.metric_rows({"vqa_accuracy": proportion([True, False])}, "demo", {"step 0": {}})
    assert rows[0].references == {"step 0": None, "baseline": None} and rows[0].reached is False
