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
from metamorph.decoder.spatial import SpatialPath, unit_reader
from metamorph.errors import AlignmentError, ConfigError


class Condition(NamedTuple):
    """What the denoiser is told about an image. All zeros means: nothing."""

    context: Float[Tensor, "n l c"]
    map: Float[Tensor, "n m s s"] | None
    sketch: Float[Tensor, "n m s s"] | None = None
    """A first guess of the clean sample; the denoiser then predicts only what it lacks."""

    def where(self, keep: Tensor) -> Condition:
        """The condition of the images where `keep` "n" is true, zeros elsewhere."""
        return Condition(*(None if one is None else one * keep.view(-1, *[1] * (one.ndim - 1)).to(one.dtype) for one in self))


class VisualConditioner(ModelMixin, ConfigMixin):
    """Projects visual tokens to the denoiser's context; with `map_channels` also to a map that is concatenated to its input.

    The projector is the paper's (v -> hidden -> c, LayerNorm and ReLU between, LayerNorm last), and so are the zero rows up to `pad_to`.

    With `sketch` the map is a first guess of the picture itself, whose error is added to the loss, and the denoiser adds what it lacks.

    Raises:
        ConfigError: the tokens form no square grid, the grid does not divide `sample_size`, or `map_fold`^2 not `map_channels`.
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
        map_fold: int = 1,
        map_colours: int = 6,
        sketch: bool = False,
        sample_size: int = 32,
    ):
        super().__init__()
        self.projector = nn.Sequential(
            unit_reader(visual_width, hidden_size),
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
            if map_channels % map_fold**2:
                raise ConfigError(
                    f"map_channels={map_channels} but a multiple of map_fold^2 = {map_fold**2} is needed (decoder conditioner). "
                    "Choose other sizes."
                )
            self.spatial = SpatialPath(visual_width, map_hidden_size, map_channels, grid, sample_size, map_fold, map_colours)

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
        layout = None if self.spatial is None else self.spatial(visual_tokens)
        return Condition(context, layout, layout if self.config["sketch"] else None)


def given_context(context: Float[Tensor, "n l c"], map_channels: int, sample_size: int) -> Condition:
    """A condition from a ready context (a text), with an empty map of `map_channels` (none if 0)."""
    empty = torch.zeros(len(context), map_channels, sample_size, sample_size, dtype=context.dtype, device=context.device)
    return Condition(context, empty if map_channels else None)
