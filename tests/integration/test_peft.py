"""PEFT's LoRA on a MetaMorph: what it reaches, that it trains, and that all of it survives saving, loading and merging."""

import peft
import pytest
import torch
from tests.tiny import make_eager_to_draw, save_parts
from tests.unit.test_conversion import save_llm

from metamorph.data.collate import pad
from metamorph.messages import ImagePart, Message
from metamorph.model import MetaMorph, initialize
from metamorph.model.adapters import lora_settings, lora_targets
from metamorph.pipeline import MetaMorphPipeline

# peft 0.21 still asks transformers 5.23 by the old names
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llm(request, parts, tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm"), parts, tied=request.param, rows_more=3)


def picture(seed: int) -> ImagePart:
    return ImagePart(visual_tokens=torch.nn.functional.normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(seed)), dim=-1))


def batch_of(processor):
    turns = [
        [Message.user("Draw a star"), Message.assistant("Here: ", picture(1))],
        [Message.user(picture(2), "What is it?"), Message.assistant("a circle")],
        [Message.user("Hello"), Message.assistant("Good day")],
    ]
    return pad([processor.encode(messages) for messages in turns])


def wrap(model, **settings):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **lora_settings(model), **settings))


def train(wrapped, batch, steps: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(steps):
        loss = wrapped(**batch.model_inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def outputs(model, batch) -> dict[str, torch.Tensor]:
    model.eval()
    out = model(**batch.model_inputs(), logits_to_keep=0)
    return {"logits": out.logits, "hidden": out.last_hidden_state, "text": out.text_loss, "visual": out.visual_loss}


def test_the_targets_are_the_linear_layers_of_the_llm(parts):
    import re

    model, _ = initialize(*parts, num_visual_tokens=4)
    matched = {name for name, _ in model.named_modules() if re.fullmatch(lora_targets(model), name)}
    blocks = {f"language_model.model.layers.{i}" for i in range(2)}
    attention = {f"{block}.self_attn.{part}_proj" for block in blocks for part in "qkvo"}
    assert matched == attention | {f"{block}.mlp.{part}_proj" for block in blocks for part in ("gate", "up", "down")}


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_lora_trains_saves_loads_and_merges(parts, llm, tmp_path, task):
    model, processor = initialize(llm, parts[1], num_visual_tokens=4)
    make_eager_to_draw(model)
    model.save_pretrained(tmp_path / "base")
    tied = model.config.text_config.tie_word_embeddings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of(processor)
    wrapped = wrap(model, task_type=task)
    losses = train(wrapped, batch, steps=3)
    assert losses[-1] < losses[0]
    trained = outputs(wrapped, batch)
    wrapped.save_pretrained(tmp_path / "adapter")

    fresh = MetaMorph.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    for name, value in outputs(loaded, batch).items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0, msg=name)

    prompt = {"input_ids": processor.encode([Message.user("Draw")], add_generation_prompt=True).input_ids[None]}
    if task is not None:  # PEFT's causal LM has a `generate` that leads to the model's own
        assert loaded.generate(**prompt, max_new_tokens=3)[0].token_ids == fresh.generate(**prompt, max_new_tokens=3)[0].token_ids

    # In float64, so that what merging may change is told from the rounding of another order of sums.
    exact_batch = batch.to("cpu", torch.float64)
    exact = outputs(loaded.double(), exact_batch)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, MetaMorph) and type(merged) is type(model)
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "modules_to_save" in name or "token_adapter" in name]
    for name, value in outputs(merged, exact_batch).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(value.float(), trained[name].float(), rtol=1e-3, atol=1e-3, msg=name)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is tied

    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    pipeline = MetaMorphPipeline.from_pretrained(tmp_path / "merged", device="cpu")
    for name, value in outputs(pipeline.model, batch).items():
        torch.testing.assert_close(value, trained[name], rtol=1e-4, atol=1e-5, msg=name)
    ours = pipeline("Draw a star", max_new_tokens=24, seed=3, temperature=1.0)
    theirs = MetaMorphPipeline(wrapped.get_base_model(), processor)("Draw a star", max_new_tokens=24, seed=3, temperature=1.0)
    assert ours.token_ids == theirs.token_ids and ours.token_ids
    changes_are_where_they_belong(before, pipeline.model, processor)


def changes_are_where_they_belong(before, model, processor) -> None:
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith("vision_encoder")]
    bridges = {name for name in after if name.startswith(("projector", "vision_head"))}
    linear = {name for name in after if name.endswith("_proj.weight") and name.startswith("language_model")}
    tables = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert changed == bridges | linear | tables
    for table in tables:
        rows = (after[table] != before[table]).any(dim=1).nonzero().flatten().tolist()
        assert rows == sorted([processor.image_start_id, processor.image_end_id])


def test_an_adapter_goes_on_a_base_of_another_seed(parts, tmp_path):
    """All that `initialize` invents is in the adapter: the LLM and the encoder are enough to load it."""
    model, processor = initialize(*parts, num_visual_tokens=4, seed=0)
    batch = batch_of(processor)
    wrapped = wrap(model)
    train(wrapped, batch)
    wrapped.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(initialize(*parts, num_visual_tokens=4, seed=9)[0], tmp_path)
    for name, value in outputs(other, batch).items():
        torch.testing.assert_close(value, outputs(wrapped, batch)[name], rtol=0, atol=0, msg=name)


def test_gradient_checkpointing_changes_no_gradient(parts):
    def gradients(checkpointed: bool, rows) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)  # of the adapter's weights
        model, _ = initialize(*parts, num_visual_tokens=4)
        if checkpointed:
            model.gradient_checkpointing_enable()
        wrapped = wrap(model)
        if checkpointed:
            wrapped.enable_input_require_grads()
        wrapped.train()
        wrapped(**rows.model_inputs()).loss.backward()
        return {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}

    processor = initialize(*parts, num_visual_tokens=4)[1]
    for rows in (batch_of(processor), pad([processor.encode([Message.user("a"), Message.assistant("b")])])):
        plain, checkpointed = gradients(False, rows), gradients(True, rows)
        assert all(grad is not None for grad in plain.values())  # a path to every parameter, also in a batch without an image
        for name, grad in plain.items():
            torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7, msg=name)
