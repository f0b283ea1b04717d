"""Losses as a sum and a count, so that a step can divide by the global number of targets of each kind. Pure functions, float32 inside.

Axes: p text targets, q visual targets (one per visual token), v vision width.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

VisualLossName = Literal["cosine", "l1", "mse"]
VisualLoss = Callable[..., "LossTerm"]


class LossTerm(NamedTuple):
    """A sum over targets of one kind and their number. A count of 0 is legal and contributes exactly 0.

    `per_target`, where it is known, are the values that were added up, without gradient, in the order of the targets: for curves by source.
    """

    sum: Float[Tensor, ""]
    count: Int[Tensor, ""]
    per_target: Float[Tensor, " q"] | None = None

    def __add__(self, other: "LossTerm") -> "LossTerm":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Term of both sets of targets together."""
        return LossTerm(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> Float[Tensor, ""]:
        """Sum divided by max(count, 1)."""
        return self.sum / self.count.clamp(min=1)


def text_cross_entropy(
    logits: Float[Tensor, "p vocab"], targets: Int64[Tensor, " p"], weights: Float[Tensor, " p"] | None = None
) -> LossTerm:
    """Cross-entropy in nats, summed over the targets (each times its weight)."""
    return _total(F.cross_entropy(logits.float(), targets, reduction="none"), weights)


def cosine_loss(prediction: Float[Tensor, "q v"], target: Float[Tensor, "q v"], weights: Float[Tensor, " q"] | None = None) -> LossTerm:
    """Minus the cosine of each predicted and true visual token, between -1 and 1, as the authors minimise it (not 1 - cos)."""
    prediction, target = (F.normalize(x.float(), dim=-1, eps=1e-12) for x in (prediction, target))
    return _total(-(prediction * target).sum(dim=-1), weights)


def l1_loss(prediction: Float[Tensor, "q v"], target: Float[Tensor, "q v"], weights: Float[Tensor, " q"] | None = None) -> LossTerm:
    """Mean absolute error over the v components, summed over visual tokens."""
    return _total((prediction.float() - target.float()).abs().mean(dim=-1), weights)


def mse_loss(prediction: Float[Tensor, "q v"], target: Float[Tensor, "q v"], weights: Float[Tensor, " q"] | None = None) -> LossTerm:
    """Mean squared error over the v components, summed over visual tokens."""
    return _total((prediction.float() - target.float()).square().mean(dim=-1), weights)


def visual_loss(name: VisualLossName) -> VisualLoss:
    """The visual loss of that name: a function of prediction, target "q v" and optional weights "q" that returns a LossTerm."""
    return {"cosine": cosine_loss, "l1": l1_loss, "mse": mse_loss}[name]


def _total(per_target: Float[Tensor, " q"], weights: Float[Tensor, " q"] | None) -> LossTerm:
    weighted = per_target if weights is None else per_target * weights.float()
    return LossTerm(weighted.sum(), torch.tensor(per_target.numel(), device=per_target.device), weighted.detach())
