"""The model card: said is what is known, unknown is called unknown, nobody's card is overwritten, no path gets out."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tests.tiny import save_parts

from metamorph.model import MetaMorph, initialize
from metamorph.model.card import CARD, MARK, CardFacts, add_results, build_card, is_ours, origin_of, without_paths, write_card
from metamorph.model.weight_files import weight_files, weights_digest
from metamorph.provenance import public_name
from metamorph.training.config import RunConfig
from metamorph.training.publication import facts_of_run

REPORT = {
    "dataset": "microworld",
    "command": "metamorph evaluate",
    "metrics": {
        "drawing_exact": {"value": 0.9375, "low": 0.91, "high": 0.95, "n": 500},
        "vqa_accuracy/colour": {"value": 1.0, "low": 0.9, "high": 1.0, "n": 60},
    },
    "protocol": {"seed": 0, "decoding": "greedy"},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The LLM comes with a card of its own that names a licence; the encoder without."""
    root = tmp_path_factory.mktemp("secret-place")
    llm, vision = save_parts(root)
    (llm / CARD).write_text("---\nlicense: other\nlicense_name: tiny-license\n---\n# A tiny LLM\n")
    return llm, vision


@pytest.fixture(scope="module")
def model(parts):
    return initialize(*parts, num_visual_tokens=4)[0]


def test_a_saved_model_has_a_card_of_what_is_known(model, parts, tmp_path):
    model.save_pretrained(tmp_path / "stars" / "model")
    text = (tmp_path / "stars" / "model" / CARD).read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("metamorph", "any-to-any", "unknown")
    assert card.data.base_model is None and card.data.eval_results is None
    assert "# stars" in text and "4 visual tokens" in text
    assert "| language model | a local directory, `llm` | tiny-license |" in text
    assert "| vision encoder | a local directory, `vision` | unknown |" in text
    assert "Unknown: none was given." in text and "Nothing is recorded about its training." in text and "No results are recorded." in text


def test_where_the_parts_lay_is_in_no_file(model, parts, tmp_path):
    model.save_pretrained(tmp_path)
    again = MetaMorph.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        for name in ("config.json", "generation_config.json", CARD):
            assert "secret-place" not in (directory / name).read_text(), name
            assert str(tmp_path) not in (directory / name).read_text(), name
    assert again.config.origins == {
        "llm": {"name": "./llm", "license": "tiny-license"},
        "vision": {"name": "./vision", "license": "unknown"},
    }
    assert (tmp_path / "again" / CARD).exists()


def test_names_on_the_hub_are_base_models(model, tmp_path):
    config = MetaMorph.config_class.from_dict(model.config.to_dict())
    config.origins = {
        "llm": {"name": "meta-llama/Llama-3.1-8B-Instruct", "license": "llama3.1"},
        "vision": {"name": "google/siglip-so400m-patch14-384", "license": "apache-2.0"},
    }
    facts = CardFacts("Stars", license="llama3.1", datasets=("me/stars",), training={"recipe": "stars"}, evaluation=REPORT)
    card = build_card(config, facts, tmp_path)
    assert card.data.base_model == ["meta-llama/Llama-3.1-8B-Instruct", "google/siglip-so400m-patch14-384"]
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.license == "llama3.1" and card.data.datasets == ["me/stars"]
    (result,) = card.data.eval_results  # not the single kinds
    assert (result.metric_type, result.metric_value, result.metric_args["n"]) == ("drawing_exact", 0.9375, 500)
    assert (result.dataset_name, result.dataset_args) == ("microworld", {"seed": 0, "decoding": "greedy"})
    assert "| drawing_exact | 0.938 | 0.910 to 0.950 | 500 |" in card.text and "- recipe: stars" in card.text
    config.origins = None
    assert "| language model | unknown | unknown |" in build_card(config, CardFacts(), tmp_path).text


def test_a_card_of_ones_own_stays(model, tmp_path):
    (tmp_path / CARD).write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert not write_card(tmp_path, model.config, CardFacts(license="mit"))
    assert not add_results(tmp_path / CARD, REPORT)
    assert (tmp_path / CARD).read_text() == "# Mine\n"


