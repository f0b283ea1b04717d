"""Where diffusion happens.

Axes: n images, h and w pixels, p sample channels, s side of the sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metamorph.decoder.denoiser import sizes_of
from metamorph.decoder.library import Autoencoder, AutoencoderDC, Denoiser
from metamorph.errors import ConfigError


class SampleSpace:
    """A frozen autoencoder's latents or, without one, pixels with each patch folded into channels.

    Raises:
        ConfigError: the denoiser's channels are not the autoencoder's, or no patches of pixels.
    """

    def __init__(self, denoiser: Denoiser, vae: Autoencoder | None):
        self.vae = vae
        self.channels, self.size = sizes_of(denoiser).channels, sizes_of(denoiser).sample_size
        self.patch = math.isqrt(self.channels // 3) if vae is None else 1
        if vae is None and 3 * self.patch**2 != self.channels:
            raise ConfigError(
                f"{self.channels} sample channels but 3 x patch^2 without a VAE (decoder). Give the VAE that the denoiser was trained with."
            )
        if vae is not None and vae.config["latent_channels"] != self.channels:
            raise ConfigError(
                f"a VAE of {vae.config['latent_channels']} latent channels but a denoiser of {self.channels} (decoder). "
                "Give the VAE that the denoiser was trained with."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one sample."""
        return self.channels, self.size, self.size

    @property
    def pixels_per_position(self) -> int:
        """Pixels per side that one position of a sample stands for: Stable Diffusion's VAE halves an image three times, to an eighth."""
        if self.vae is None:
            return self.patch
        widths = "encoder_block_out_channels" if isinstance(self.vae, AutoencoderDC) else "block_out_channels"
        return 2 ** (len(self.vae.config[widths]) - 1)

    @property
    def image_size(self) -> int:
        """Pixels per side of a picture."""
        return self.size * self.pixels_per_position

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n p s s"] | None = None) -> Float[Tensor, "n p s s"]:
        """Images between -1 and 1 to samples. Where the VAE gives a distribution, its mean plus `noise` standard deviations.

        Raises:
            ConfigError: the images are not of the denoiser's size.
        """
        height, width = pixels.shape[-2:]
        if not height == width == self.image_size:
            raise ConfigError(
                f"images of {width} x {height} pixels but {self.image_size} x {self.image_size} (a denoiser of {self.size} x {self.size} "
                f"positions, each {self.pixels_per_position} pixels wide). Resize the images to the denoiser's size."
            )
        if self.vae is None:
            return F.pixel_unshuffle(pixels, self.patch)
        encoded: Any = self.vae.encode(pixels.to(self.vae.dtype))
        if isinstance(self.vae, AutoencoderDC):
            latent = encoded.latent
        else:
            posterior = encoded.latent_dist
            latent = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        return (latent * self.vae.config["scaling_factor"]).to(pixels.dtype)

    @torch.no_grad()
    def decode(self, sample: Float[Tensor, "n p s s"]) -> Float[Tensor, "n 3 h w"]:
        """Samples to images between 0 and 1."""
        if self.vae is None:
            pixels = F.pixel_shuffle(sample, self.patch)
        else:
            pixels = self.vae.decode(sample.to(self.vae.dtype) / self.vae.config["scaling_factor"]).sample  # pyright: ignore[reportAttributeAccessIssue]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)
