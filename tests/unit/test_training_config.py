"""Settings: what is refused and how it is said, overrides, YAML, stages."""

import pytest
import yaml
from torch import nn

from metamorph.errors import ConfigError
from metamorph.training import DataConfig, ModelConfig, RunConfig, SourceConfig, StageConfig, TrainingConfig
from metamorph.training.config import parse_assignments
from metamorph.training.stages import count_parameters, paper_stages, select_trainable


def run_config(**changes) -> RunConfig:
    data = DataConfig(sources=(SourceConfig(source="some.module.source", kwargs={"size": 10}),))
    stages = paper_stages(TrainingConfig(steps=10), TrainingConfig(steps=20, learning_rate=2e-3))
    values = {"name": "test", "model": ModelConfig(llm="a", vision="b"), "data": data, "stages": stages}
    return RunConfig(**{**values, **changes})


def test_an_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'learnin_rate' but that is no field of TrainingConfig. Did you mean 'learning_rate'\?"):
        TrainingConfig(steps=1, learnin_rate=1.0)
    values = run_config().to_dict()
    values["stages"][1]["training"]["step"] = 5
    with pytest.raises(ConfigError, match=r"Did you mean 'steps'\? \(RunConfig.stages.1.training\)"):
        RunConfig(**values)


@pytest.mark.parametrize(
    "values", [{"steps": -1}, {"steps": "many"}, {"steps": 1, "schedule": "cosin"}, {"steps": 1, "learning_rate": -1.0}]
)
def test_a_value_that_does_not_fit_is_refused_with_its_place(values):
    with pytest.raises(ConfigError, match=r"TrainingConfig\.(steps|schedule|learning_rate)"):
        TrainingConfig(**values)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainingConfig(steps=1).steps = 2


def test_a_run_trains_exactly_one_thing_and_names_its_stages_apart():
    with pytest.raises(ConfigError, match="exactly one"):
        run_config(model=None)
    with pytest.raises(ConfigError, match="either llm and vision, or start"):
        ModelConfig(llm="a")
    stage = StageConfig(name="same", training=TrainingConfig(steps=1))
    with pytest.raises(ConfigError, match="a name of its own"):
        run_config(stages=(stage, stage))


def test_yaml_keeps_everything(tmp_path):
    config = run_config()
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config.to_dict(), "stage": []}))
    with pytest.raises(ConfigError, match=r"Did you mean 'stages'.*config.yaml"):
        RunConfig.load(tmp_path / "config.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    for name in ("broken.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=name):
            RunConfig.load(tmp_path / name)


def test_overrides_reach_every_leaf():
    changed = run_config().with_overrides(
        parse_assignments(
            ["stages.1.training.steps=7", "data.sources.0.kwargs.size=3", "name=other", "stages.0.training.loss_weights.caption=0.5"]
        )
    )
    assert changed.stages[1].training.steps == 7 and changed.name == "other"
    assert changed.data.sources[0].kwargs == {"size": 3}
    assert changed.stages[0].training.loss_weight("caption") == 0.5
    assert run_config().stages[1].training.steps == 20


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.1.training.stepz=7", r"Did you mean 'steps'"),
        ("stages.2.training.steps=7", "an index from 0 to 1"),
        ("name.first=7", "name has no fields"),
        ("stages.0.training.steps=lots", r"RunConfig.stages.0.training.steps"),
        ("stages=[1]", "a scalar was expected"),
        ("name", "field=value was expected"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(assignment, message):
    with pytest.raises(ConfigError, match=message):
        run_config().with_overrides(parse_assignments([assignment]))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model, self.vision_encoder, self.projector = (nn.Linear(2, 3), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        self.vision_head = nn.Linear(2, 1)


def trained(model: nn.Module) -> set[str]:
    return {name for name, (_, trained) in count_parameters(model).items() if trained}


def test_the_stages_of_the_paper():
    model = Parts()
    first, second = paper_stages(TrainingConfig(steps=1), TrainingConfig(steps=1))
    select_trainable(model, first.train, first.freeze)
    assert trained(model) == {"projector"} and first.training.loss_weight("visual") == 0 and first.training.loss_weight("text") == 1
    select_trainable(model, second.train, second.freeze)
    assert trained(model) == {"language_model", "projector", "vision_head"} and second.training.loss_weight("visual") == 1
    assert count_parameters(model)["vision_encoder"] == (6, 0)


def test_a_module_that_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'projector'"):
        select_trainable(Parts(), ["projecter"])
    with pytest.raises(ConfigError, match="something must be left to train"):
        select_trainable(Parts(), ["projector"], ["projector"])
