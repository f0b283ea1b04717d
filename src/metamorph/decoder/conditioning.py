"""From visual tokens to what the denoiser reads: a context for cross-attention and, beside it, a map of the image's layout.

Axes: n images, k visual tokens per image (a square grid), v vision width, l context positions, c context width, m map channels,
s side of the denoiser's sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metamorph.decoder.library import ConfigMixin, ModelMixin, register_to_config
from metamorph.errors import AlignmentError, ConfigError


class Condition(NamedTuple):
    """What the denoiser is told about an image. All zeros means: nothing."""

    context: Float[Tensor, "n l c"]
    map: Float[Tensor, "n m s s"] | None

    def where(self, keep: Tensor) -> Condition:
        """The condition of the images where `keep` "n" is true, zeros elsewhere."""
        context = self.context * keep[:, None, None].to(self.context.dtype)
        return Condition(context, None if self.map is None else self.map * keep[:, None, None, None].to(self.map.dtype))


class SpatialPath(nn.Module):
    """Lays the tokens out as a grid and lets each describe its own patch of the sample, knowing its neighbours (sub-pixel upsampling).

    Cross-attention alone learns what is in an image long before it learns where; the layout is given at once by a map.
    """

    def __init__(self, visual_width: int, hidden_size: int, channels: int, grid: int, sample_size: int):
        super().__init__()
        self.grid, self.factor = grid, sample_size // grid
        self.read = nn.Sequential(nn.Linear(visual_width, hidden_size), nn.LayerNorm(hidden_size), nn.SiLU())
        self.mix = nn.Conv2d(hidden_size, hidden_size, 3, padding=1)
        self.expand = nn.Conv2d(hidden_size, channels * self.factor**2, 1)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, tokens: Float[Tensor, "n k v"]) -> Float[Tensor, "n m s s"]:
        """The map of each image."""
        cells = self.read(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        cells = cells + F.silu(self.mix(cells))
        return self.smooth(F.pixel_shuffle(self.expand(cells), self.factor))


class VisualConditioner(ModelMixin, ConfigMixin):
    """Projects visual tokens to the denoiser's context; with `map_channels` also to a map that is concatenated to its input.

    The projector is the paper's (v -> hidden -> c, LayerNorm and ReLU between, LayerNorm last), and so are the zero rows up to `pad_to`.

    Raises:
        ConfigError: the tokens form no square grid, or the grid does not divide `sample_size`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        visual_width: int,
        context_width: int,
        num_visual_tokens: int = 64,
        hidden_size: int = 2048,
        pad_to: int | None = None,
        map_channels: int = 0,
        map_hidden_size: int = 128,
        sample_size: int = 32,
    ):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(visual_width, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, context_width),
            nn.LayerNorm(context_width),
        )
        if pad_to is not None and pad_to < num_visual_tokens:
            raise ConfigError(
                f"pad_to={pad_to} but there are {num_visual_tokens} visual tokens (decoder conditioner). Raise pad_to or leave it out."
            )
        self.spatial: SpatialPath | None = None
        if map_channels:
            grid = math.isqrt(num_visual_tokens)
            if grid**2 != num_visual_tokens or sample_size % grid:
                raise ConfigError(
                    f"{num_visual_tokens} visual tokens but a square grid that divides sample_size={sample_size} is needed "
                    "(decoder conditioner). Set map_channels=0 or choose other sizes."
                )
            self.spatial = SpatialPath(visual_width, map_hidden_size, map_channels, grid, sample_size)

    def forward(self, visual_tokens: Float[Tensor, "n k v"]) -> Condition:
        """Context and map of each image.

        Raises:
            AlignmentError: another number or width of tokens than in the config.
        """
        expected = (self.config["num_visual_tokens"], self.config["visual_width"])
        if tuple(visual_tokens.shape[1:]) != expected:
            found = " x ".join(map(str, visual_tokens.shape[1:]))
            raise AlignmentError(
                f"{found} visual tokens but {expected[0]} x {expected[1]} (decoder conditioner). Use the decoder made for this encoder."
            )
        context = self.projector(visual_tokens)
        if pad_to := self.config["pad_to"]:
            context = F.pad(context, (0, 0, 0, pad_to - context.shape[1]))
        return Condition(context, None if self.spatial is None else self.spatial(visual_tokens))


def given_context(context: Float[Tensor, "n l c"], map_channels: int, sample_size: int) -> Condition:
    """A condition from a ready context (a text), with an empty map of `map_channels` (none if 0)."""
    empty = torch.zeros(len(context), map_channels, sample_size, sample_size, dtype=context.dtype, device=context.device)
    return Condition(context, empty if map_channels else None)
