"""A small training run, started by tests as a process of its own: alone (to be killed) or under torchrun."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamorph.losses import LossTerm
from metamorph.training import TrainingConfig, train
from metamorph.training.device import rank, world_size
from metamorph.training.trackers import SilentTracker


@dataclass(frozen=True)
class Rows:
    """Inputs "r 8" with two kinds of targets, unevenly spread over the rows."""

    x: Tensor
    classes: Tensor
    drawn: Tensor
    ids: tuple[str, ...]

    @property
    def target_counts(self) -> dict[str, int]:
        return {"text": int((self.classes >= 0).sum()), "visual": int(self.drawn.sum())}

    def to(self, device: Any) -> "Rows":
        return Rows(self.x.to(device), self.classes.to(device), self.drawn.to(device), self.ids)


class Stream:
    """Twelve rows a step; each process takes its share, the first in more micro-batches than the second."""

    def __init__(self, poison: int | None = None) -> None:
        self.taken, self.poison = 0, poison

    def __next__(self) -> list[Rows]:
        self.taken += 1
        generator = torch.Generator().manual_seed(self.taken)
        x = torch.randn(12, 8, generator=generator)
        classes = torch.where(torch.arange(12) < 5, torch.randint(0, 3, (12,), generator=generator), -1)
        drawn = torch.arange(12) > 8  # the second process alone draws, the first alone has words
        if self.poison == self.taken:
            x[11] = float("inf")
        cuts = {(0, 1): [slice(0, 12)], (0, 2): [slice(0, 1), slice(1, 4), slice(4, 6)], (1, 2): [slice(6, 12)]}[(self.rank, self.world)]
        return [Rows(x[cut], classes[cut], drawn[cut], tuple(f"row{i}" for i in range(12)[cut])) for cut in cuts]

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world(self) -> int:
        return world_size()

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class Model(nn.Module):
    """Layers in a list, two heads, a tied pair, and a part that only pictures need."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(8, 8)]).requires_grad_(False)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)])
        self.norm, self.text, self.visual = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(8, 8)
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.visual.weight


def step(model: Model, batch: Rows) -> dict[str, LossTerm]:
    hidden = batch.x
    for layer in model.layers:
        hidden = hidden + layer(hidden)
    hidden = model.norm(model.last(hidden))
    text = nn.functional.cross_entropy(model.text(hidden), batch.classes, ignore_index=-1, reduction="sum")
    visual = 0.0 * model.visual(hidden).sum()
    if batch.drawn.any():  # as a frozen encoder, run only where there are pictures
        visual = visual + (model.visual(hidden) - model.encoder[0](batch.x)).square().mean(1)[batch.drawn].sum()
    return {"text": LossTerm(text, (batch.classes >= 0).sum()), "visual": LossTerm(visual, batch.drawn.sum())}


class Slow(SilentTracker):
    """Leaves time in which to be killed."""

    def log(self, row) -> None:
        time.sleep(0.05)


def main(run_dir: str, steps: str, resume: str, slow: str, poison: str) -> None:
    torch.manual_seed(0)
    config = TrainingConfig(steps=int(steps), learning_rate=1e-2, precision="float32", log_every=1, checkpoint_every=4, device="cpu")
    config = config.model_copy(update={"weight_decay": 0.1, "grad_clip": 0.5})
    tracker = Slow() if slow == "slow" else SilentTracker()
    stream = Stream(int(poison) if poison != "clean" else None)
    train(step, Model(), stream, config, Path(run_dir), tracker=tracker, resume=resume == "resume", replicate=("encoder",))


if __name__ == "__main__":
    main(*sys.argv[1:])
