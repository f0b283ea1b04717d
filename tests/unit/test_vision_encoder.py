"""What a visual token is, for every family of encoders, against the steps written out."""

import pytest
import torch
from transformers import CLIPVisionConfig, Dinov2Config, Dinov2WithRegistersConfig, LlamaConfig, Siglip2VisionConfig, SiglipVisionConfig
from transformers.utils import logging

from metamorph.errors import CheckpointError, ConfigError
from metamorph.model import MetaMorphConfig, VisionEncoder
from metamorph.model.vision_encoder import load_vision_model

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "siglip": SiglipVisionConfig(**SIZES, intermediate_size=48, image_size=32, patch_size=8),
    "siglip2": Siglip2VisionConfig(**SIZES, intermediate_size=48, num_patches=16, patch_size=8),
    "clip": CLIPVisionConfig(**SIZES, intermediate_size=48, image_size=32, patch_size=8),
    "dinov2": Dinov2Config(**SIZES, image_size=32, patch_size=8),
    "dinov2 with registers": Dinov2WithRegistersConfig(**SIZES, image_size=32, patch_size=8, num_register_tokens=3),
}


def make(family: str = "siglip", **settings) -> VisionEncoder:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=32)
    return VisionEncoder(MetaMorphConfig(text_config=text, vision_config=FAMILIES[family], **{"num_visual_tokens": 4} | settings))


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_k_tokens_of_norm_one_in_raster_order(family):
    encoder = make(family, num_visual_tokens=16)
    tokens = encoder(images())
    assert tokens.shape == (2, 16, 24)
    assert torch.allclose(tokens.norm(dim=-1), torch.ones(2, 16), atol=1e-5)
    # The token of a place changes most when that place does: 4 x 4 patches, one token each.
    changed = images()
    changed[:, :, 16:24, 8:16] += 3.0  # row 2, column 1
    assert (encoder(changed) - tokens).norm(dim=-1).argmax(dim=1).tolist() == [9, 9]


def test_siglip_tokens_are_the_last_block_pooled_bilinearly_then_normalised():
    encoder = make(num_visual_tokens=4)
    states = []
    hook = encoder.encoder.encoder.layers[-1].register_forward_hook(lambda *args: states.append(args[-1]))
    tokens = encoder(images(1))
    hook.remove()
    grid = states[0].view(4, 4, 24)
    # From 4 to 2 cells the centres lie at 0.5 and 2.5: each token is the mean of the four patches around it.
    corners = [grid[r : r + 2, c : c + 2].mean(dim=(0, 1)) for r in (0, 2) for c in (0, 2)]
    expected = torch.stack([corner / corner.norm() for corner in corners])
    assert torch.allclose(tokens[0], expected, atol=1e-5)


def test_bilinear_reads_only_some_patches_and_area_reads_all():
    grid = torch.randn(1, 5, 5, 24, generator=torch.Generator().manual_seed(2))
    bilinear, area = make(normalize_visual_tokens=False), make(normalize_visual_tokens=False, pooling="area")
    # From 5 to 2 the source coordinates are 0.75 and 3.25.
    rows = 0.25 * grid[0, 0] + 0.75 * grid[0, 1]
    assert torch.allclose(bilinear.pool(grid)[0, 0], 0.25 * rows[0] + 0.75 * rows[1], atol=1e-6)
    assert torch.allclose(area.pool(grid)[0, 0], grid[0, :3, :3].mean(dim=(0, 1)), atol=1e-6)


def test_settings_change_the_tokens():
    plain = make()(images())
    for settings in ({"vision_feature_layer": -2}, {"vision_post_layernorm": True}, {"normalize_visual_tokens": False}):
        assert not torch.allclose(make(**settings)(images()), plain, atol=1e-3), settings


def test_post_layernorm_is_the_encoders_own():
    encoder = make(vision_post_layernorm=True, num_visual_tokens=16, normalize_visual_tokens=False)
    assert torch.allclose(encoder(images()), encoder.encoder(images()).last_hidden_state, atol=1e-5)


def test_it_is_frozen_and_stays_in_evaluation_mode():
    encoder = make().train()
    assert not encoder.encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(images().requires_grad_()).requires_grad


def test_autocast_does_not_change_what_a_visual_token_is():
    encoder = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder(images())
    assert torch.equal(inside, encoder(images()))


def test_fingerprint_follows_settings_and_weights():
    encoder = make()
    assert encoder.fingerprint() == make().fingerprint()
    others = [make(pooling="area"), make(vision_feature_layer=-2), make(num_visual_tokens=16), make("clip")]
    assert len({other.fingerprint() for other in others} | {encoder.fingerprint()}) == 5
    with torch.no_grad():
        next(encoder.encoder.parameters()).mul_(1.5)
    assert encoder.fingerprint() != make().fingerprint()


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match="num_visual_tokens=10 but a square number"):
        make(num_visual_tokens=10)
    with pytest.raises(ConfigError, match="pooling='max' but one of bilinear, area"):
        make(pooling="max")


@pytest.mark.parametrize("two_towers", [False, True])
def test_the_tower_loads_from_a_checkpoint_of_one_tower_or_two(tmp_path, two_towers, caplog):
    from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionModel

    torch.manual_seed(3)
    text = SiglipTextConfig(vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vision = FAMILIES["siglip"]
    config = SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = SiglipModel(config) if two_towers else SiglipVisionModel(vision)
    model.save_pretrained(tmp_path)
    level = logging.get_verbosity()
    tower = load_vision_model(tmp_path)
    assert "UNEXPECTED" not in caplog.text and logging.get_verbosity() == level  # the other tower is nobody's concern
    wanted = (model.vision_model if two_towers else model).state_dict()
    assert {name: value.tolist() for name, value in tower.state_dict().items()} == {name: value.tolist() for name, value in wanted.items()}


def test_an_encoder_that_is_not_there_or_only_in_pickle_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a vision encoder in safetensors was expected"):
        load_vision_model(tmp_path)
    FAMILIES["siglip"].save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_vision_model(tmp_path)