def test_our_card_grows_with_what_is_known(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert write_card(tmp_path, model.config, CardFacts("Stars", training={"recipe": "a \\1 recipe"}))
    model.save_pretrained(tmp_path)  # saving again tells nothing new
    for value in (0.5, 0.9375):
        report = json.loads(json.dumps(REPORT))
        report["metrics"]["drawing_exact"]["value"] = value
        assert add_results(tmp_path / CARD, report)
    card = ModelCard.load(tmp_path / CARD)
    assert is_ours(tmp_path / CARD)
    assert [result.metric_value for result in card.data.eval_results] == [0.9375]
    assert card.text.count("drawing_exact") == 1 and "0.500" not in card.text
    assert "a \\1 recipe" in card.text and "No results" not in card.text and "## Licence" in card.text


def test_public_names(tmp_path):
    snapshot = tmp_path / "models--me--star" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert public_name(snapshot) == "me/star"
    assert public_name(tmp_path / "models--me--star") == "./models--me--star"
    assert public_name("me/star") == "me/star"
    assert without_paths({"path": str(tmp_path / "rows.jsonl"), "size": 3, "list": ["data/rows.jsonl"]}) == {
        "path": "rows.jsonl",
        "size": 3,
        "list": ["data/rows.jsonl"],
    }


def test_paths_that_lead_elsewhere_are_shortened():
    for path in ("/secret/rows.jsonl", "~/secret/rows.jsonl", "~me/secret/rows.jsonl", "../secret/rows.jsonl", "data/../../rows.jsonl"):
        assert without_paths(path) == "rows.jsonl"
    assert without_paths(["C:\\secret\\rows.jsonl", "file:///secret/rows.jsonl"]) == ["rows.jsonl", "rows.jsonl"]
    for text in ("~ two words", "~", "data/rows.jsonl", "hf://datasets/me/rows", "https://host/rows", "red. .. blue", "me/rows"):
        assert without_paths(text) == text


def test_a_recipe_with_paths_has_a_card(model, tmp_path):
    """What a run's settings can hold, its card can say."""
    source = {"source": "rows.read", "kwargs": {"path": Path("../secret/rows.jsonl"), "prompt": "~ two words"}}
    stage = {"name": "one", "training": {"steps": 1}}
    config = RunConfig(name="run", model={"llm": "llm", "vision": "vision"}, data={"sources": [source]}, stages=[stage])
    config.save(tmp_path / "config.yaml")
    text = build_card(model.config, facts_of_run(config, {}), tmp_path).text
    assert '`rows.read` with `{"path": "rows.jsonl", "prompt": "~ two words"}`' in text


def test_the_command_of_an_evaluation_names_no_directory(model, tmp_path):
    facts = CardFacts(evaluation={**REPORT, "command": "metamorph evaluate --model /secret/model --llm=../secret/llm"})
    assert "- command: metamorph evaluate --model model --llm=llm" in build_card(model.config, facts, tmp_path).text


def test_a_card_whose_metadata_do_not_read_stops_nothing(model, parts, tmp_path):
    broken = "---\nlicense: [mit\nx: : y\n---\n"
    (parts[1] / CARD).write_text(broken)
    assert origin_of(parts[1]) == {"name": "./vision", "license": "unknown"}
    (parts[1] / CARD).unlink()
    (tmp_path / CARD).write_text(f"{broken}{MARK}\n")
    assert not add_results(tmp_path / CARD, REPORT)


def test_results_stay_with_the_weights_they_were_measured_on(model, tmp_path):
    model.save_pretrained(tmp_path)
    facts = CardFacts("Stars", training={"recipe": "stars"})
    assert write_card(tmp_path, model.config, facts)
    assert add_results(tmp_path / CARD, REPORT)
    told = (tmp_path / CARD).read_text()
    loaded = MetaMorph.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == told
    assert write_card(tmp_path, model.config, facts)  # a finished run, resumed
    assert ModelCard.load(tmp_path / CARD).data.eval_results[0].metric_value == 0.9375
    assert (tmp_path / CARD).read_text() == told

    loaded.projector.requires_grad_(False)
    next(loaded.projector.parameters()).add_(1)
    loaded.save_pretrained(tmp_path / "changed")
    loaded.save_pretrained(tmp_path)
    for directory in (tmp_path, tmp_path / "changed"):
        text = (directory / CARD).read_text()
        assert is_ours(directory / CARD) and "drawing_exact" not in text and "recipe: stars" not in text
    assert f"| started as | a local directory, `{tmp_path.name}` | unknown |" in (tmp_path / "changed" / CARD).read_text()
    (tmp_path / CARD).write_text(told)  # as if other weights had been put beside it
    assert add_results(tmp_path / CARD, REPORT)
    text = (tmp_path / CARD).read_text()
    assert "drawing_exact" in text and "recipe: stars" not in text


def test_weights_are_known_again_in_other_files_and_types(model, tmp_path):
    half = MetaMorph(model.config).half()
    half.save_pretrained(tmp_path / "half")
    digest = weights_digest(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert len(weight_files(tmp_path / "cut")) > 1
    assert weights_digest(tmp_path / "cut") == digest
    model.save_pretrained(tmp_path / "other")
    assert weights_digest(tmp_path / "other") != digest
    weight_files(tmp_path / "cut")[0].unlink()
    assert weights_digest(tmp_path / "cut") is None and weights_digest(tmp_path) is None
