"""Whole runs of a tiny model of the real classes: stages, resume across their border, saving, the cache, the decoder."""

import json
from pathlib import Path

import pytest
import torch
from tests.tiny import save_parts
from typer.testing import CliRunner

from metamorph.errors import ConfigError, MetaMorphError
from metamorph.model.card import add_results
from metamorph.training import DataConfig, DecoderConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from metamorph.training.config import StageConfig
from metamorph.training.run import run
from metamorph.training.stages import paper_stages
from metamorph.training.trackers import SilentTracker, read_metrics

PLAIN = {"precision": "float32", "log_every": 1, "device": "cpu", "batch_size": 6, "micro_batch_size": 3, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


def settings(parts, path, *, steps=(3, 5), data=None, **training) -> RunConfig:
    plain = PLAIN | training
    source = SourceConfig(source="tests.drawing_examples.drawings", kwargs={"colours": 6})
    return RunConfig(
        name="tiny",
        output_dir=str(path),
        model=ModelConfig(llm=str(parts[0]), vision=str(parts[1]), overrides={"num_visual_tokens": 4}),
        data=DataConfig(**{"sources": (source,), "order": "infinite", "max_length": 128, **(data or {})}),
        stages=paper_stages(TrainingConfig(steps=steps[0], **plain), TrainingConfig(steps=steps[1], checkpoint_every=2, **plain)),
    )


def quiet(stage) -> SilentTracker:
    return SilentTracker()


def rows(path) -> list[dict]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(path / "metrics.jsonl")]


def column(path, key) -> list[float]:
    return [row[key] for row in rows(path)]


