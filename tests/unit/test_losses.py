"""Losses against formulas written out, and the arithmetic of terms."""

import pytest
import torch

from metamorph.losses import LossTerm, text_cross_entropy, visual_loss


def vectors(seed: int, rows: int = 6, width: int = 5) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_text_cross_entropy_is_minus_the_log_probability_summed():
    logits, targets = vectors(0), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = -sum(float(row.softmax(0)[target].log()) for row, target in zip(logits, targets, strict=True))
    term = text_cross_entropy(logits, targets)
    assert float(term.sum) == pytest.approx(expected, rel=1e-5)
    assert int(term.count) == 6


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("cosine", lambda p, t: -(p @ t) / (p.norm() * t.norm())),  # as the authors: -1 is perfect
        ("l1", lambda p, t: (p - t).abs().mean()),
        ("mse", lambda p, t: ((p - t) ** 2).mean()),
    ],
)
def test_visual_losses(name, formula):
    prediction, target = vectors(1), vectors(2)
    term = visual_loss(name)(prediction, target)
    expected = sum(float(formula(p, t)) for p, t in zip(prediction, target, strict=True))
    assert float(term.sum) == pytest.approx(expected, rel=1e-5)
    assert int(term.count) == 6
    weights = torch.tensor([1.0, 0, 0, 0, 0, 2])
    weighted = visual_loss(name)(prediction, target, weights)
    expected = float(formula(prediction[0], target[0]) + 2 * formula(prediction[5], target[5]))
    assert float(weighted.sum) == pytest.approx(expected, rel=1e-5)
    assert int(weighted.count) == 6  # weights scale sums; a count is a number of targets


def test_cosine_of_equal_directions_is_minus_one_and_of_zero_is_finite():
    tokens = vectors(3)
    assert float(visual_loss("cosine")(3 * tokens, tokens).mean) == pytest.approx(-1.0)
    zero = torch.zeros(2, 5, requires_grad=True)
    term = visual_loss("cosine")(zero, tokens[:2])
    term.sum.backward()
    assert float(term.sum.detach()) == 0.0
    assert bool(zero.grad.isfinite().all())


def test_losses_are_computed_in_float32():
    logits = vectors(4).to(torch.bfloat16)
    assert text_cross_entropy(logits, torch.zeros(6, dtype=torch.long)).sum.dtype == torch.float32
    assert visual_loss("cosine")(logits, logits).sum.dtype == torch.float32


def test_terms_add_and_an_empty_one_changes_nothing():
    term = LossTerm(torch.tensor(6.0), torch.tensor(3))
    empty = text_cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert float(empty.mean) == 0.0
    both = term + empty
    assert isinstance(both, LossTerm)
    assert (float(both.sum), int(both.count), float(both.mean)) == (6.0, 3, 2.0)
