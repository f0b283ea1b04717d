"""The encoder's gate: what can be read from the k visual tokens of a picture.

Axes: n pictures, k visual tokens per image, v vision width, c the values of an attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from metamorph.batch import IGNORE_INDEX
from metamorph.microworld.scenes import BACKGROUNDS, COLOURS, MARKINGS, SHAPES, SIZES, Scene, render
from metamorph.microworld.token_labels import ATTRIBUTES, cell_labels, cells_of_tokens
from metamorph.microworld.vision import to_pixels
from metamorph.microworld.world import SceneRules, sample_scene

GATED = ("shape", "colour", "size", "cell", "background")
_VALUES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "marking": MARKINGS, "cell": (False, True), "background": BACKGROUNDS}
Encode = Callable[[Tensor], Float[Tensor, "n k v"]]


def _labels(scene: Scene, attribute: str) -> list[int]:
    """One label per cell (empty cells have none, but for "cell" itself), or one for the whole picture."""
    column = list(ATTRIBUTES).index("occupied" if attribute == "cell" else attribute)
    labels = [cell_labels(scene, cell)[column] for cell in range(4)]
    return labels[:1] if attribute == "background" else labels


@torch.no_grad()
def probe_data(encode: Encode, count: int, seed: int, split: str) -> tuple[Float[Tensor, "n k v"], dict[str, Int64[Tensor, "n cells"]]]:
    """Visual tokens of fresh pictures, and the truth about them."""
    rng = np.random.default_rng([seed, len(split)])
    rules = SceneRules(use="any", split="test" if split == "test" else "train", marking_rate=0.4)
    scenes = [sample_scene(rng, rules) for _ in range(count)]
    tokens = [encode(to_pixels([render(scene) for scene in scenes[start : start + 100]])) for start in range(0, count, 100)]
    return torch.cat(tokens), {name: torch.tensor([_labels(scene, name) for scene in scenes]) for name in _VALUES}


def _features(tokens: Float[Tensor, "n k v"], attribute: str) -> Float[Tensor, "n cells f"]:
    """The tokens that a probe reads: those of each cell side by side, or the mean of all for the background."""
    if attribute == "background":
        return tokens.mean(dim=1, keepdim=True) * tokens.shape[-1] ** 0.5
    side = int(tokens.shape[1] ** 0.5)
    grid = tokens.unflatten(1, (2, side // 2, 2, side // 2)).transpose(2, 3)
    return grid.reshape(len(tokens), 4, -1) * tokens.shape[-1] ** 0.5


def _fit(features: Tensor, labels: Tensor, values: int, hidden: int | None, seed: int) -> nn.Module:
    """A linear probe, or one hidden layer, by Adam on all cells that have a label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = features.shape[-1]
        probe = (
            nn.Linear(width, values) if hidden is None else nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, values))
        )
    kept = labels != IGNORE_INDEX
    x, y = features[kept], labels[kept]
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1e-2)
    steps, order = 600, torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(probe(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return probe


def run_probes(encode: Encode, *, train: int = 6000, test: int = 1000, seed: int = 0) -> Mapping[str, float]:
    """Accuracy on test scenes of a small MLP (the gated figure) and of a linear probe, for every attribute.

    "_linear_single" is a linear probe on one token, asked about its own cell: what a language model can read without joining positions.
    """
    tokens, truth = probe_data(encode, train, seed, "train")
    test_tokens, test_truth = probe_data(encode, test, seed + 1, "test")
    scores: dict[str, float] = {}
    for name, values in _VALUES.items():
        seen, seen_test = _features(tokens, name), _features(test_tokens, name)
        for suffix, hidden in (("", 128), ("_linear", None)):
            scores[name + suffix] = _score(seen, truth[name], seen_test, test_truth[name], len(values), hidden, seed)
    for name in ("shape", "colour", "size", "marking"):
        ours, theirs = (_single(one, labels[name]) for one, labels in ((tokens, truth), (test_tokens, test_truth)))
        scores[f"{name}_linear_single"] = _score(*ours, *theirs, len(_VALUES[name]), None, seed)
    return scores


def _single(tokens: Float[Tensor, "n k v"], labels: Int64[Tensor, "n cells"]) -> tuple[Float[Tensor, "n k v"], Int64[Tensor, "n k"]]:
    """Every token alone, with the label of the cell in which it lies."""
    return tokens * tokens.shape[-1] ** 0.5, labels[:, cells_of_tokens(tokens.shape[1])]


def _score(seen: Tensor, truth: Tensor, seen_test: Tensor, test_truth: Tensor, values: int, hidden: int | None, seed: int) -> float:
    """Accuracy of a probe fitted to the one and asked about the other."""
    probe, kept = _fit(seen, truth, values, hidden, seed), test_truth != IGNORE_INDEX
    with torch.no_grad():
        guess = probe(seen_test[kept]).argmax(-1)
    return round(float((guess == test_truth[kept]).float().mean()), 4)
