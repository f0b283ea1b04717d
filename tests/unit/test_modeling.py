"""The model against its definition: what predicts what, which losses, which gradients, saving and loading."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, SiglipVisionConfig

from metamorph.batch import Batch, TokenSequence
from metamorph.data.collate import pack, pad
from metamorph.errors import AlignmentError, CheckpointError
from metamorph.model import MetaMorph, MetaMorphConfig
from metamorph.model.modeling import place_visual_tokens

IMAGE, START, END, K = 60, 61, 62, 4


def make(tied: bool = False, text_config=None, **settings) -> MetaMorph:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text_config = text_config or LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=tied, initializer_range=0.2)
    ids = {"image_token_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END}
    return MetaMorph(MetaMorphConfig(text_config=text_config, vision_config=vision, num_visual_tokens=K, **ids, **settings)).eval()


def sequence(text: list, targets: tuple[bool, ...] = (), seed: int = 0, first_target: int = 2, name: str = "row") -> TokenSequence:
    """Ids with "i" for an image; everything from `first_target` on is a text target."""
    ids = [x for item in text for x in ([START, *[IMAGE] * K, END] if item == "i" else [item])]
    input_ids = torch.tensor(ids)
    labels = torch.where((torch.arange(len(ids)) >= first_target) & (input_ids != IMAGE), input_ids, -100)
    pixels = torch.randn(len(targets), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    flags = torch.tensor(targets, dtype=torch.bool)
    return TokenSequence(
        input_ids=input_ids,
        labels=labels,
        is_visual=input_ids == IMAGE,
        pixel_values=pixels,
        from_pixels=torch.ones_like(flags),
        visual_targets=flags,
        id=name,
    )


def rows() -> list[TokenSequence]:
    return [
        sequence(["i", 1, 2, 3, "i", 4], (False, True), seed=1, first_target=8, name="both"),
        sequence([5, 6, 7, 8], name="text"),
        sequence([9, "i", 10], (True,), seed=2, name="draws"),
        sequence(["i", 11, 12], (False,), seed=3, first_target=7, name="looks"),
    ]


def test_losses_are_those_of_the_definition():
    """One row, position by position: the state before a thing predicts it."""
    model, row = make(), rows()[0]
    output = model(**pad([row]).model_inputs(), logits_to_keep=0)
    hidden, tokens = output.last_hidden_state[0], model.encode_images(row.pixel_values)
    text = [F.cross_entropy(model.predict_logits(hidden[i - 1]), row.labels[i]) for i in range(1, len(row)) if row.labels[i] != -100]
    first = row.is_visual.nonzero().flatten()[K]  # the first visual token of the second image, which the assistant says
    assert row.input_ids[first - 1] == START
    cosines = [F.cosine_similarity(model.vision_head.layers(hidden[first + j - 1]), tokens[1, j], dim=0) for j in range(K)]
    assert torch.allclose(output.text_loss, torch.stack(text).mean(), atol=1e-5)
    assert torch.allclose(output.visual_loss, -torch.stack(cosines).mean(), atol=1e-5)
    assert torch.allclose(output.loss, output.text_loss + output.visual_loss)
    assert {kind: int(term.count) for kind, term in output.terms.items()} == {"text": len(text), "visual": K}


def test_the_llm_reads_projected_visual_tokens():
    model, row = make(), rows()[0]
    batch = pad([row])
    embeddings = model.get_input_embeddings()(batch.input_ids)
    embeddings[batch.is_visual] = model.project(model.encode_images(row.pixel_values)).flatten(0, 1)
    expected = model.language_model(inputs_embeds=embeddings).logits
    assert torch.allclose(model(**batch.model_inputs(), logits_to_keep=0).logits, expected, atol=1e-5)


def test_padded_packed_split_and_single_give_the_same_losses():
    model = make()
    single = [model.loss_terms(pad([row])) for row in rows()]
    expected = {kind: sum(float(terms[kind].sum.detach()) for terms in single) for kind in ("text", "visual")}
    batches = [pad(rows()), pad(rows(), side="left"), pack(rows(), 28), pack(rows(), 64)]
    for batch in [[b] for b in batches] + [pad(rows()).split_into(3), pack(rows(), 28).split_into(2)]:
        terms = [model.loss_terms(part) for part in batch]
        for kind, value in expected.items():
            assert sum(float(t[kind].sum.detach()) for t in terms) == pytest.approx(value, rel=1e-4), kind
            assert sum(int(t[kind].count) for t in terms) == sum(int(t[kind].count) for t in single)


def test_packed_and_padded_give_the_same_gradients():
    model, gradients = make().train(), []
    for batch in (pad(rows()), pack(rows(), 28)):
        model.zero_grad()
        terms = model.loss_terms(batch)
        (terms["text"].sum + terms["visual"].sum).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-4), name


@pytest.mark.parametrize("chosen", [[1], [2], [3], [0]])
def test_every_module_has_a_path_whatever_the_batch_holds(chosen):
    model = make()
    batch = pad([rows()[i] for i in chosen])
    if chosen == [2]:  # no text target either
        batch = replace(batch, labels=torch.full_like(batch.labels, -100), target_counts={"text": 0, "visual": K})
    terms = model.loss_terms(batch)
    sum(term.sum for term in terms.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for kind, term in terms.items():
        assert (int(term.count) == 0) == (batch.target_counts[kind] == 0)
        assert int(term.count) or float(term.sum.detach()) == 0.0


def test_without_targets_of_a_kind_gradients_are_those_of_the_other_alone():
    model = make()
    looks = pad([rows()[3]])
    model(**looks.model_inputs()).loss.backward()
    assert all(not p.grad.any() for p in model.vision_head.parameters())
    assert any(p.grad.any() for p in model.projector.parameters())
    assert float(model(**looks.model_inputs()).visual_loss.detach()) == 0.0


def test_the_encoder_never_gets_a_gradient_and_targets_are_detached():
    model = make().train()
    model(**pad([rows()[2]]).model_inputs()).terms["visual"].sum.backward()
    assert all(p.grad is None for p in model.vision_encoder.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pixels_go_to_the_encoder_wherever_the_language_model_is():
    model = make()
    pixels = torch.cat([row.pixel_values for row in rows()])
    expected = model.encode_images(pixels)
    model.vision_encoder.cuda()  # as in a decoder's run: `model.device` is still that of the language model
    assert model.device.type == "cpu"
    tokens = model.encode_images(pixels.to(model.device))
    assert tokens.device.type == "cuda"
    torch.testing.assert_close(tokens.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_given_visual_tokens_stand_in_for_pixels():
    model, row = make(), rows()[0]
    tokens = model.encode_images(row.pixel_values)
    expected = model(**pad([row]).model_inputs()).loss.detach()
    for from_pixels in ([False, False], [True, False], [False, True]):
        flags = torch.tensor(from_pixels)
        mixed = replace(row, visual_tokens=tokens * ~flags[:, None, None], from_pixels=flags, pixel_values=row.pixel_values[flags])
        assert torch.allclose(model(**pad([mixed]).model_inputs()).loss.detach(), expected, atol=1e-6)


def test_weights_scale_targets():
    model, batch = make(), pad([rows()[0]])
    plain, double = (model.loss_terms(replace(batch, target_weights=torch.full(batch.labels.shape, w))) for w in (1.0, 2.0))
    for kind in plain:
        assert float(double[kind].sum.detach()) == pytest.approx(2 * float(plain[kind].sum.detach()), rel=1e-5)
        assert int(double[kind].count) == int(plain[kind].count)


def test_settings_of_the_loss_are_read():
    row = pad([rows()[0]])
    half = make(visual_loss_weight=0.5)(**row.model_inputs())
    assert torch.allclose(half.loss, half.text_loss + 0.5 * half.visual_loss)
    model = make(visual_loss="l1", normalize_visual_tokens=False, vision_head_type="linear", projector_type="linear")
    output = model(**row.model_inputs())
    first = row.is_visual[0].nonzero().flatten()[K]
    states = output.last_hidden_state[0, first - 1 : first + K - 1]
    target = model.encode_images(row.pixel_values)[1]
    assert len(model.projector.layers) == len(model.vision_head.layers) == 1
    assert torch.allclose(output.visual_loss, (model.vision_head.layers(states) - target).abs().mean(), atol=1e-5)
    assert not torch.allclose(target.norm(dim=-1), torch.ones(K))


def test_drawn_tokens_are_hidden_from_the_input_only_and_only_if_asked():
    model, batch = (
        make(),
        pad([sequence(["i", 1, 2, "i"], (False, True), first_target=6, name=f"{i}") for i in range(50)]),
    )
    seen: list[torch.Tensor] = []
    model.projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = model(**batch.model_inputs()).visual_loss
    torch.manual_seed(1)
    losses = [model(**batch.model_inputs(), drawn_token_dropout=1.0).visual_loss for _ in range(2)]
    whole, *partial = seen
    assert (whole.norm(dim=-1) > 0.99).all()
    for tokens in partial:
        hidden = tokens.norm(dim=-1) == 0
        assert not hidden[~batch.visual_targets].any() and torch.equal(tokens[~hidden], whole[~hidden])
        per_image = hidden[batch.visual_targets].float().mean(dim=1)
        assert 0.3 < per_image.mean() < 0.7 and (per_image == 0).any() and (per_image == 1).any()
    assert losses[0] != losses[1] != plain


def test_num_items_in_batch_divides_the_text_loss():
    model, batch = make(), pad([rows()[1]])
    plain = model(**batch.model_inputs())
    spread = model(**batch.model_inputs(), num_items_in_batch=10)
    assert torch.allclose(spread.text_loss * 10, plain.terms["text"].sum)
    assert model.accepts_loss_kwargs is False


def test_logits_only_where_asked():
    model, batch = make(), pad([rows()[1]])
    assert model(**batch.model_inputs()).logits is None
    everything = model(batch.input_ids).logits
    assert everything.shape == (1, 4, 64)
    assert torch.allclose(model(batch.input_ids, logits_to_keep=1).logits, everything[:, -1:], atol=1e-6)
    assert torch.allclose(model(**batch.model_inputs(), logits_to_keep=torch.tensor([0, 2])).logits, everything[:, [0, 2]], atol=1e-5)


def test_cached_steps_equal_one_forward_also_with_left_padding_and_inside_an_image():
    model, long, short = make(), rows()[0], rows()[2]
    batch = pad([long, short], side="left")
    whole = model(**batch.model_inputs(), logits_to_keep=0).logits
    tokens = model.encode_images(batch.pixel_values).flatten(0, 1)
    cache, seen = None, 0
    with torch.no_grad():
        for t in range(batch.input_ids.shape[1]):
            is_visual = batch.is_visual[:, t : t + 1]
            # The tokens of rows that are inside an image at this step, in row order.
            before = [int(batch.is_visual[:row].sum() + batch.is_visual[row, :t].sum()) for row in range(2)]
            given = tokens[[before[row] for row in range(2) if is_visual[row, 0]]][:, None]
            output = model(
                batch.input_ids[:, t : t + 1],
                attention_mask=batch.attention_mask[:, : t + 1],
                is_visual=is_visual,
                visual_tokens=given if len(given) else None,
                past_key_values=cache,
                use_cache=True,
            )
            cache, real = output.past_key_values, batch.attention_mask[:, t]
            assert torch.allclose(output.logits[real, 0], whole[real, t], atol=1e-4)
            seen += int(real.sum())
    assert seen == len(long) + len(short)


def test_counts_that_disagree_are_refused_with_both_numbers():
    model, batch = make(), pad([rows()[0]])
    with pytest.raises(AlignmentError, match="8 image positions but 1 images x 4 visual tokens"):
        place_visual_tokens(torch.zeros(1, 16, 8), torch.zeros(1, 4, 8), batch.is_visual)
    with pytest.raises(AlignmentError, match="1 pixel images but 2 images flagged"):
        model(**batch.model_inputs() | {"pixel_values": batch.pixel_values[:1]})
    cut = {n: batch.model_inputs()[n][:, :13] for n in ("input_ids", "attention_mask", "position_ids", "is_visual", "labels")}
    with pytest.raises(AlignmentError, match="7 image positions but 2 images"):
        model(**batch.model_inputs() | cut)
    with pytest.raises(AlignmentError, match="2 images but no visual_targets"):
        model(**batch.model_inputs() | {"visual_targets": None})
    with pytest.raises(AlignmentError, match=r"visual targets in the loss but 9 in the batch \(both\)"):
        model.loss_terms(replace(batch, target_counts={"visual": 9}))
    ids = torch.tensor([[IMAGE] * K + [END]])
    with pytest.raises(AlignmentError, match="1 of 4 target visual tokens have nothing before them"):
        model(ids, visual_tokens=torch.zeros(1, K, 24), labels=ids, visual_targets=torch.tensor([True]))


def test_the_first_visual_token_of_a_document_is_not_predicted_by_the_document_before_it():
    ids = torch.tensor([[1, 2, *[IMAGE] * K, END]])
    with pytest.raises(AlignmentError, match="have nothing before them"):
        make()(
            ids,
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            visual_tokens=torch.zeros(1, K, 24),
            visual_targets=torch.tensor([True]),
            labels=ids,
            document_lengths=((2, K + 1),),
        )


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_is_the_identity(tmp_path, tied):
    model = make(tied, pooling="area", visual_loss_weight=0.3)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(tmp_path)
    for loaded in (MetaMorph.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded, MetaMorph)
        expected, found = model.state_dict(), loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
        assert loaded.config.to_dict().items() >= {"pooling": "area", "visual_loss_weight": 0.3, "num_visual_tokens": K}.items()
        assert type(loaded.config.text_config) is LlamaConfig
        assert loaded.generation_config.eos_token_id == [5, 7]
        batch = pad(rows()).model_inputs()
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_half_precision_on_disk_is_single_precision_in_memory(tmp_path):
    make().half().save_pretrained(tmp_path)
    assert {p.dtype for p in MetaMorph.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert MetaMorph.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def spoil(directory, how: str) -> None:
    from safetensors.torch import load_file, save_file

    weights, config = directory / "model.safetensors", directory / "config.json"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "no weights":
        weights.rename(directory / "pytorch_model.bin")
    elif how == "no config":
        config.unlink()
    elif how == "tensor gone":
        tensors = load_file(weights)
        tensors.pop("vision_head.layers.0.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        settings = json.loads(config.read_text())
        changes = {"other shape": ("text_config", settings["text_config"] | {"hidden_size": 40}), "no ids": ("image_start_token_id", None)}
        settings[changes[how][0]] = changes[how][1]
        config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "a MetaMorph checkpoint was expected"),
        ("no weights", "a MetaMorph checkpoint was expected"),
        ("no config", "a MetaMorph checkpoint was expected"),
        ("tensor gone", r"1 tensors absent, such as vision_head.layers.0.weight"),
        ("other shape", "a MetaMorph checkpoint was expected"),
        ("no ids", r"image token ids \(60, None, 62\)"),
    ],
)
def test_a_broken_checkpoint_is_refused_saying_what_to_do(tmp_path, how, words):
    make().save_pretrained(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(CheckpointError, match=words) as refusal:
        MetaMorph.from_pretrained(tmp_path)
    assert "metamorph init" in str(refusal.value)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_precision_that_is_asked_for_is_loaded_by_both_of_its_names(tmp_path, name):
    make().save_pretrained(tmp_path)
    assert MetaMorph.from_pretrained(tmp_path).dtype == torch.float32
    assert MetaMorph.from_pretrained(tmp_path, **{name: torch.bfloat16}).dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing_but_memory():
    batch, gradients = pad(rows()), []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert model.get_decoder().gradient_checkpointing or model.get_decoder().layers[0].gradient_checkpointing
        model(**batch.model_inputs()).loss.backward()
        gradients.append(model.projector.layers[0].weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_another_family_of_llm_works_the_same():
    model = make(text_config=GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    single = sum(float(model.loss_terms(pad([row]))["visual"].sum.detach()) for row in rows())
    for batch in (pad(rows()), pad(rows(), side="left"), pack(rows(), 28)):
        assert float(model.loss_terms(batch)["visual"].sum.detach()) == pytest.approx(single, rel=1e-4)


def test_heads_are_initialised_as_torch_linear_layers_not_as_the_llm():
    weight = make().projector.layers[0].weight.detach()
    assert float(weight.abs().max()) <= 24**-0.5
    assert float(weight.std()) == pytest.approx(24**-0.5 / 3**0.5, rel=0.1)


def test_trainer_style_inputs_without_flags():
    """Placeholders are found by their id; text alone needs nothing else."""
    model = make()
    output = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, 2, 3]]))
    assert torch.allclose(output.loss, output.text_loss)
    ids = torch.tensor([[1, START, *[IMAGE] * K, END]])
    assert model(ids, pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 7, 64)


def test_batch_is_the_type_of_loss_terms():
    with pytest.raises(Exception, match="Batch"):
        make().loss_terms({"input_ids": torch.zeros(1, 2)})
    assert isinstance(pad(rows()), Batch)
