"""Whole runs of a tiny model of the real classes: stages, resume across their border, saving, the cache, the decoder."""

import json

import pytest
import torch
from tests.tiny import save_parts

from metamorph.errors import ConfigError
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
        data=DataConfig(sources=(source,), max_length=128, **(data or {})),
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
        "cached": {"data": {"cached_images": 3, "cache_dir": str(tmp_path / "cache")}},
        "grouped": {"data": {"group_by_length": True}},
    }
    for name, change in variants.items():
        run(settings(parts, tmp_path / name, **change), tracker=quiet)
    for name in variants:
        for key in ("text_loss", "visual_loss"):
            assert column(tmp_path / name, key) == pytest.approx(column(tmp_path / "plain", key), rel=2e-3), name
    assert len(list((tmp_path / "cache").glob("*/*/*.safetensors"))) <= 6  # one for each different picture


def test_epochs_give_the_number_of_steps(parts, tmp_path):
    config = settings(parts, tmp_path, data={"order": "epoch"}).with_overrides(
        {"stages.0.training.steps": 0, "stages.1.training.steps": 3, "data.sources.0.kwargs.size": 20}
    )
    result = run(config, tracker=quiet)
    assert result.stages["projector"].step == 4  # 20 examples, 6 a step
    with pytest.raises(ConfigError, match="0 steps in stage 'projector'"):
        settings(parts, tmp_path, steps=(0, 1))


def test_bad_sources_are_named(parts, tmp_path):
    for assignment, message in (
        ({"data.sources.0.source": "tests.drawing_examples.drawing"}, "Did you mean 'drawings'"),
        ({"data.sources.0.source": "tests.nowhere.drawings"}, "a dotted path"),
        ({"data.sources.0.kwargs.colour": 3}, "must fit tests.drawing_examples.drawings"),
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
    images = pipeline(torch.randn(2, 4, 24), num_inference_steps=2, seeds=[0, 1], output_type="pt")
    assert images.shape == (2, 3, 16, 16) if isinstance(images, torch.Tensor) else True
    assert column(tmp_path / "run", "decoder_loss")
