"""The microworld's parts from nothing, in a handful of steps each: every class is real, only the training is short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metamorph.errors import ComponentError
from metamorph.microworld.cards import read_card
from metamorph.microworld.components import PARTS, Build, build, check_gate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parts")
    build(Build(out, out / "training", size="tiny", scale=0.001, gates=False))
    return out


def test_every_part_is_there_with_its_card_in_half_precision(parts: Path) -> None:
    from safetensors.torch import load_file

    for name in PARTS:
        assert read_card(parts / name).name == name
    assert {value.dtype for value in load_file(parts / "llm" / "model.safetensors").values()} == {torch.float16}


def test_a_part_that_is_there_is_not_built_again(parts: Path) -> None:
    before = {name: (parts / name / "card.json").stat().st_mtime_ns for name in PARTS}
    build(Build(parts, parts / "training", size="tiny", scale=0.001))  # with gates: a second training would miss them
    assert {name: (parts / name / "card.json").stat().st_mtime_ns for name in PARTS} == before


def test_the_parts_become_a_model(parts: Path) -> None:
    from metamorph.messages import Message
    from metamorph.model.conversion import initialize
    from metamorph.pipeline import MetaMorphPipeline

    model, processor = initialize(parts / "llm", parts / "encoder", num_visual_tokens=16)
    reply = MetaMorphPipeline(model, processor)(Message.user("Where is the star?"), max_new_tokens=4)
    assert reply.reason in ("eos", "length")


def test_a_language_model_that_missed_its_gate_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match=r"names_in_text 0\.\d+ but at least 0.95 is needed"):
        build(Build(tmp_path, tmp_path / "training", size="tiny", scale=0.001), parts=("llm",))
    assert not (tmp_path / "llm" / "card.json").exists()


def test_a_gate_names_every_figure_that_misses() -> None:
    with pytest.raises(ComponentError, match=r"shape 0\.900 but at least 0\.97 is needed; size 0\.500 but"):
        check_gate("encoder", {"shape": 0.9, "size": 0.5, "colour": 1.0}, {"shape": 0.97, "size": 0.97, "colour": 0.97})
