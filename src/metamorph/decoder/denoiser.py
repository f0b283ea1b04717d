"""The denoiser (a U-Net of diffusers), its sample space, and its schedulers.

Axes: n images, h and w pixels, p = 3 * patch^2 sample channels, s side of the sample.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metamorph.decoder.library import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, Scheduler, UNet2DConditionModel
from metamorph.errors import ConfigError

Prediction = Literal["flow", "epsilon", "v_prediction", "sample"]


def build_denoiser(
    *,
    image_size: int,
    patch: int,
    context_width: int,
    channels: tuple[int, ...],
    attention: tuple[bool, ...],
    map_channels: int = 0,
    layers_per_block: int = 1,
    num_heads: int = 2,
) -> UNet2DConditionModel:
    """A U-Net on images whose patches of `patch` x `patch` pixels are channels.

    Args:
        image_size: pixels per side.
        patch: pixels per side that become channels of one position.
        context_width: width of the cross-attention context.
        channels: width of each resolution, finest first.
        attention: whether each resolution attends (to itself and to the context).
        map_channels: channels of the conditioner's map, read beside the sample.
        layers_per_block: residual blocks per resolution.
        num_heads: attention heads.

    Raises:
        ConfigError: the image is not divided evenly, or `channels` and `attention` differ in length.
    """
    if len(channels) != len(attention):
        raise ConfigError(f"{len(attention)} attention flags but {len(channels)} resolutions (denoiser). Give one flag for each.")
    if image_size % (patch * 2 ** (len(channels) - 1)):
        raise ConfigError(
            f"{image_size} pixels but {len(channels)} resolutions of patches of {patch} (denoiser). Choose a size they divide."
        )
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention))
    return UNet2DConditionModel(
        sample_size=image_size // patch,
        in_channels=3 * patch**2 + map_channels,
        out_channels=3 * patch**2,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        cross_attention_dim=context_width,
        attention_head_dim=num_heads,  # diffusers' name for the number of heads of this model
        norm_num_groups=8,
    )


def microworld_denoiser(context_width: int = 128, map_channels: int = 0) -> UNet2DConditionModel:
    """The microworld's: 64 x 64 pixels as 48 x 16 x 16, attention at the coarser resolution only, made for one CPU core."""
    return build_denoiser(
        image_size=64, patch=4, context_width=context_width, channels=(64, 64), attention=(False, True), map_channels=map_channels
    )


def build_scheduler(prediction: Prediction, *, time_shift: float = 1.0) -> Scheduler:
    """What samples a denoiser trained with `prediction`: Euler steps along a flow (`time_shift` > 1: more of them on noise), or DDIM."""
    if prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=time_shift)
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction,
        timestep_spacing="trailing",  # begins at pure noise, which matters with few steps
        rescale_betas_zero_snr=prediction != "epsilon",  # epsilon says nothing about the image at zero signal
    )


def prediction_of(scheduler: Scheduler) -> Prediction:
    """What a denoiser sampled by `scheduler` must predict.

    Raises:
        ConfigError: a prediction type other than epsilon or v_prediction.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    found = scheduler.config["prediction_type"]
    if found not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"prediction_type={found!r} but epsilon, v_prediction or sample is needed (decoder scheduler). Choose another scheduler."
        )
    return found


class SampleSpace:
    """Where diffusion happens: a frozen VAE's latents or, without one, pixels with each patch folded into channels."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL | None):
        self.vae = vae
        self.channels: int = unet.config["out_channels"]
        self.size: int = unet.config["sample_size"]
        self.patch = math.isqrt(self.channels // 3) if vae is None else 1
        if vae is None and 3 * self.patch**2 != self.channels:
            raise ConfigError(
                f"{self.channels} sample channels but 3 x patch^2 without a VAE (decoder). Give the VAE that the denoiser was trained with."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one sample."""
        return self.channels, self.size, self.size

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n p s s"] | None = None) -> Float[Tensor, "n p s s"]:
        """Images between -1 and 1 to samples. With a VAE, the mean of its posterior plus `noise` standard deviations.

        Raises:
            ConfigError: the images are not of the denoiser's size.
        """
        if self.vae is None:
            sample = F.pixel_unshuffle(pixels, self.patch)
        else:
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
            latent = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
            sample = (latent * self.vae.config["scaling_factor"]).to(pixels.dtype)
        if sample.shape[1:] != self.shape:
            raise ConfigError(
                f"samples of shape {list(sample.shape[1:])} but {list(self.shape)} (decoder). Resize the images to the denoiser's size."
            )
        return sample

    @torch.no_grad()
    def decode(self, sample: Float[Tensor, "n p s s"]) -> Float[Tensor, "n 3 h w"]:
        """Samples to images between 0 and 1."""
        if self.vae is None:
            pixels = F.pixel_shuffle(sample, self.patch)
        else:
            pixels = self.vae.decode(sample.to(self.vae.dtype) / self.vae.config["scaling_factor"]).sample  # pyright: ignore[reportAttributeAccessIssue]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def widen_input(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """A copy of `unet` that reads `channels` more, with zero weights: it computes what the original does until it is trained."""
    config: dict[str, Any] = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config["in_channels"] += channels
    wide = UNet2DConditionModel(**config).to(unet.dtype)
    state = unet.state_dict()
    conv_in: nn.Conv2d = unet.conv_in
    zeros = conv_in.weight.new_zeros(conv_in.out_channels, channels, *conv_in.kernel_size)
    state["conv_in.weight"] = torch.cat([conv_in.weight.detach(), zeros], dim=1)
    wide.load_state_dict(state)
    return wide.to(unet.device)
