"""How the decoder learns: noise an image to a random time, tell the denoiser what the picture shows, and score what it predicts.

Axes: n images, k visual tokens per image, v vision width, p sample channels, s side of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metamorph.decoder.batches import DecoderBatch
from metamorph.decoder.conditioning import Condition, VisualConditioner, given_context
from metamorph.decoder.denoiser import call_arguments, sizes_of
from metamorph.decoder.library import Autoencoder, Denoiser, Scheduler
from metamorph.decoder.schedule import noised, prediction_of
from metamorph.decoder.space import SampleSpace
from metamorph.errors import ConfigError
from metamorph.losses import LossTerm


@dataclass(frozen=True)
class Objective:
    """Which times are visited, and what is done to the condition.

    `time_shift` a > 1 moves times toward noise: t becomes a t / (1 + (a - 1) t). The layout of an image is decided at its noisiest times,
    which logit-normal sampling without shift rarely visits.
    """

    times: Literal["uniform", "logit_normal"] = "uniform"
    time_shift: float = 3.0
    condition_dropout: float = 0.1
    """Share of images that are told nothing (all zeros), which guidance needs."""
    condition_noise: float = 0.0
    """Length of the noise added to a visual token, relative to the token's own; tokens that were predicted are not exact."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.time_shift <= 0 or not 0 <= self.condition_dropout <= 1 or self.condition_noise < 0:
            raise ConfigError(
                f"{self} but time_shift > 0, condition_dropout between 0 and 1, condition_noise >= 0 (objective). Correct it."
            )


class Draws(NamedTuple):
    """All that is random about a batch; each row follows from its image's seed alone, whatever stands beside it in the batch."""

    time: Float[Tensor, " n"]  # 0 image, 1 noise; already shifted
    keep: Bool[Tensor, " n"]
    noise: Float[Tensor, "n p s s"]
    latent_noise: Float[Tensor, "n p s s"]
    token_noise: Float[Tensor, "n k v"] | None


def draw(seeds: Sequence[int], objective: Objective, sample_shape: tuple[int, int, int], token_shape: tuple[int, int] | None) -> Draws:
    """Draw on the CPU, so that every device trains on the same noise."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        time = torch.rand((), generator=generator) if objective.times == "uniform" else torch.randn((), generator=generator).sigmoid()
        keep = torch.rand((), generator=generator) >= objective.condition_dropout
        noise = torch.randn(2, *sample_shape, generator=generator)
        rows.append((time, keep, noise, torch.randn(token_shape or (), generator=generator)))
    time, keep, noise, token_noise = (torch.stack(column) for column in zip(*rows, strict=True))
    time = objective.time_shift * time / (1 + (objective.time_shift - 1) * time)
    return Draws(time, keep, noise[:, 0], noise[:, 1], token_noise if token_shape else None)


class DecoderModel(nn.Module):
    """Everything that is trained or used to train a decoder, as one module: conditioner, denoiser, frozen VAE, scheduler, objective.

    Without a conditioner it is a text-conditioned base, which learns from batches with a `context`; with one, it learns from `tokens` too.

    Raises:
        ConfigError: the parts do not fit together.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        conditioner: VisualConditioner | None = None,
        vae: Autoencoder | None = None,
        objective: Objective | None = None,
    ):
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner
        self.vae = None if vae is None else vae.requires_grad_(False).eval()
        self.scheduler, self.objective = scheduler, objective or Objective()
        self.space = SampleSpace(denoiser, self.vae)
        self.prediction = prediction_of(scheduler)
        self.map_channels = sizes_of(denoiser).map_channels
        check_parts(denoiser, scheduler, conditioner)

    def train(self, mode: bool = True) -> DecoderModel:
        """Set the mode of all but the VAE, which is always frozen."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> DecoderModel:
        """Let everything train, or nothing; the VAE never does."""
        super().requires_grad_(requires_grad)
        if self.vae is not None:
            self.vae.requires_grad_(False)
        return self

    def loss_terms(self, batch: DecoderBatch) -> dict[str, LossTerm]:
        """{"decoder": mean squared error of each image, and of its sketch if there is one, summed over images}.

        Raises:
            ConfigError: visual tokens but no conditioner.
        """
        draws = self.draws(batch)
        clean = self.space.encode(batch.pixels, draws.latent_noise)
        noisy, timesteps, target = noised(self.scheduler, clean, draws.noise, draws.time)
        condition = self.condition(batch, draws.token_noise)
        predicted = denoise(self.denoiser, noisy, timesteps, condition.where(draws.keep), batch.context_mask)
        errors = squared_error(predicted, target)
        if condition.sketch is not None:
            errors = errors + squared_error(condition.sketch, clean)
        return _decoder_term(errors)

    def sketch_terms(self, batch: DecoderBatch) -> dict[str, LossTerm]:
        """{"decoder": the error of the sketch alone}, without a call of the denoiser: a cheap first stage for the spatial path.

        Raises:
            ConfigError: the conditioner makes no sketch.
        """
        draws = self.draws(batch)
        sketch = self.condition(batch, draws.token_noise).sketch
        if sketch is None:
            raise ConfigError("a conditioner without sketch but its training was asked for (decoder). Set sketch: true.")
        errors = squared_error(sketch, self.space.encode(batch.pixels, draws.latent_noise))
        return _decoder_term(errors)

    def draws(self, batch: DecoderBatch) -> Draws:
        """All that is random about a batch, on its device."""
        token_shape = None if batch.tokens is None else tuple(batch.tokens.shape[1:])
        drawn = draw(batch.seeds, self.objective, self.space.shape, token_shape)
        return Draws(*(None if one is None else one.to(batch.pixels.device) for one in drawn))

    def condition(self, batch: DecoderBatch, token_noise: Float[Tensor, "n k v"] | None = None) -> Condition:
        """What the batch says about its images; noise on the tokens keeps their length."""
        if batch.context is not None:
            return given_context(batch.context, self.map_channels, self.space.size)
        if self.conditioner is None or batch.tokens is None:
            raise ConfigError("visual tokens but no conditioner (a text-conditioned base). Make a decoder of it with `from_base`.")
        tokens = batch.tokens
        if self.objective.condition_noise and token_noise is not None:
            length = tokens.norm(dim=-1, keepdim=True)
            moved = tokens + token_noise.to(tokens.dtype) * (self.objective.condition_noise * length / tokens.shape[-1] ** 0.5)
            tokens = moved * (length / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        return self.conditioner(tokens)


def squared_error(predicted: Float[Tensor, "n p s s"], target: Float[Tensor, "n p s s"]) -> Float[Tensor, " n"]:
    """Mean squared error of each image."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def _decoder_term(errors: Float[Tensor, " n"]) -> dict[str, LossTerm]:
    return {"decoder": LossTerm(errors.sum(), torch.tensor(len(errors), device=errors.device))}


