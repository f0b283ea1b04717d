"""What the decoder learns from: images with their visual tokens (or, for a text-conditioned base, with a text), and a stream of them.

Axes: n images, k visual tokens per image, v vision width, l context positions, c context width, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metamorph.errors import AlignmentError


@dataclass(frozen=True, kw_only=True)
class DecoderBatch:
    """Images between -1 and 1, what conditions them, and one seed per image from which its noise, time and dropout are drawn.

    Raises:
        AlignmentError: the parts are not of equally many images, or not exactly one of `tokens` and `context` is given.
    """

    pixels: Float[Tensor, "n 3 h w"]
    seeds: tuple[int, ...]
    tokens: Float[Tensor, "n k v"] | None = None
    context: Float[Tensor, "n l c"] | None = None
    context_mask: Bool[Tensor, "n l"] | None = None  # true where the context is real; None: everywhere
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that every image has its condition and its seed."""
        place = f"records {', '.join(self.ids)}" if self.ids else "a batch without ids"
        given = [one for one in (self.tokens, self.context) if one is not None]
        if len(given) != 1:
            raise AlignmentError(f"{len(given)} of `tokens` and `context` but exactly one conditions an image ({place}). Give one.")
        if not len(given[0]) == len(self.seeds) == len(self.pixels):
            raise AlignmentError(
                f"{len(given[0])} conditions and {len(self.seeds)} seeds but {len(self.pixels)} images ({place}). Give each image one."
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    @property
    def target_counts(self) -> dict[str, int]:
        """One target per image."""
        return {"decoder": len(self)}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DecoderBatch:
        """Move every tensor to `device`, and floating-point ones to `dtype`, if given."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        return replace(self, **moved)


def image_seeds(seed: int, step: int, count: int) -> tuple[int, ...]:
    """Well-mixed seeds for the `count` images of a step, the same at every run."""
    return tuple(int(value >> 1) for value in np.random.SeedSequence([seed, step]).generate_state(count, np.uint64))


class DecoderStream:
    """Batches without end, each a pure function of its number, so that a resumed run sees exactly what an uninterrupted one sees."""

    def __init__(self, make: Callable[[int], DecoderBatch | Sequence[DecoderBatch]]):
        """`make` gives the batch, or the micro-batches, of step 0, 1, 2 ..."""
        self.make = make
        self.step = 0

    def __iter__(self) -> DecoderStream:
        return self

    def __next__(self) -> list[DecoderBatch]:
        made = self.make(self.step)
        self.step += 1
        return [made] if isinstance(made, DecoderBatch) else list(made)

    def state_dict(self) -> dict[str, Any]:
        """Number of steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that many steps."""
        self.step = state["step"]
