"""The microworld's diffusion base (this world's Stable Diffusion: text in, picture out) and the decoder's data.

Axes: n images, l text positions, c width of the text states, k visual tokens per image, v vision width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metamorph.decoder.batches import DecoderBatch, image_seeds
from metamorph.microworld.scenes import crop_cell, render
from metamorph.microworld.vision import ENCODER_RULES, NUM_VISUAL_TOKENS, TEXT_LENGTH, WIDTH, to_pixels, training_picture
from metamorph.microworld.world import choose, sample_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SiglipModel

    from metamorph.decoder.objective import DecoderModel

_BASE_SEED, _DECODER_SEED = 31, 32
_CROP_RATE = 0.15

DECODER_CONDITIONER: dict[str, Any] = {"map_hidden_size": 256, "sketch": True}
# Noise on the condition, because at inference it gets tokens that a language model predicted.
DECODER_OBJECTIVE: dict[str, Any] = {"times": "uniform", "time_shift": 2.0, "condition_dropout": 0.1, "condition_noise": 0.15}


def new_base() -> DecoderModel:
    """A fresh text-conditioned denoiser that predicts the clean picture."""
    from metamorph.decoder.denoiser import build_scheduler, microworld_denoiser
    from metamorph.decoder.objective import DecoderModel, Objective

    objective = Objective(times="uniform", time_shift=2.0, condition_dropout=0.1)
    return DecoderModel(microworld_denoiser(WIDTH), build_scheduler("sample"), objective=objective)


def decoder_from_base(base: Path) -> DecoderModel:
    """A decoder that starts from a saved text-conditioned base; its spatial path sketches the picture, which the denoiser completes."""
    from metamorph.decoder.objective import DecoderModel, Objective
    from metamorph.decoder.pipeline import VisualDecoderPipeline
    from metamorph.decoder.starts import from_base

    pipeline = VisualDecoderPipeline.from_pretrained(base)
    start = DecoderModel(pipeline.unet, pipeline.scheduler)
    objective = Objective(**DECODER_OBJECTIVE)
    return from_base(start, visual_width=WIDTH, num_visual_tokens=NUM_VISUAL_TOKENS, **DECODER_CONDITIONER, objective=objective)


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


def decoder_batches(encode: Callable[[Tensor], Float[Tensor, "n k v"]], size: int, seed: int = 0) -> Callable[[int], DecoderBatch]:
    """Batches by number: the decoder's own pictures and their visual tokens, no captions."""

    def make(step: int) -> DecoderBatch:
        rng = np.random.default_rng([_DECODER_SEED, seed, step])
        pixels = to_pixels([decoder_picture(rng) for _ in range(size)])
        return DecoderBatch(pixels=pixels, seeds=image_seeds(seed + 1, step, size), tokens=encode(pixels))

    return make