def decoder_step(model: DecoderModel, batch: DecoderBatch) -> dict[str, LossTerm]:
    """The step function that the training loop takes."""
    return model.loss_terms(batch)


def sketch_step(model: DecoderModel, batch: DecoderBatch) -> dict[str, LossTerm]:
    """The step function of a first stage that trains the sketch alone."""
    return model.sketch_terms(batch)


def check_parts(denoiser: Denoiser, scheduler: Scheduler, conditioner: VisualConditioner | None) -> None:
    """A conditioner speaks of the denoiser's sizes; a sketch is a guess of the clean sample, which the denoiser must then predict.

    Raises:
        ConfigError: otherwise.
    """
    if conditioner is None:
        return
    sizes = sizes_of(denoiser)
    names = ("map channels", "context width", "sample size")
    found = (conditioner.config["map_channels"], conditioner.config["context_width"], conditioner.config["sample_size"])
    expected = (sizes.map_channels, sizes.context_width, sizes.sample_size)
    for name, one, other in zip(names, found, expected, strict=True):
        if one != other and not (name == "sample size" and not sizes.map_channels):
            raise ConfigError(f"conditioner with {name} {one} but a denoiser with {other} (decoder). Build them with the same sizes.")
    found, expected = (sizes.map_channels, prediction_of(scheduler)), (sizes.channels, "sample")
    if conditioner.config["sketch"] and found != expected:
        raise ConfigError(
            f"a sketch with {found[0]} channels and {found[1]} prediction but {expected[0]} channels and sample prediction are needed "
            "(decoder). Set map_channels and the scheduler's prediction_type, or sketch: false."
        )


def denoise(
    denoiser: Denoiser,
    noisy: Float[Tensor, "n p s s"],
    timesteps: Tensor,
    condition: Condition,
    context_mask: Bool[Tensor, "n l"] | None = None,
    call: Callable[..., Any] | None = None,
) -> Float[Tensor, "n p s s"]:
    """The denoiser's prediction; it reads the map as more channels of its input, and adds to the sketch if there is one.

    `call`, if given, computes what the denoiser does.
    """
    read = noisy if condition.map is None else torch.cat([noisy, condition.map.to(noisy.dtype)], dim=1)
    read = read.contiguous(memory_format=torch.channels_last)  # convolutions keep this order; about a tenth faster on a CPU
    predicted = (call or denoiser)(**call_arguments(denoiser, read, timesteps, condition.context, context_mask)).sample
    return predicted if condition.sketch is None else predicted + condition.sketch
