"""Shapes of published models: every file names its source, builds without weights, and has as many parameters as its sizes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from metamorph.recipes.shapes import CONFIGS, empty_model
from metamorph.training.config import ModelConfig

SHAPES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("*.json"))}
LLMS = [name for name, shape in SHAPES.items() if "num_key_value_heads" in shape["config"]]
ENCODERS = [name for name, shape in SHAPES.items() if "patch_size" in shape["config"]]
SD15 = "stable_diffusion_1_5"

# As the model cards of the publishers give them: "8.03B", "70.6B", "1.23B", "3.21B"; Qwen3 "0.6B", "4.0B", "8.2B"; SmolLM3 "3.08B".
PUBLISHED = {
    "llama3_8b": 8.03e9, "llama3_1_8b": 8.03e9, "llama3_70b": 70.6e9, "llama3_1_70b": 70.6e9, "llama3_2_1b": 1.23e9, "llama3_2_3b": 3.21e9,
    "qwen3_0_6b": 0.6e9, "qwen3_4b": 4.0e9, "qwen3_8b": 8.2e9, "smollm3_3b": 3.08e9,
}  # fmt: skip


def parameters(module: torch.nn.Module) -> int:
    assert all(value.is_meta for value in module.parameters())
    return sum(value.numel() for value in module.parameters())


def llm_parameters(config: dict) -> int:
    """Embeddings, then per layer q and o, k and v, three matrices of the MLP and two norms; a last norm; an untied head."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    attention = 2 * width * heads * head + 2 * width * config["num_key_value_heads"] * head
    norms = 2 * width + (2 * head if config["model_type"] == "qwen3" else 0)  # Qwen3 normalises queries and keys
    layer = attention + 3 * width * config["intermediate_size"] + norms
    matrices = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + width + matrices * config["vocab_size"] * width


def siglip_parameters(config: dict) -> int:
    """Patch and position embeddings, per layer four matrices, the MLP and two norms; a last norm; the pooling head."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = config.get("num_patches") or (config["image_size"] // patch) ** 2
    attention, mlp, norm = 4 * (width * width + width), 2 * width * inner + width + inner, 2 * width
    head = width + attention + norm + mlp
    return 3 * patch**2 * width + width + positions * width + config["num_hidden_layers"] * (attention + mlp + 2 * norm) + norm + head


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_names_its_source_and_where_it_was_seen(name: str):
    shape = SHAPES[name]
    assert set(shape) == {"source", "described_in", "seen_in", "config"}
    assert shape["described_in"].startswith(f"https://huggingface.co/{shape['source']}/")
    assert shape["seen_in"] and all(place.startswith("https://") for place in shape["seen_in"])
    assert sum(other["source"] == shape["source"] for other in SHAPES.values()) == 1


def test_the_families_of_the_paper_and_around_it_are_there():
    assert len(LLMS) == 10 and len(ENCODERS) == 3 and SD15 in SHAPES
    assert set(PUBLISHED) == set(LLMS)


@pytest.mark.parametrize("llm", LLMS)
def test_every_llm_joins_the_papers_encoder_with_the_known_number_of_parameters(llm: str):
    shape = SHAPES[llm]
    model = empty_model(ModelConfig(llm=shape["source"], vision=SHAPES["siglip_so400m_384"]["source"]))
    found = parameters(model.language_model)
    assert found == llm_parameters(shape["config"])
    assert found == pytest.approx(PUBLISHED[llm], rel=0.01)
    assert parameters(model.vision_encoder) == 428_225_600
    width, visual = shape["config"]["hidden_size"], 1152
    assert parameters(model.projector) == visual * width + width + width * width + width


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_joins_an_llm_with_the_known_number_of_parameters(encoder: str):
    shape = SHAPES[encoder]
    model = empty_model(ModelConfig(llm=SHAPES["qwen3_0_6b"]["source"], vision=shape["source"]))
    assert parameters(model.vision_encoder) == siglip_parameters(shape["config"])


def test_stable_diffusion_builds_with_the_known_number_of_parameters():
    from metamorph.decoder.library import AutoencoderKL, UNet2DConditionModel

    config = SHAPES[SD15]["config"]
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(config["unet"]), AutoencoderKL.from_config(config["vae"])
    assert parameters(unet) == 859_520_964  # the original code prints "DiffusionWrapper has 859.52 M params."
    assert parameters(vae) == 83_653_863
    assert config["unet"]["cross_attention_dim"] == 768 and config["vae"]["scaling_factor"] == 0.18215


def test_a_dry_run_of_another_llm_needs_no_network():
    from metamorph.cli.main import build_app

    names = {"model.llm": "Qwen/Qwen3-8B", "model.vision": "google/siglip2-so400m-patch14-384"}
    settings = [argument for name, value in names.items() for argument in ("--set", f"{name}={value}")]
    shown = CliRunner().invoke(build_app(), ["train", "metamorph_llama3_1_8b", "--dry-run", *settings])
    assert shown.exit_code == 0, shown.output
    assert f"{llm_parameters(SHAPES['qwen3_8b']['config']):,}" in shown.output and "428,225,600" in shown.output


def test_a_dry_run_of_the_papers_decoder_needs_no_weights_of_stable_diffusion():
    from metamorph.cli.main import build_app
    from metamorph.microworld.components import shipped

    arguments = ["train", "sd15_decoder", "--dry-run", "--set", f"decoder.encoder={shipped('metamorph')}"]
    shown = CliRunner().invoke(build_app(), arguments)
    assert shown.exit_code == 0, shown.output
    for count in ("859,520,964", "83,653,863"):
        assert count in shown.output, shown.output


def test_shapes_ship_with_the_package():
    import metamorph.recipes

    assert CONFIGS.is_relative_to(Path(metamorph.recipes.__path__[0]))
