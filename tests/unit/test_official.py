"""Converting checkpoints of the authors' layout: shards, heads of one layer, an encoder or tokenizer from elsewhere, and what is refused.

That the numbers are right is tests/parity's concern.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.cases import official_checkpoint
from tests.tiny import tiny_tokenizer
from transformers import SiglipVisionConfig, SiglipVisionModel

from metamorph.errors import CheckpointError, ConfigError
from metamorph.messages import Message
from metamorph.model import MetaMorph, load
from metamorph.model.official import convert_official

TOWER = "model.vision_tower.vision_tower."


@pytest.fixture
def official(tmp_path):
    return official_checkpoint(tmp_path / "official")


def rewrite(directory, change, settings=None) -> None:
    """Change the weights by a function, and some settings."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)
    config = json.loads((directory / "config.json").read_text()) | (settings or {})
    (directory / "config.json").write_text(json.dumps(config))


def save_tower(directory) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=70, patch_size=14)).save_pretrained(directory)


def test_shards_with_an_index_are_read_whole(official, tmp_path):
    whole = convert_official(official, tmp_path / "whole")
    tensors = load_file(official / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, official / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (official / "model.safetensors.index.json").write_text(json.dumps(index))
    (official / "model.safetensors").unlink()
    assert convert_official(official, tmp_path / "sharded").to_dict() == whole.to_dict()
    one, other = (MetaMorph.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "sharded"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_precision_is_kept(official, tmp_path):
    rewrite(official, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    convert_official(official, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_encoder_that_is_kept_elsewhere(official, tmp_path):
    save_tower(tmp_path / "tower")
    rewrite(official, lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(TOWER)})
    with pytest.raises(CheckpointError, match=r"no weights of the vision encoder .* Give --vision"):
        convert_official(official, tmp_path / "out")
    convert_official(official, tmp_path / "out", vision=tmp_path / "tower")
    ours = MetaMorph.from_pretrained(tmp_path / "out").vision_encoder.encoder.state_dict()
    theirs = SiglipVisionModel.from_pretrained(tmp_path / "tower").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_tower_nested_as_older_transformers_nested_it_and_without_its_pooling_head(official, tmp_path):
    def nest(tensors):
        kept = {name: value for name, value in tensors.items() if not name.startswith(f"{TOWER}head.")}
        return {name.replace(TOWER, f"{TOWER}vision_model."): value for name, value in kept.items()}

    pixels = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    convert_official(official, tmp_path / "plain")
    rewrite(official, nest)
    convert_official(official, tmp_path / "nested")
    plain, nested = (MetaMorph.from_pretrained(tmp_path / name).encode_images(pixels) for name in ("plain", "nested"))
    assert torch.equal(plain, nested)


def test_linear_heads_and_tied_embeddings(official, tmp_path):
    def change(tensors):
        dropped = ("vision_head.2.", "model.mm_projector.2.", "lm_head.")
        kept = {name: value for name, value in tensors.items() if not name.startswith(dropped)}
        return {name.replace("head.0.", "head.").replace("projector.0.", "projector."): value for name, value in kept.items()}

    settings = {"mm_projector_type": "linear", "vision_head_type": "linear", "tie_word_embeddings": True}
    rewrite(official, change, settings)
    weights = load_file(official / "model.safetensors")
    weights |= {"vision_head.weight": torch.randn(48, 64), "vision_head.bias": torch.zeros(48)}
    save_file(weights, official / "model.safetensors")
    convert_official(official, tmp_path / "out")
    model = MetaMorph.from_pretrained(tmp_path / "out")
    assert torch.equal(model.vision_head.layers[0].weight, weights["vision_head.weight"])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_with_a_tokenizer_the_processor_is_written_too(official, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"filler {i}" for i in range(298 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert_official(official, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    model, processor = load(tmp_path / "out")
    assert (processor.image_start_id, processor.image_end_id, processor.image_token_id) == (298, 299, 300)
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id  # the template's end of turn ends an answer too
    row = processor.encode([Message.user("hi"), Message.assistant("ho")])
    assert model(row.input_ids[None], labels=row.labels[None]).loss.isfinite()


def test_pixels_are_scaled_as_the_given_encoder_wants_them(official, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"filler {i}" for i in range(298 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_tower(tmp_path / "tower")
    own = {"size": {"height": 70, "width": 70}, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 2}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(own))
    convert_official(official, tmp_path / "out", vision=tmp_path / "tower", tokenizer=tmp_path / "tokenizer")
    _, processor = load(tmp_path / "out")
    assert (processor.image_mean, processor.image_std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    assert (processor.image_size, processor.image_resample) == ((70, 70), "bilinear")
    convert_official(official, tmp_path / "siglip", tokenizer=tmp_path / "tokenizer")
    assert load(tmp_path / "siglip")[1].image_mean == (0.5, 0.5, 0.5)


def test_saved_generation_settings_are_kept(official, tmp_path):
    (official / "generation_config.json").write_text('{"eos_token_id": [1, 2, 7], "temperature": 0.6}')
    convert_official(official, tmp_path / "out")
    assert MetaMorph.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [1, 2, 7]


def test_a_tokenizer_of_another_model_is_refused(official, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=r"<image_start> is \d+ in the tokenizer but 298 in config.json"):
        convert_official(official, tmp_path / "out", tokenizer=tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"apply_softmax": True}, "apply_softmax=True but only False"),
        ({"image_token_reduction": "none"}, "image_token_reduction='none' but only 'interpolation'"),
        ({"mm_projector_type": "perceiver"}, "heads 'perceiver' and 'mlp'"),
        ({"hidden_size": 32}, r"of shape \(300, 64\) but \(300, 32\) was expected"),
        ({"num_hidden_layers": 3}, "9 tensors absent and 0 unknown, such as language_model.model.layers.2"),
        ({"image_start_token_id": None}, "two numbers were expected"),
        ({"image_end_token_id": 300}, "two below 300, the rows of the embedding"),
        ({"image_start_token_id": -1}, "two below 300, the rows of the embedding"),
        ({"siglip_config": None}, r"no sizes \(siglip_config\) of the vision encoder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(official, tmp_path, settings, words):
    rewrite(official, dict, settings)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        convert_official(official, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_no_such_checkpoint_are_refused(official, tmp_path):
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        convert_official(tmp_path, tmp_path / "out")
    rewrite(official, lambda tensors: tensors | {"something.else": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"a tensor something\.else but names that begin with"):
        convert_official(official, tmp_path / "out")
    (official / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="readable safetensors were expected"):
        convert_official(official, tmp_path / "out")
    (official / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="0 safetensors files"):
        convert_official(official, tmp_path / "out")
    (official / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"no setting hidden_size, .* `metamorph init`"):
        convert_official(official, tmp_path / "out")
