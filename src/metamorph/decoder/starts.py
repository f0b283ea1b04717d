"""Where a decoder begins: from a text-conditioned base, this world's or Stable Diffusion, which is then finetuned to read visual tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from metamorph.decoder.conditioning import VisualConditioner
from metamorph.decoder.denoiser import widen_input
from metamorph.decoder.library import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from metamorph.decoder.objective import DecoderModel, Objective


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
    fold = 1
    if sketch:
        map_channels = base.space.channels
        fold = base.space.patch
    conditioner = VisualConditioner(
        visual_width=visual_width,
        context_width=base.unet.config["cross_attention_dim"],
        num_visual_tokens=num_visual_tokens,
        hidden_size=hidden_size,
        map_channels=map_channels,
        map_hidden_size=map_hidden_size,
        map_fold=fold,
        map_colours=map_colours,
        sketch=sketch,
        sample_size=base.unet.config["sample_size"],
    )
    unet = widen_input(base.unet, map_channels - base.map_channels)
    if sketch:
        for value in unet.conv_out.parameters():
            torch.nn.init.zeros_(value)
    return DecoderModel(unet, base.scheduler, conditioner, base.vae, objective or base.objective)


def from_stable_diffusion(
    path: str | Path, *, visual_width: int = 1152, num_visual_tokens: int = 64, hidden_size: int = 2048
) -> DecoderModel:
    """The paper's start: a directory or hub name laid out as Stable Diffusion 1.5 (unet/, vae/, scheduler/); its text encoder is not read.

    The visual tokens take the place of the 77 text tokens, padded with zero rows; the VAE is frozen; 70% of conditions are dropped, and
    times are not shifted.
    """
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", use_safetensors=True)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae", use_safetensors=True)
    scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
    conditioner = VisualConditioner(
        visual_width=visual_width,
        context_width=unet.config["cross_attention_dim"],
        num_visual_tokens=num_visual_tokens,
        hidden_size=hidden_size,
        pad_to=max(77, num_visual_tokens),
        sample_size=unet.config["sample_size"],
    )
    return DecoderModel(unet, scheduler, conditioner, vae, Objective(time_shift=1.0, condition_dropout=0.7))
