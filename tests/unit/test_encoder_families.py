"""Encoders of every family as directories on disk: which states become visual tokens, grids that do not divide, settings, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from tests.families import IMAGE, PATCH, VISION_WIDTH, VISIONS, llm_directory, vision_directory
from transformers import AutoConfig, AutoModel, LlamaConfig

from metamorph.errors import AlignmentError, CheckpointError, ConfigError
from metamorph.model import MetaMorphConfig, VisionEncoder, initialize
from metamorph.model.conversion import read_image_settings
from metamorph.model.vision_encoder import flat_patches, load_vision_model

SIDE = IMAGE // PATCH


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


def load_encoder(directory, **settings) -> VisionEncoder:
    tower = load_vision_model(directory)
    encoder = VisionEncoder(MetaMorphConfig(text_config=LlamaConfig(hidden_size=32), vision_config=tower.config, **settings))
    encoder.encoder.load_state_dict(tower.state_dict())
    return encoder.eval()


def images(side: int = IMAGE, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def last_block(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """What the encoder's last block returns, taken where it is made."""
    layers = next(module for name, module in encoder.encoder.named_modules() if name.endswith((".layers", ".layer")))
    kept = []
    hook = layers[-1].register_forward_hook(lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output))
    try:
        encoder(pixels)
    finally:
        hook.remove()
    return kept[0]


@pytest.mark.parametrize("name", VISIONS)
def test_tokens_are_the_last_blocks_patches_without_class_and_register_tokens(root, name):
    encoder = load_encoder(vision_directory(name, root), num_visual_tokens=SIDE**2, normalize_visual_tokens=False)
    states = last_block(encoder, images())
    others = {"clip": 1, "dinov2": 1, "dinov2_registers": 4}.get(name, 0)
    assert states.shape == (2, SIDE**2 + others, VISION_WIDTH)
    torch.testing.assert_close(encoder(images()), states[:, others:], atol=1e-5, rtol=0)  # and no layer norm after it


@pytest.mark.parametrize("name", VISIONS)
def test_a_grid_is_pooled_to_a_number_that_does_not_divide_it(root, name):
    encoder = load_encoder(vision_directory(name, root), num_visual_tokens=9, normalize_visual_tokens=False)
    grid = last_block(encoder, images())[:, -(SIDE**2) :].unflatten(1, (SIDE, SIDE))
    tokens = encoder(images()).unflatten(1, (3, 3))
    # From 4 to 3 cells the centres lie at 1/6, 1 1/2 and 2 5/6.
    torch.testing.assert_close(tokens[:, 1, 1], grid[:, 1:3, 1:3].mean(dim=(1, 2)), atol=1e-5, rtol=0)
    rows = grid[:, 0] * 5 / 6 + grid[:, 1] / 6
    torch.testing.assert_close(tokens[:, 0, 0], rows[:, 0] * 5 / 6 + rows[:, 1] / 6, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["siglip", "siglip2", "dinov2"])
def test_pixels_beyond_the_last_whole_patch_are_not_read(root, name):
    """SigLIP at 384 pixels with patches of 14 has 27 of them and 6 pixels to spare."""
    changes: dict = {"image_size": IMAGE + 5} if name == "siglip" else {}
    encoder = load_encoder(vision_directory(name, root / "wider", **changes), num_visual_tokens=4)
    wide = images(IMAGE + 5)
    other = wide.clone()
    other[:, :, IMAGE:], other[:, :, :, IMAGE:] = 0, 0
    assert torch.equal(encoder(wide), encoder(other))
    if name == "siglip2":
        assert torch.equal(encoder(wide), encoder(wide[:, :, :IMAGE, :IMAGE]))


def test_flat_patches_are_those_that_siglip2s_own_preprocessor_cuts():
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    image = images(count=1)
    assert torch.equal(flat_patches(image, PATCH)[0], torch.from_numpy(convert_image_to_patches(image[0].numpy(), PATCH)))


@pytest.mark.parametrize("name", [name for name, vision in VISIONS.items() if vision.two_towers])
def test_the_vision_tower_of_a_checkpoint_of_two_is_the_same(root, name):
    both = vision_directory(name, root, two_towers=True)
    whole = AutoModel.from_pretrained(both)
    encoder = load_encoder(both, num_visual_tokens=4)
    for key, value in whole.vision_model.state_dict().items():
        assert torch.equal(value, encoder.encoder.state_dict()[key]), key
    assert torch.equal(encoder(images()), load_encoder(both, num_visual_tokens=4)(images()))


