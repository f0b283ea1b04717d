"""Muon: the momentum of a matrix is made orthogonal before it is applied, so that all its directions move alike.

Muon is the work of Keller Jordan and others (2024); the scale by which one learning rate serves both kinds of parameters is that of
"Muon is Scalable for LLM Training" (Liu and others, 2025). `torch.optim.Muon` computes in bfloat16, which many CPUs only emulate, and one
matrix at a time; here equal shapes are stacked and computed in float32.

Axes: s matrices of one shape, r rows, c columns (r <= c).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
STACKED_WEIGHTS = 2**26
"""Weights made orthogonal at once: bounds the memory beside the model."""
RMS_OF_ADAMW = 0.2
"""The root mean square of a typical AdamW update, to which an orthogonal one is scaled."""


def orthogonalized(matrices: Float[Tensor, "s r c"]) -> Float[Tensor, "s r c"]:
    """Matrices with the same singular vectors and all singular values near 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """Muon in the parameter groups with `orthogonal=True` (matrices only), AdamW in all others, at one scale of learning rates."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters. The gradients of orthogonal groups are consumed."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_orthogonal(group)
        super().step()  # passes over parameters without a gradient
        return loss

    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[min(parameter.shape), max(parameter.shape)].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            at_once = max(1, STACKED_WEIGHTS // (rows * columns))
            for start in range(0, len(parameters), at_once):
                self._move(parameters[start : start + at_once], group["lr"], group["weight_decay"], RMS_OF_ADAMW * columns**0.5)

    def _move(self, parameters: list[nn.Parameter], rate: float, decay: float, scale: float) -> None:
        """One update of matrices of one shape, tall ones turned."""
        updates = orthogonalized(torch.stack([_wide(self._direction(parameter)) for parameter in parameters]))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - rate * decay)
            parameter.add_(update if parameter.shape[0] <= parameter.shape[1] else update.T, alpha=-rate * scale)
            parameter.grad = None

    def _direction(self, parameter: nn.Parameter) -> Float[Tensor, "rows columns"]:
        """Nesterov momentum; zeros where the gradient is zero, for what the step did not use must not drift at full size."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].mul_(MOMENTUM).add_(gradient)
        return torch.where(gradient.any(), gradient + MOMENTUM * momentum, 0.0).float()


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def hidden_matrices(model: nn.Module) -> set[Tensor]:
    """The weights that Muon is for: those of all linear layers but output heads; never embeddings."""
    outer: set[Tensor] = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module):
            outer.update(head.parameters(recurse=False))
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return linear - outer
