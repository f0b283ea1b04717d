"""An exponential moving average of trained weights, which draws better than the last weights do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from metamorph.errors import ConfigError


class WeightAverage:
    """Follows the trainable parameters of a model: average = decay x average + (1 - decay) x weight, after each update.

    Early on the decay is (1 + updates) / (10 + updates), so that the first, random weights are forgotten soon.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ConfigError(f"decay={decay} but 0 <= decay < 1 (weight average). Choose for example 0.999.")
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.int64)
        self.averages = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step toward the model's weights."""
        self.updates += 1
        number = int(self.updates)
        decay = min(self.decay, (1 + number) / (10 + number))
        for name, value in model.named_parameters():
            if name in self.averages:
                self.averages[name] = _placed_like(value, self.averages[name])
                self.averages[name].lerp_(value.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averages."""
        for name, value in model.named_parameters():
            if name in self.averages:
                value.copy_(self.averages[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averages, inside the block; its own weights again after it."""
        own = {name: value.detach().clone() for name, value in model.named_parameters() if name in self.averages}
        self.copy_to(model)
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if name in own:
                        value.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages themselves (not copies), and the number of updates."""
        return {"updates": self.updates, **self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises:
            ConfigError: it is of another model.
        """
        if set(state) != set(self.state_dict()):
            raise ConfigError(
                f"averages of {len(state) - 1} weights but {len(self.averages)} are trained (weight average). Load those of this model."
            )
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def _placed_like(weight: Tensor, average: Tensor) -> Tensor:
    """The average on the weight's device, and sharded over processes as the weight is: the model may have been moved since."""
    average = average.to(weight.device)
    if isinstance(weight, DTensor) and not isinstance(average, DTensor):
        return distribute_tensor(average, weight.device_mesh, weight.placements)
    return average