def test_stages_train_what_the_paper_trains(parts, tmp_path):
    states = {}

    def keep(name, model, processor):
        states[name] = {key: value.clone() for key, value in model.state_dict().items()}

    result = run(settings(parts, tmp_path), on_stage=keep, tracker=quiet)

    def changed(a, b):
        return {key.split(".")[0] for key in states[a] if not torch.equal(states[a][key], states[b][key])}

    assert changed("start", "projector") == {"projector"}
    assert changed("projector", "vpit") == {"language_model", "projector", "vision_head"}
    assert [row["stage"] for row in rows(tmp_path)] == ["projector"] * 3 + ["vpit"] * 5
    first = rows(tmp_path)[0]
    assert first["loss"] == first["text_loss"] and first["visual_loss"] is not None  # switched off, but told

    from metamorph.model.conversion import load

    model, processor = load(result.model_dir)
    assert all(torch.equal(value, states["vpit"][key]) for key, value in model.state_dict().items())
    assert processor.num_visual_tokens == 4
    assert RunConfig.load(tmp_path / "config.yaml") == settings(parts, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["stages"]["vpit"]["steps"] == 5


class Stop(Exception):
    pass


class StopAt(SilentTracker):
    def __init__(self, stage, name, step):
        self.here, self.step = stage.name == name, step

    def log(self, row):
        if self.here and row["step"] == self.step:
            raise Stop


@pytest.mark.parametrize(("name", "step"), [("projector", 2), ("vpit", 1), ("vpit", 4)])
def test_a_run_resumes_within_and_between_stages(parts, tmp_path, name, step):
    run(settings(parts, tmp_path / "whole"), tracker=quiet)
    config = settings(parts, tmp_path / "cut")
    with pytest.raises(Stop):
        run(config, tracker=lambda stage: StopAt(stage, name, step))
    run(config, resume=True, tracker=quiet)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_run_with_other_settings_is_not_resumed(parts, tmp_path):
    run(settings(parts, tmp_path, steps=(1, 1)), tracker=quiet)
    with pytest.raises(ConfigError, match=r"stages.1.training.steps=2 \(1 settings differ\) but the run to resume had 1"):
        run(settings(parts, tmp_path, steps=(1, 2)), resume=True, tracker=quiet)


def test_packing_accumulation_and_cache_leave_the_losses_alone(parts, tmp_path):
    variants = {
        "plain": {},
        "packed": {"data": {"pack": True}},
        "whole": {"micro_batch_size": None},
        "cached": {"data": {"cached_images": 3}},
        "grouped": {"data": {"group_by_length": True}},
    }
    for name, change in variants.items():
        run(settings(parts, tmp_path / name, **change), tracker=quiet)
    for name in variants:
        for key in ("text_loss", "visual_loss"):
            assert column(tmp_path / name, key) == pytest.approx(column(tmp_path / "plain", key), rel=2e-3), name


def test_epochs_give_the_number_of_steps(parts, tmp_path):
    config = settings(parts, tmp_path, data={"order": "epoch"}).with_overrides(
        {"stages.0.training.steps": 0, "stages.1.training.steps": 3, "data.sources.0.kwargs.size": 20}
    )
    result = run(config, tracker=quiet)
    assert result.stages["projector"].step == 4  # 20 examples, 6 a step
    with pytest.raises(ConfigError, match="0 steps in stage 'projector'"):
        settings(parts, tmp_path, steps=(0, 1))
    with pytest.raises(ConfigError, match=r"11 steps but at most 10 .1 epoch of 60 examples, 6 a step"):
        run(settings(parts, tmp_path / "short", steps=(11, 1), data={"order": "epoch"}), tracker=quiet)


def test_bad_sources_are_named(parts, tmp_path):
    for assignment, message in (
        ({"data.sources.0.source": "tests.drawing_examples.drawing"}, "Did you mean 'drawings'"),
        ({"data.sources.0.source": "tests.nowhere.drawings"}, "a dotted path"),
        ({"data.sources.0.kwargs.colour": 3}, r"no argument. Did you mean .colours.. .tests.drawing_examples.drawings kwargs"),
        ({"data.sources.0.source": "json.dumps", "data.sources.0.kwargs": {"obj": 1}}, "an ExampleSource was expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(settings(parts, tmp_path).with_overrides(assignment), tracker=quiet)


def test_a_finished_run_says_on_the_card_how_it_was_trained(parts, tmp_path):
    config = settings(parts, tmp_path / "run", steps=(1, 2)).with_overrides({"license": "mit"})
    path = run(config, tracker=quiet).model_dir / "README.md"
    assert add_results(path, {"metrics": {"drawing_exact": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 40}}, "protocol": {"seed": 0}})
    run(config, resume=True, tracker=quiet)  # finished already: the same weights, so the results stay
    card = path.read_text()
    assert "license: mit" in card and "# tiny" in card and "| drawing_exact | 0.250 | 0.200 to 0.300 | 40 |" in card
    assert "- stage `vpit`: 2 steps of 6 sequences; trains everything but vision_encoder; adamw" in card
    assert '`tests.drawing_examples.drawings` with `{"colours": 6}`' in card
    assert "torch 2." in card and str(tmp_path) not in card and str(parts[0].parent) not in card


def test_a_decoder_run(parts, tmp_path):
    from metamorph.decoder import VisualDecoderPipeline, build_denoiser, build_scheduler
    from metamorph.model.conversion import initialize
    from metamorph.training.rehearsal import rehearse

    model, processor = initialize(*parts, num_visual_tokens=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    unet = build_denoiser(image_size=16, patch=2, context_width=16, channels=(16, 16), attention=(False, True))
    unet.save_pretrained(tmp_path / "base/unet")
    build_scheduler("flow").save_pretrained(tmp_path / "base/scheduler")
    decoder = DecoderConfig(
        encoder=str(tmp_path / "model"),
        base=str(tmp_path / "base"),
        conditioner={"hidden_size": 16, "map_channels": 4, "map_hidden_size": 16},
        batches=SourceConfig(source="tests.drawing_examples.decoder_batches"),
        ema_decay=0.9,
    )
    stage = StageConfig(name="decoder", training=TrainingConfig(steps=4, **PLAIN))
    config = RunConfig(name="tiny-decoder", output_dir=str(tmp_path / "run"), decoder=decoder, stages=(stage,))
    result = run(config, tracker=quiet)
    pipeline = VisualDecoderPipeline.from_pretrained(result.model_dir)
    assert "decoder_batches: the first 3 images were prepared, 16 x 16 pixels" in rehearse(config).rows["decoder"][0]
    images = pipeline(torch.randn(2, 4, 24), num_inference_steps=2, seeds=[0, 1], output_type="pt")
    assert images.shape == (2, 3, 16, 16) if isinstance(images, torch.Tensor) else True
    assert column(tmp_path / "run", "decoder_loss")


def command(*arguments: str):
    from metamorph.cli.main import build_app

    return CliRunner().invoke(build_app(), ["train", *arguments])


@pytest.fixture
def recipe(parts, tmp_path) -> Path:
    settings(parts, tmp_path / "run").save(tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def test_a_dry_run_opens_the_data_and_leaves_nothing_behind(recipe, parts, tmp_path):
    shown = command(str(recipe), "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("drawings: 60 rows; the first 3 were encoded: at most ") == 2
    assert not (tmp_path / "run").exists()
    epochs = settings(parts, tmp_path / "run", steps=(3, 4), data={"order": "epoch"}).with_overrides(
        {"stages.0.training.steps": 0, "data.sources.0.kwargs.size": 20}
    )
    epochs.save(recipe)
    assert "stage projector: 4 steps" in command(str(recipe), "--dry-run").output  # 20 examples, 6 a step: known now


def test_a_dry_run_raises_what_the_run_would(recipe, parts, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello " * 200}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    source = "metamorph.data.source.open_source"
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(line) + "\n")
    for kwargs in ({"path": str(tmp_path / "missing.jsonl")}, *({"path": str(tmp_path / f"{number}.jsonl")} for number in range(2))):
        broken = settings(parts, tmp_path / "run").to_dict()
        broken["data"]["sources"] = [{"source": source, "kwargs": kwargs}]
        config = RunConfig(**broken)
        config.save(recipe)
        refused = command(str(recipe), "--dry-run").exception
        with pytest.raises(MetaMorphError) as raised:
            run(config, tracker=quiet)
        assert (type(refused), str(refused)) == (type(raised.value), str(raised.value))


def test_a_dry_run_passes_over_bad_rows_where_the_run_would(recipe, parts, tmp_path):
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "rows.jsonl").write_text(row + "no JSON\n" + row * 10)
    skipping = settings(parts, tmp_path / "run").to_dict()
    skipping["data"] |= {"on_bad_record": "skip"}
    skipping["data"]["sources"] = [{"source": "metamorph.data.source.open_source", "kwargs": {"path": str(tmp_path / "rows.jsonl")}}]
    RunConfig(**skipping).save(recipe)
    shown = command(str(recipe), "--dry-run").output.replace("\n", " ")
    assert "rows: 12 rows; 1 of the first 3 cannot be used and would be skipped: a row that is no JSON" in shown and "rows.jsonl:2" in shown


def test_a_dry_run_without_the_models_parts_plans_and_says_what_was_not_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 2)
    path = "data.sources.0.kwargs.path"
    shown = command("metamorph_llama3_1_8b", "--dry-run", "--set", f"stages.0.{path}={tmp_path / 'rows.jsonl'}")
    assert shown.exit_code == 0, shown.output
    absent = "meta-llama/Llama-3.1-8B-Instruct and google/siglip-so400m-patch14-384 are not on this machine"
    assert f"rows: 2 rows, not encoded: {absent}" in shown.output
    assert "rows not opened: a file that cannot be read" in shown.output and "8,030,261,248" in shown.output


class Interrupted(SilentTracker):
    """Ctrl-C at step 3 of the second stage."""

    def __init__(self, stage, steps):
        self.stage = stage

    def log(self, row):
        if (self.stage, row["step"]) == ("vpit", 3):
            raise KeyboardInterrupt


def test_ctrl_c_says_where_training_stopped_and_how_it_goes_on(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("metamorph.training.loop.TerminalTracker", Interrupted)
        stopped = command(str(recipe))
    assert stopped.exit_code == 130
    told = f"Stopped. The last checkpoint is of stage vpit, step 2. Go on with: metamorph train {tmp_path / 'run' / 'config.yaml'} --resume"
    assert told in stopped.stderr
    resumed = command(*told.partition("metamorph train ")[2].split())
    assert resumed.exit_code == 0, resumed.output
    assert f"saved {tmp_path / 'run' / 'model'}" in resumed.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["vpit"]["steps"] == 5


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_is_kept(recipe, monkeypatch):
    monkeypatch.setattr(Interrupted, "log", lambda self, row: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("metamorph.training.loop.TerminalTracker", Interrupted)
    stopped = command(str(recipe))
    assert stopped.exit_code == 130 and "Stopped before the first checkpoint" in stopped.stderr


def test_a_device_of_a_later_stage_is_looked_for_before_the_first_one_trains(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = settings(parts, tmp_path / "run").with_overrides({"stages.1.training.device": "cuda"})
    with pytest.raises(ConfigError, match="device 'cuda' asked for but this machine has"):
        run(config, tracker=quiet)
    assert not (tmp_path / "run").exists()