@pytest.mark.parametrize("name", VISIONS)
def test_image_settings_are_read_as_the_family_writes_them(root, name):
    directory = vision_directory(name, root)
    settings = read_image_settings(directory, load_vision_model(directory).config)
    saved = VISIONS[name].preprocessor
    assert settings.image_size == (IMAGE, IMAGE)  # what remains after cropping; NaFlex: the grid it was trained with
    assert settings.image_mean == tuple(saved["image_mean"]) and settings.image_std == tuple(saved["image_std"])
    assert settings.image_resample == {2: "bilinear", 3: "bicubic"}[saved["resample"]]


def test_settings_in_other_shapes_that_are_in_use(root, tmp_path):
    tower = load_vision_model(vision_directory("clip", root))

    def read(**changes):
        saved = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": 40, "do_center_crop": True, "crop_size": 32} | changes
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
        return read_image_settings(tmp_path, tower.config)

    assert read().image_size == (32, 32)  # plain numbers, as in CLIP's first files
    assert read(do_center_crop=False).image_size == (40, 40)
    assert read(do_center_crop=False, size={"height": 24, "width": 16}).image_size == (24, 16)
    unscaled = read(do_normalize=False)
    assert (unscaled.image_mean, unscaled.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="resample=5 but one of"):
        read(resample=5)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        read_image_settings(tmp_path, tower.config)


TINY_BLOCKS = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
TINY_SWIN = {"image_size": IMAGE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
WITHOUT_PATCHES = {
    "resnet": (TINY_BLOCKS | {"embedding_size": 8, "layer_type": "basic"}, ConfigError, "no patch_size and no hidden_size in ResNetConfig"),
    "convnext": (TINY_BLOCKS, ConfigError, "no hidden_size in ConvNextConfig but an encoder with patches"),
    "swin": (TINY_SWIN, AlignmentError, "16 encoder states but 8 x 8 patches"),
}


@pytest.mark.parametrize("name", WITHOUT_PATCHES)
def test_an_encoder_without_a_grid_of_patches_is_refused_when_joined(root, name):
    settings, error, words = WITHOUT_PATCHES[name]
    AutoModel.from_config(AutoConfig.for_model(name, **settings)).save_pretrained(root / name)
    saved = {"size": {"height": IMAGE, "width": IMAGE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / name / "preprocessor_config.json").write_text(json.dumps(saved))
    with pytest.raises(error, match=words):
        initialize(llm_directory("llama", root), root / name, num_visual_tokens=4)


def test_images_of_a_size_that_the_encoder_cannot_read_are_refused_when_joined(root):
    parts = llm_directory("llama", root), vision_directory("siglip", root)
    with pytest.raises(ConfigError, match=r"SiglipVisionModel fails .* but an encoder of images of 40 x 40 pixels was expected"):
        initialize(*parts, num_visual_tokens=4, image_size=(40, 40))
    with pytest.raises(ConfigError, match="images of 4 x 4 pixels but at least one patch of 8"):
        initialize(*parts, num_visual_tokens=4, image_size=(4, 4))


TINY_LLM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TINY_PARTS = {"text_config": TINY_LLM | {"vocab_size": 420}, "vision_config": VISIONS["siglip"].config}
LLMS_REFUSED = {
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "which keeps a recurrent state"),
    "hyperclovax": (TINY_LLM | {"logits_scaling": 4.0}, "logits that differ by .* from those of HyperCLOVAXForCausalLM"),
    "gemma3": (TINY_PARTS, "which is made of several models"),
}


@pytest.mark.parametrize("name", LLMS_REFUSED)
def test_an_llm_that_cannot_be_joined_is_refused(root, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, words = LLMS_REFUSED[name]
    tokens = {} if name == "gemma3" else {"vocab_size": 420, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **tokens, **settings)).save_pretrained(root / name)
    AutoTokenizer.from_pretrained(llm_directory("llama", root)).save_pretrained(root / name)
    with pytest.raises(ConfigError, match=words):
        initialize(root / name, vision_directory("siglip", root), num_visual_tokens=4)
