"""Documents of a pack see only themselves: packed against padded against one by one, values and gradients."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from metamorph.errors import AlignmentError, ConfigError
from metamorph.model import MetaMorph, MetaMorphConfig

VISION = SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = ((5, 9, 3), (7, 6))


def make(text_config=None) -> MetaMorph:
    torch.manual_seed(0)
    text_config = text_config or LlamaConfig(**SIZES, initializer_range=0.3)
    return MetaMorph(MetaMorphConfig(text_config=text_config, vision_config=VISION, num_visual_tokens=4)).eval()


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (length,), generator=generator) for row in LENGTHS for length in row]


def packed() -> dict:
    ids, mask = torch.zeros(2, 18, dtype=torch.long), torch.zeros(2, 18, dtype=torch.bool)
    rest = documents()
    for row, lengths in enumerate(LENGTHS):
        own = torch.cat([rest.pop(0) for _ in lengths])
        ids[row, : len(own)], mask[row, : len(own)] = own, True
    return {"input_ids": ids, "attention_mask": mask, "document_lengths": LENGTHS}


WINDOWED = MistralConfig(**SIZES, initializer_range=0.3, sliding_window=4)  # shorter than most documents
CONFIGS = [family(**SIZES, initializer_range=0.3) for family in (LlamaConfig, Qwen2Config, MistralConfig)]


@pytest.mark.parametrize("config", [*CONFIGS, WINDOWED, MistralConfig(**SIZES, initializer_range=0.3, sliding_window=9)])
def test_each_document_of_a_pack_is_as_if_alone(config):
    model = make(config)
    batch = packed()
    logits = model(**batch).logits[batch["attention_mask"]]
    alone = torch.cat([model(document[None]).logits[0] for document in documents()])
    assert torch.allclose(logits, alone, atol=1e-5)


def test_gradients_of_a_pack_are_those_of_padded_rows():
    model, batch = make(), packed()
    labels = torch.where(batch["attention_mask"], batch["input_ids"], -100)
    model(**batch, labels=labels).terms["text"].sum.backward()
    from_pack = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    width = max(map(len, documents()))
    ids = torch.stack([torch.cat([d, d.new_zeros(width - len(d))]) for d in documents()])
    mask = torch.stack([torch.arange(width) < len(d) for d in documents()])
    term = model(input_ids=ids, attention_mask=mask, labels=torch.where(mask, ids, -100)).terms["text"]
    assert int(term.count) == sum(len(d) - 1 for d in documents())  # the first token of a document is nobody's target
    term.sum.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(from_pack[name], parameter.grad, atol=1e-4), name


def test_no_mask_is_made_over_a_pack(monkeypatch):
    from metamorph.model import attention

    def fail(*args, **kwargs):
        raise AssertionError("a mask over the pack was built")

    monkeypatch.setitem(attention.AttentionMaskInterface._global_mapping, attention.PACKED_ATTENTION, fail)
    assert make()(**packed()).logits.isfinite().all()


def test_padded_rows_behave_as_under_sdpa():
    model, plain = make(), make()
    plain.language_model.set_attn_implementation("sdpa")
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    assert model.language_model.config._attn_implementation == "metamorph_packed"
    assert torch.equal(model(ids, attention_mask=mask).logits[mask], plain(ids, attention_mask=mask).logits[mask])


def test_lengths_that_do_not_fit_are_refused_with_both_numbers():
    batch = packed() | {"document_lengths": ((5, 9), (7, 6))}
    with pytest.raises(AlignmentError, match=r"\[14, 13\] positions but rows of \[17, 13\]"):
        make()(**batch)


def test_what_cannot_be_packed_is_refused():
    chunked = make()
    chunked.get_decoder().config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="layers of chunked_attention but packing knows full and sliding attention"):
        chunked(**packed())
    eager = make()
    eager.language_model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attention 'eager' but packed rows need"):
        eager(**packed())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", [None, WINDOWED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_a_pack_is_as_its_documents(dtype, config):
    model = make(config).to("cuda", dtype)
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in packed().items()}
    logits = model(**batch).logits[batch["attention_mask"]]
    alone = torch.cat([model(document[None].cuda()).logits[0] for document in documents()])
    assert torch.allclose(logits, alone, atol=1e-4 if dtype == torch.float32 else 0.15)
