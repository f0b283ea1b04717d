"""From a finished run to weights that ship: float16, the encoder stored once, a card with the measured scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from metamorph.errors import CheckpointError
from metamorph.microworld.cards import Card, write_card

EVALUATION = "evaluation.json"
_ON_THE_CARD = (
    "vqa_accuracy",
    "drawing_exact",
    "drawing_attribute_accuracy",
    "drawing_heldout_combinations",
    "token_skill",
    "edit_exact",
    "next_frame_exact",
    "thinking_crop_correct",
    "thinking_answer_accuracy",
    "text_perplexity_ratio",
    "names_in_text",
)


def save_shipped_model(run_dir: Path, out: Path) -> None:
    """Save the model of a finished run without its encoder, which lies beside it as `../encoder`, in float16.

    Raises:
        CheckpointError: the run has no model.
    """
    from metamorph.model.conversion import load, save_without_encoder

    model, processor = load(run_dir / "model")
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._name_or_path = ""  # where the parts lay on the machine that trained says nothing to anybody else
    save_without_encoder(model, processor, out, "../encoder", dtype=torch.float16)


def write_model_card(run_dir: Path, out: Path, report: dict[str, Any]) -> None:
    """Write the card and the whole evaluation beside the shipped weights.

    Raises:
        CheckpointError: the run directory has no settings.
    """
    import yaml

    settings = run_dir / "config.yaml"
    if not settings.is_file():
        raise CheckpointError(
            f"no {settings.name} but the settings of the run were expected ({run_dir}). Name the directory of a finished run."
        )
    config = yaml.safe_load(settings.read_text(encoding="utf-8"))
    stages = {stage["name"]: {**stage["training"], "data": stage["data"] or config["data"]} for stage in config["stages"]}
    how = {"recipe": config["name"], "seed": config["stages"][0]["training"]["seed"], "stages": stages}
    how["command"] = "metamorph train microworld, then metamorph microworld ship"
    scores = {name: report["metrics"][name]["value"] for name in _ON_THE_CARD}
    report = {**report, "command": "metamorph microworld ship"}
    (out / EVALUATION).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_card(out, Card("metamorph", "the microworld's model: the shipped LLM after both stages of VPiT", how, scores))
