"""The microworld's diffusion base (this world's Stable Diffusion: text in, picture out) and the decoder's data.

Axes: n images, l text positions, c width of the text states, k visual tokens per image, v vision width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from metamorph.decoder.batches import DecoderBatch, image_seeds
from metamorph.microworld.scenes import crop_cell, render
from metamorph.microworld.vision import ENCODER_RULES, NUM_VISUAL_TOKENS, TEXT_LENGTH, WIDTH, to_pixels, training_picture
from metamorph.microworld.world import choose, sample_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SiglipModel

    from metamorph.decoder.objective import DecoderModel

_BASE_SEED, _DECODER_SEED, _ERROR_SEED = 31, 32, 33
_CROP_RATE = 0.15

DECODER_CONDITIONER: dict[str, Any] = {"map_hidden_size": 256, "sketch": True}
# Noise on the condition, because at inference it gets tokens that a language model predicted; see also `RegressionErrors`.
DECODER_OBJECTIVE: dict[str, Any] = {"times": "uniform", "time_shift": 2.0, "condition_dropout": 0.1, "condition_noise": 0.15}


def new_base() -> DecoderModel:
    """A fresh text-conditioned denoiser that predicts the clean picture."""
    from metamorph.decoder.denoiser import microworld_denoiser
    from metamorph.decoder.objective import DecoderModel, Objective
    from metamorph.decoder.schedule import build_scheduler

    objective = Objective(times="uniform", time_shift=2.0, condition_dropout=0.1)
    return DecoderModel(microworld_denoiser(WIDTH), build_scheduler("sample"), objective=objective)


def decoder_from_base(base: Path, num_visual_tokens: int = NUM_VISUAL_TOKENS) -> DecoderModel:
    """A decoder that starts from a saved text-conditioned base; its spatial path sketches the picture, which the denoiser completes."""
    from metamorph.decoder.objective import DecoderModel, Objective
    from metamorph.decoder.pipeline import VisualDecoderPipeline
    from metamorph.decoder.starts import from_base

    pipeline = VisualDecoderPipeline.from_pretrained(base)
    start = DecoderModel(pipeline.denoiser, pipeline.scheduler)
    objective = Objective(**DECODER_OBJECTIVE)
    return from_base(start, visual_width=WIDTH, num_visual_tokens=num_visual_tokens, **DECODER_CONDITIONER, objective=objective)


def base_batches(siglip: SiglipModel, tokenizer: PreTrainedTokenizerFast, size: int, seed: int = 0) -> Callable[[int], DecoderBatch]:
    """Batches by number: pictures, and the states of the encoder's frozen text tower for their captions."""

    def make(step: int) -> DecoderBatch:
        rng = np.random.default_rng([_BASE_SEED, seed, step])
        shown = [training_picture(rng) for _ in range(size)]
        pictures, captions = [one.pixels for one in shown], [one.caption for one in shown]
        texts = tokenizer(captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        with torch.no_grad():
            context = siglip.text_model(input_ids=texts["input_ids"]).last_hidden_state
        return DecoderBatch(
            pixels=to_pixels(pictures),
            seeds=image_seeds(seed, step, size),
            context=context,
            context_mask=texts["input_ids"] != tokenizer.pad_token_id,
        )

    return make


def decoder_picture(rng: np.random.Generator) -> np.ndarray:
    """One of the decoder's own images: a scene of any kind, or a crop of one."""
    scene = sample_scene(rng, ENCODER_RULES)
    pixels = render(scene)
    return crop_cell(pixels, choose(rng, scene.objects).cell) if rng.random() < _CROP_RATE else pixels


class RegressionErrors:
    """Makes true visual tokens look like predicted ones, so that the decoder learns to draw from those.

    Regression learns last what varies least: of a principal direction it predicts a share, here variance / (variance + r) as ridge
    regression does, with r drawn for each picture. Where it wavers between pictures it predicts their average: another picture's tokens are
    blended in, cell by cell. (Predictions of a short VPiT run had shares from 1.00 down to 0.05, falling with the variance; LAB_LOG.md.)

    Args:
        encode: pixels "n 3 h w" between -1 and 1 -> visual tokens "n k v", all on the CPU.
        ridge: least and greatest log10 of r.
        blend: greatest share of the other picture, uniform from 0 in each cell.
        rate: share of pictures that get errors; the others keep their true tokens, so that reconstruction stays good.
        num_pictures: from which means and directions are taken.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Float[Tensor, "n k v"]],
        ridge: tuple[float, float] = (-6.0, -2.7),
        blend: float = 0.4,
        rate: float = 0.5,
        num_pictures: int = 256,
    ):
        self.ridge, self.blend, self.rate = ridge, blend, rate
        rng = np.random.default_rng(_ERROR_SEED)
        tokens = encode(to_pixels([decoder_picture(rng) for _ in range(num_pictures)])).flatten(0, 1)
        self.mean: Float[Tensor, " v"] = tokens.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(tokens.T))
        self.variances: Float[Tensor, " v"] = variances.clamp(min=0)  # rising
        self.directions: Float[Tensor, "v v"] = directions  # the columns, in the order of the variances

    def __call__(self, tokens: Float[Tensor, "n k v"], rng: np.random.Generator) -> Float[Tensor, "n k v"]:
        """Tokens of which some have errors, of norm 1 as all visual tokens; partners for blends come from the same batch."""
        n, k, _ = tokens.shape
        half = math.isqrt(k) // 2  # a cell is a quarter of the grid
        blend = torch.tensor(rng.random((n, 2, 2)) * self.blend, dtype=torch.float32)
        blend = blend.repeat_interleave(half, 1).repeat_interleave(half, 2).reshape(n, k, 1)
        moved = tokens + blend * (tokens[torch.tensor(rng.permutation(n))] - tokens)
        ridge = torch.tensor(10 ** rng.uniform(*self.ridge, (n, 1, 1)), dtype=torch.float32)
        shares = self.variances / (self.variances + ridge)
        predicted = F.normalize(self.mean + ((moved - self.mean) @ self.directions * shares) @ self.directions.T, dim=-1)
        return torch.where(torch.tensor(rng.random((n, 1, 1)) < self.rate), predicted, tokens)


def decoder_batches(
    encode: Callable[[Tensor], Float[Tensor, "n k v"]], size: int, seed: int = 0, regression_errors: bool = False
) -> Callable[[int], DecoderBatch]:
    """Batches by number: the decoder's own pictures and their visual tokens, if asked for with the errors of prediction; no captions."""
    errors = RegressionErrors(encode) if regression_errors else None

    def make(step: int) -> DecoderBatch:
        rng = np.random.default_rng([_DECODER_SEED, seed, step])
        pixels = to_pixels([decoder_picture(rng) for _ in range(size)])
        tokens = encode(pixels)
        return DecoderBatch(pixels=pixels, seeds=image_seeds(seed + 1, step, size), tokens=errors(tokens, rng) if errors else tokens)

    return make
