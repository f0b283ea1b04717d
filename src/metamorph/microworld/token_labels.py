"""Token labelling: every single visual token is asked what stands in its own cell.

The captioner reads all tokens at once and so lets an attribute be spread over the tokens of a cell: shape was at
0.99 for a probe on the four tokens side by side, but at 0.39 on one of them (linear), and a language model that
reads them one by one then learns shapes last. Dense labels per token as in LV-ViT (Jiang et al. 2021) mend that.

Axes: b images, k visual tokens per image, a attributes, v vision width.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from metamorph.batch import IGNORE_INDEX
from metamorph.microworld.scenes import BACKGROUNDS, COLOURS, GLYPHS, MARKINGS, SHAPES, SIZES, TINY, Scene

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "occupied": ("empty", "occupied"),
    "shape": (*SHAPES, *GLYPHS),
    "colour": COLOURS,
    "size": (*SIZES, TINY),
    "marking": MARKINGS,
}


def cell_labels(scene: Scene, cell: int) -> list[int]:
    """One label per attribute; an empty cell has none for those of an object."""
    thing = scene.at(cell)
    known = [BACKGROUNDS.index(scene.background), int(thing is not None)]
    if thing is None:
        return known + [IGNORE_INDEX] * (len(ATTRIBUTES) - 2)
    return known + [ATTRIBUTES[name].index(getattr(thing, name)) for name in list(ATTRIBUTES)[2:]]


def cells_of_tokens(num_tokens: int) -> list[int]:
    """The cell in which each token of a square grid lies."""
    side = round(num_tokens**0.5)
    return [2 * (2 * row // side) + 2 * column // side for row in range(side) for column in range(side)]


def token_labels(scene: Scene, num_tokens: int) -> Int64[np.ndarray, "k a"]:
    """Labels of all tokens, a square grid over the 2 x 2 cells."""
    return np.array([cell_labels(scene, cell) for cell in cells_of_tokens(num_tokens)], dtype=np.int64)


def crop_labels(scene: Scene, cell: int, num_tokens: int) -> Int64[np.ndarray, "k a"]:
    """Labels of a picture that shows one cell enlarged: the same for all tokens."""
    return np.array([cell_labels(scene, cell)] * num_tokens, dtype=np.int64)


class TokenReader(nn.Module):
    """One linear layer from a visual token to the values of every attribute."""

    def __init__(self, visual_width: int) -> None:
        super().__init__()
        self.scale = visual_width**0.5  # tokens have length 1; this brings their components to the size of activations
        self.head = nn.Linear(visual_width, sum(map(len, ATTRIBUTES.values())))

    def loss_sum(self, tokens: Float[Tensor, "b k v"], labels: Int64[Tensor, "b k a"]) -> Float[Tensor, ""]:
        """Cross-entropy summed over all labels that there are."""
        logits = self.head(tokens * self.scale).split([len(values) for values in ATTRIBUTES.values()], dim=-1)
        sums = [
            F.cross_entropy(one.flatten(0, 1), labels[..., index].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
            for index, one in enumerate(logits)
        ]
        return torch.stack(sums).sum()
