"""Two pretrained models become one: embeddings, settings, what is refused, and models that share an encoder."""

import json

import pytest
import torch
from tests.tiny import save_parts
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from metamorph.data.collate import pad
from metamorph.errors import CheckpointError, ConfigError, TemplateError
from metamorph.messages import Message
from metamorph.model import MetaMorph, initialize, load, save_without_encoder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def built(parts):
    return initialize(*parts, num_visual_tokens=4)


def save_llm(directory, parts, *, tied: bool = False, rows_more: int = 0, template: str | None = None):
    """The tiny LLM again, with other matrices or another chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts[0])
    model = LlamaForCausalLM.from_pretrained(parts[0])
    model.config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = LlamaForCausalLM(model.config)
    model.resize_token_embeddings(len(tokenizer) + rows_more, mean_resizing=False)
    tokenizer.chat_template = template or tokenizer.chat_template
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows_more", [0, 2, 40])
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, parts, tied, rows_more):
    llm = save_llm(tmp_path, parts, tied=tied, rows_more=rows_more)
    old = LlamaForCausalLM.from_pretrained(llm)
    model, processor = initialize(llm, parts[1], num_visual_tokens=4)
    known = len(processor.tokenizer) - 3
    ids = sorted([processor.image_token_id, processor.image_start_id, processor.image_end_id])
    assert ids == [known, known + 1, known + 2]
    for before, after in (
        (old.get_input_embeddings(), model.get_input_embeddings()),
        (old.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert len(after.weight) == max(known + rows_more, known + 3)  # a matrix longer than the tokenizer keeps its size
        assert torch.equal(after.weight[:known], before.weight[:known])
        assert torch.allclose(after.weight[ids], before.weight[:known].mean(dim=0).expand(3, -1), atol=1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "whole")
    loaded = MetaMorph.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_old_abilities_are_untouched(parts, built):
    model, processor = built
    ids = processor.encode([Message.user("hello")], add_generation_prompt=True).input_ids[None]
    old = LlamaForCausalLM.from_pretrained(parts[0]).eval()
    assert torch.allclose(model(ids).logits[..., :256], old(ids).logits[..., :256], atol=1e-5)


def test_config_processor_and_generation_settings_agree(built):
    model, processor = built
    config = model.config
    assert (config.image_token_id, config.image_start_token_id, config.image_end_token_id) == (
        processor.image_token_id,
        processor.image_start_id,
        processor.image_end_id,
    )
    assert processor.image_size == (32, 32)
    assert processor.max_length == config.text_config.max_position_embeddings
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id
    sequence = processor.encode([Message.user("x"), Message.assistant("y")])
    assert float(model.loss_terms(pad([sequence]))["text"].sum.detach()) > 0


def test_new_parts_depend_on_the_seed_only(parts):
    first, again, other = (initialize(*parts, num_visual_tokens=4, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    changed = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, other[name])}
    assert changed == {"projector", "vision_head"}


def test_image_settings_come_from_the_encoders_own_files(tmp_path, parts):
    import shutil

    shutil.copytree(parts[1], tmp_path / "vision")
    saved = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 2}
    saved |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(saved))
    processor = initialize(parts[0], tmp_path / "vision", num_visual_tokens=4)[1]
    assert (processor.image_size, processor.image_resample) == ((32, 32), "bilinear")
    assert (processor.image_mean, processor.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert initialize(parts[0], tmp_path / "vision", num_visual_tokens=4, image_size=(34, 34))[1].image_size == (34, 34)


def test_a_wrong_setting_names_the_nearest(parts):
    with pytest.raises(ConfigError, match=r"setting 'poolin' .* Did you mean 'pooling'"):
        initialize(*parts, poolin="area")


def test_parts_that_are_not_there_are_refused(tmp_path, parts):
    with pytest.raises(CheckpointError, match="a causal LM in safetensors was expected"):
        initialize(tmp_path, parts[1])
    with pytest.raises(CheckpointError, match="a vision encoder in safetensors was expected"):
        initialize(parts[0], tmp_path)


def test_a_template_that_hides_answers_is_refused(tmp_path, parts):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(TemplateError, match="probe conversation"):
        initialize(save_llm(tmp_path, parts, template=template), parts[1], num_visual_tokens=4)


def test_a_model_without_its_encoder_reads_it_from_beside(tmp_path, parts, built):
    import shutil

    model, processor = built
    shutil.copytree(parts[1], tmp_path / "encoder")
    save_without_encoder(model, processor, tmp_path / "model", "../encoder", dtype=torch.float16)
    assert model.config.vision_encoder_path is None
    loaded, _ = load(tmp_path / "model")
    assert loaded.dtype == torch.float32
    assert loaded.vision_encoder.fingerprint() == model.vision_encoder.fingerprint()
    expected, found = model.state_dict(), loaded.state_dict()
    assert all(torch.allclose(value, found[name], atol=2e-3) for name, value in expected.items())
    from safetensors import safe_open

    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("vision_encoder")]  # noqa: SIM118
    loaded.save_pretrained(tmp_path / "elsewhere")  # whole again: it may be moved
    assert MetaMorph.from_pretrained(tmp_path / "elsewhere").config.vision_encoder_path is None
    shutil.rmtree(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="a vision encoder in safetensors was expected"):
        load(tmp_path / "model")


def test_a_processor_of_another_model_is_refused(tmp_path, parts, built):
    model, processor = built
    model.save_pretrained(tmp_path)
    other = initialize(*parts, num_visual_tokens=16)[1]
    other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="num_visual_tokens 16 in the processor but 4 in the model"):
        load(tmp_path)


def test_the_command_builds_a_model_that_loads(tmp_path, parts):
    from metamorph.cli.main import build_app

    out = tmp_path / "model"
    options = ["--num-visual-tokens", "16", "--pooling", "area", "--vision-head", "linear", "--visual-loss", "mse"]
    result = CliRunner().invoke(build_app(), ["init", "--llm", str(parts[0]), "--vision", str(parts[1]), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert "16 visual tokens" in result.output
    model, _ = load(out)
    assert (model.config.pooling, model.config.vision_head_type, model.config.visual_loss) == ("area", "linear", "mse")


def test_the_encoder_is_frozen_also_after_loading(tmp_path, built):
    built[0].save_pretrained(tmp_path)
    for model in (built[0], MetaMorph.from_pretrained(tmp_path)):
        trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {"language_model", "projector", "vision_head"}


def test_the_processor_can_be_had_without_the_weights(parts, built, tmp_path):
    from metamorph.model.conversion import read_processor

    alone = read_processor(*parts, num_visual_tokens=4)
    assert alone.to_dict() == built[1].to_dict()
    talk = [Message.user("Is it red?"), Message.assistant("yes")]
    assert alone.encode(talk).input_ids.tolist() == built[1].encode(talk).input_ids.tolist()
    with pytest.raises(ConfigError, match="setting 'poolin'"):
        read_processor(*parts, poolin="area")
    with pytest.raises(CheckpointError, match="but tokenizer and configs were expected"):
        read_processor("nobody/has-fetched-this", parts[1])
