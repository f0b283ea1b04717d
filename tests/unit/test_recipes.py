"""Recipes: the paper's numbers, names, and what `metamorph train` says without training."""

import pytest
from typer.testing import CliRunner

from metamorph.errors import ConfigError
from metamorph.recipes import RECIPES, load_recipe, metamorph_llama3_1_8b, microworld, microworld_demo, sd15_decoder
from metamorph.recipes.metamorph import paper_learning_rate
from metamorph.training.optim import learning_rate_factor


def test_learning_rates_follow_the_papers_rule():
    # docs/paper.md, section 4
    assert paper_learning_rate(768) == pytest.approx(4.90e-5, abs=5e-8)
    assert paper_learning_rate(448) == pytest.approx(3.74e-5, abs=5e-8)
    assert paper_learning_rate(1536) == pytest.approx(6.93e-5, abs=5e-8)


def test_the_papers_model():
    first, second = metamorph_llama3_1_8b().stages
    assert (first.training.batch_size, second.training.batch_size) == (768, 1536)
    assert first.train == ("projector",) and first.training.loss_weight("visual") == 0
    assert second.train is None and second.freeze == ("vision_encoder",) and second.training.loss_weight("visual") == 1
    for stage in (first, second):
        assert stage.data.max_length == 4096 and stage.data.epochs == 1
        assert (stage.training.warmup_ratio, stage.training.schedule, stage.training.weight_decay) == (0.03, "cosine", 0)


@pytest.mark.parametrize("recipe", [microworld, microworld_demo])
def test_the_microworlds_first_stage_aligns_the_projector_on_what_a_frozen_llm_can_say(recipe):
    config = recipe()
    first, second = config.stages
    assert first.train == ("projector",) and first.training.loss_weight("visual") == 0
    assert first.data.sources[0].kwargs["kinds"] == {"image_qa": 1.0}
    assert second.data is None and second.training.drawn_token_dropout == 1


def test_the_papers_decoder():
    training = sd15_decoder().stages[0].training
    assert training.warmup_steps == 2000 and training.batch_size == 2112
    assert learning_rate_factor(2000, training) == pytest.approx(1) and learning_rate_factor(14_000, training) == pytest.approx(0)
    assert learning_rate_factor(8_000, training) == pytest.approx(0.5)
    assert sd15_decoder().decoder.objective["condition_dropout"] == 0.7


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_found_by_its_name_and_survives_yaml(recipe, tmp_path):
    assert load_recipe(recipe.__name__) == recipe()
    recipe().save(tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe()


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'microworld_demo'"):
        load_recipe("microworld_dmo")


def metamorph(*arguments):
    from metamorph.cli.main import build_app

    return CliRunner().invoke(build_app(), ["train", *arguments])


def test_list_and_dry_run_of_the_papers_model():
    listed = metamorph("--list")
    assert all(recipe.__name__ in listed.output for recipe in RECIPES)
    shown = metamorph("metamorph_llama3_1_8b", "--dry-run", "--set", "stages.1.training.steps=10460")
    assert shown.exit_code == 0, shown.output
    for text in ("8,030,261,248", "428,225,600", "10,460 steps", "at most 6,291,456 tokens", "6.93e-05", "GiB"):
        assert text in shown.output, text


def test_the_plan_splits_all_but_what_every_process_keeps_whole():
    from metamorph.recipes.shapes import empty_model
    from metamorph.training.plan import BYTES_PER_WEIGHT, plan

    config = metamorph_llama3_1_8b()
    model = empty_model(config.model)
    one, eight = (plan(config, model, processes)[1].memory_bytes for processes in (1, 8))
    encoder = 428_225_600 * BYTES_PER_WEIGHT
    activations = 4096 * 4096 * 32 * 2  # what is kept of each layer with checkpointing, in half precision
    assert one - encoder - activations == pytest.approx(8 * (eight - encoder - activations), rel=1e-6)


def test_typos_on_the_command_line_are_config_errors():
    for arguments, name in (
        (["microworld_demo", "--set", "stages.0.training.step=1"], "steps"),
        (["microword"], "microworld"),
        ([], "--list"),
    ):
        result = metamorph(*arguments)
        assert isinstance(result.exception, ConfigError) and name in str(result.exception)
