"""Learning rates by step, and what is decayed."""

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from metamorph.errors import ConfigError
from metamorph.training import TrainingConfig
from metamorph.training.device import choose_precision, measure_bfloat16_gain, pick_device
from metamorph.training.muon import Muon, orthogonalized
from metamorph.training.optim import build_optimizer, learning_rate_factor, set_learning_rate


def factors(**settings) -> list[float]:
    config = TrainingConfig(steps=100, warmup_ratio=0.1, **settings)
    return [learning_rate_factor(step, config) for step in range(1, 101)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(schedule):
    values = factors(schedule=schedule, min_learning_rate_ratio=0.2)
    assert values[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_cosine_and_linear_are_half_way_at_half_time():
    assert factors(schedule="cosine")[54] == pytest.approx(0.5)
    assert factors(schedule="linear")[54] == pytest.approx(0.5)
    assert factors(schedule="cosine")[31] > factors(schedule="linear")[31]


def test_logarithmic_warmup_rises_early():
    values = factors(warmup="logarithmic")
    assert values[9] == pytest.approx(1.0) and values[2] > 0.5
    assert TrainingConfig(steps=5, warmup_ratio=0.0).warmup_steps == 0


def model() -> nn.Module:
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "head": nn.Linear(3, 2)})


def test_norms_and_biases_do_not_decay():
    network = model()
    names = {parameter: name for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(network, TrainingConfig(steps=1, weight_decay=0.1))
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    rest = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {"body.0.weight", "head.weight"} and rest == {"body.0.bias", "body.1.weight", "body.1.bias", "head.bias"}


def test_rates_can_be_scaled_by_module():
    config = TrainingConfig(steps=10, learning_rate=1e-2, warmup_ratio=0.0, schedule="constant", learning_rate_scale={"head": 10.0})
    network = model()
    optimizer = build_optimizer(network, config)
    assert set_learning_rate(optimizer, 1, config) == 1e-2
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates[network["head"].weight] == pytest.approx(1e-1) and rates[network["body"][0].weight] == pytest.approx(1e-2)
    with pytest.raises(ConfigError, match="hed"):
        build_optimizer(network, TrainingConfig(steps=1, learning_rate_scale={"hed": 2.0}))


def test_orthogonal_matrices_keep_their_directions():
    matrices = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.mT @ orthogonalized(matrices) @ right.mT
    values = rotated.diagonal(dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-3
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_moves_matrices_as_torchs_own_does(monkeypatch):
    monkeypatch.setattr("metamorph.training.muon.STACKED_WEIGHTS", 800)  # two of these at once
    torch.manual_seed(0)
    shapes = [(12, 30), (30, 12), (12, 30), (8, 8), (30, 12)]
    starts = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [
        Muon([{"params": ours, "orthogonal": True, "weight_decay": 0.1}], lr=1e-2),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, mine, other in zip(starts, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.03 * (mine - start).norm()  # torch computes in bfloat16


def test_muon_does_not_move_what_a_step_did_not_use():
    parameter = nn.Parameter(torch.randn(6, 9))
    optimizer = Muon([{"params": [parameter], "orthogonal": True, "weight_decay": 0.0}], lr=1e-2)
    parameter.grad = torch.randn(6, 9)
    optimizer.step()
    moved, parameter.grad = parameter.detach().clone(), torch.zeros(6, 9)
    optimizer.step()
    assert torch.equal(parameter, moved)


def test_muon_is_for_hidden_matrices_only():
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    llm = LlamaForCausalLM(config)
    names = {parameter: name for name, parameter in llm.named_parameters()}
    groups = build_optimizer(llm, TrainingConfig(steps=1, optimizer="muon")).param_groups
    by_muon = {names[p].split(".")[-2] for group in groups if group["orthogonal"] for p in group["params"]}
    by_adamw = {names[p] for group in groups if not group["orthogonal"] for p in group["params"]}
    assert by_muon == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < by_adamw


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="0 trainable parameters"):
        build_optimizer(model().requires_grad_(False), TrainingConfig(steps=1))


def test_a_device_that_is_missing_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' asked for but this machine has"):
            pick_device("cuda")
    assert pick_device("cpu").type == "cpu"


def test_precision_is_measured_without_touching_random_states():
    network, state = model(), torch.get_rng_state()
    assert measure_bfloat16_gain(network, tokens=16, repeats=1) > 0
    assert choose_precision("auto", torch.device("cpu"), network) in ("float32", "bfloat16")
    assert choose_precision("bfloat16", torch.device("cpu"), network) == "bfloat16"
    assert torch.equal(torch.get_rng_state(), state)
