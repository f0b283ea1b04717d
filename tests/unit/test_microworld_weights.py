"""The weights that ship: small enough, described by their cards, and as good as the cards say on 100 fresh examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from metamorph.errors import ComponentError
from metamorph.microworld.cards import read_card, write_card
from metamorph.microworld.components import (
    GATED,
    WEIGHTS,
    load_encoder,
    microworld_vision,
    score_decoder,
    score_language_model,
    shipped,
)
from metamorph.microworld.probes import run_probes

SHIPPED = ("llm", "encoder", "decoder", "metamorph")
SAMPLES = 100
SLACK = 0.1  # a share of 100 examples lies within this of the card's figure far more often than not


def test_all_weights_together_stay_below_24_megabytes() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 24_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_each_part_has_a_card_that_belongs_to_its_weights(name: str) -> None:
    card = read_card(shipped(name))
    assert card.scores
    assert card.how["seed"] is not None


def test_the_shipped_model_speaks_the_tokens_of_the_shipped_language_model() -> None:
    """Measured before and after VPiT only make sense together if one comes from the other."""
    before, after = (AutoTokenizer.from_pretrained(shipped(name)).get_vocab() for name in ("llm", "metamorph"))
    assert before.items() <= after.items()


def test_weights_that_are_not_those_of_the_card_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_card(tmp_path, read_card(shipped("llm")))
    assert read_card(tmp_path).name == "llm"
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ComponentError, match="but the card says"):
        read_card(tmp_path)


def test_a_part_that_does_not_ship_is_refused_by_name() -> None:
    with pytest.raises(ComponentError, match="'decodr' but the package holds decoder, encoder, llm, metamorph"):
        shipped("decodr")


def test_the_language_model_knows_its_names() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(shipped("llm"), dtype=torch.float32, use_safetensors=True)
    scores = score_language_model(model, AutoTokenizer.from_pretrained(shipped("llm")), each=2, seed=11, scenes=SAMPLES)
    card = read_card(shipped("llm")).scores
    assert scores["names_in_text"] >= max(0.95, card["names_in_text"] - SLACK)
    assert scores["told_scenes"] >= card["told_scenes"] - SLACK
    assert scores["perplexity"] <= 1.1 * card["perplexity"]


def test_probes_read_every_gated_attribute_from_the_visual_tokens() -> None:
    siglip, _ = load_encoder(shipped("encoder"))
    scores = run_probes(microworld_vision(siglip), train=2000, test=SAMPLES, seed=12)
    card = read_card(shipped("encoder")).scores
    for name in GATED:
        assert card[name] >= 0.97
        assert scores[name] >= card[name] - 0.05, name


def test_the_decoder_draws_what_the_encoder_saw() -> None:
    from metamorph.decoder import VisualDecoderPipeline

    siglip, _ = load_encoder(shipped("encoder"))
    pipeline = VisualDecoderPipeline.from_pretrained(shipped("decoder"))
    scores = score_decoder(pipeline, microworld_vision(siglip), count=SAMPLES, seed=13)
    assert scores["reconstruction_exact"] >= read_card(shipped("decoder")).scores["reconstruction_exact"] - SLACK


def test_the_model_answers_and_draws_as_its_card_says() -> None:
    from metamorph.microworld.answering import vqa
    from metamorph.microworld.drawing import drawing
    from metamorph.microworld.subject import Subject
    from metamorph.pipeline import MetaMorphPipeline

    pipeline = MetaMorphPipeline.from_pretrained(shipped("metamorph"), shipped("decoder"), device="cpu")
    subject = Subject(pipeline, shipped("llm"))
    card = read_card(shipped("metamorph")).scores
    found = {**vqa(subject, SAMPLES, 14), **drawing(subject, SAMPLES, 14)}
    for name in ("vqa_accuracy", "drawing_exact", "drawing_attribute_accuracy", "token_skill"):
        assert found[name].value >= card[name] - SLACK, name
