"""Where a decoder begins: from a text-conditioned base, this world's, Stable Diffusion or Sana, then finetuned to read visual tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from metamorph.decoder.conditioning import VisualConditioner
from metamorph.decoder.denoiser import kind_of, last_layer, sizes_of, widen_input
from metamorph.decoder.library import Denoiser, SanaTransformer2DModel, UNet2DConditionModel
from metamorph.decoder.objective import DecoderModel, Objective
from metamorph.decoder.parts import DiffusionParts, load_parts
from metamorph.decoder.schedule import time_shift_of
from metamorph.errors import ConfigError


def from_base(
    base: DecoderModel,
    *,
    visual_width: int,
    num_visual_tokens: int,
    hidden_size: int = 256,
    map_channels: int = 16,
    map_hidden_size: int = 128,
    map_colours: int = 6,
    sketch: bool = False,
    objective: Objective | None = None,
) -> DecoderModel:
    """A decoder whose denoiser starts as a copy of the base's and reads `map_channels` more, with zero weights; its conditioner is new.

    With `sketch` (in pixel space: the map has as many channels as the sample) the last layer begins at zero, so that the first pictures
    are the sketch itself.
    """
    sizes, fold = sizes_of(base.denoiser), 1
    if sketch:
        map_channels = base.space.channels
        fold = base.space.patch
    conditioner = VisualConditioner(
        visual_width=visual_width,
        context_width=sizes.context_width,
        num_visual_tokens=num_visual_tokens,
        hidden_size=hidden_size,
        map_channels=map_channels,
        map_hidden_size=map_hidden_size,
        map_fold=fold,
        map_colours=map_colours,
        sketch=sketch,
        sample_size=sizes.sample_size,
    )
    denoiser = widen_input(base.denoiser, map_channels - base.map_channels)
    if sketch:
        for value in last_layer(denoiser).parameters():
            torch.nn.init.zeros_(value)
    return DecoderModel(denoiser, base.scheduler, conditioner, base.vae, objective or base.objective)


def from_pretrained_diffusion(
    path: str | Path, *, visual_width: int, num_visual_tokens: int, hidden_size: int = 2048, weights: bool = True
) -> DecoderModel:
    """A decoder start from a saved latent diffusion model, laid out as Stable Diffusion 1.5 or as Sana.

    Nothing of its text encoder, tokenizer or safety checker is read. The VAE is frozen; projector and denoiser train.

    Args:
        path: a directory, or the name of a model on the hub.
        visual_width: of a visual token.
        num_visual_tokens: of an image.
        hidden_size: of the projector; 2,048 in the paper.
        weights: off = only the shapes, on the meta device.

    Raises:
        CheckpointError: it is not laid out so, or has no weights in safetensors, or not all.
        ConfigError: its denoiser, VAE or scheduler is of a class that is not known.
    """
    parts = load_parts(path, weights=weights)
    start = _stable_diffusion_start if isinstance(parts.denoiser, UNet2DConditionModel) else _sana_start
    with torch.device("cpu" if weights else "meta"):
        return start(parts, visual_width, num_visual_tokens, hidden_size)


def from_stable_diffusion(
    path: str | Path, *, visual_width: int = 1152, num_visual_tokens: int = 64, hidden_size: int = 2048
) -> DecoderModel:
    """The paper's start: Stable Diffusion 1.5.

    The visual tokens take the place of the 77 text tokens, padded with zero rows; the VAE is frozen; 70% of conditions are dropped, and
    times are not shifted.

    Raises:
        CheckpointError, ConfigError: see `from_pretrained_diffusion`; or the denoiser is no U-Net.
    """
    parts = load_parts(path)
    _check_class(parts.denoiser, UNet2DConditionModel, path)
    return _stable_diffusion_start(parts, visual_width, num_visual_tokens, hidden_size)


def from_sana(path: str | Path, *, visual_width: int = 1152, num_visual_tokens: int = 64, hidden_size: int = 2048) -> DecoderModel:
    """A diffusion transformer with flow matching, of Sana's class: not the paper's, but the same way of conditioning.

    The transformer reads as many context rows as there are visual tokens, without padding. Times are drawn as Sana was trained (its
    released training configs): logit-normal, shifted by the scheduler's own shift. 70% of conditions are dropped, as in the paper.

    Raises:
        CheckpointError, ConfigError: see `from_pretrained_diffusion`; or the denoiser is no transformer.
    """
    parts = load_parts(path)
    _check_class(parts.denoiser, SanaTransformer2DModel, path)
    return _sana_start(parts, visual_width, num_visual_tokens, hidden_size)


def _stable_diffusion_start(parts: DiffusionParts, visual_width: int, num_visual_tokens: int, hidden_size: int) -> DecoderModel:
    conditioner = _projector(parts.denoiser, visual_width, num_visual_tokens, hidden_size, pad_to=max(77, num_visual_tokens))
    objective = Objective(times="uniform", time_shift=1.0, condition_dropout=0.7)
    return DecoderModel(parts.denoiser, parts.scheduler, conditioner, parts.vae, objective)


def _sana_start(parts: DiffusionParts, visual_width: int, num_visual_tokens: int, hidden_size: int) -> DecoderModel:
    conditioner = _projector(parts.denoiser, visual_width, num_visual_tokens, hidden_size)
    objective = Objective(times="logit_normal", time_shift=time_shift_of(parts.scheduler), condition_dropout=0.7)
    return DecoderModel(parts.denoiser, parts.scheduler, conditioner, parts.vae, objective)


def _projector(
    denoiser: Denoiser, visual_width: int, num_visual_tokens: int, hidden_size: int, pad_to: int | None = None
) -> VisualConditioner:
    sizes = sizes_of(denoiser)
    return VisualConditioner(
        visual_width=visual_width,
        context_width=sizes.context_width,
        num_visual_tokens=num_visual_tokens,
        hidden_size=hidden_size,
        pad_to=pad_to,
        sample_size=sizes.sample_size,
    )


def _check_class(denoiser: Denoiser, expected: type, path: str | Path) -> None:
    if not isinstance(denoiser, expected):
        found = f"{type(denoiser).__name__} in {kind_of(denoiser).part}/"
        raise ConfigError(f"{found} but {expected.__name__} was expected ({path}). Use `from_pretrained_diffusion`, which takes both.")
