"""Visual tokens in, pictures out: a diffusers pipeline of conditioner, denoiser, optional VAE and scheduler.

Axes: n images, k visual tokens per image, v vision width, l context positions, c context width, p sample channels, s side of the sample,
h and w pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from metamorph.decoder.conditioning import Condition, VisualConditioner, given_context
from metamorph.decoder.denoiser import kind_of, sizes_of
from metamorph.decoder.library import (
    Autoencoder,
    Denoiser,
    DiffusionPipeline,
    SanaTransformer2DModel,
    Scheduler,
    UNet2DConditionModel,
)
from metamorph.decoder.objective import DecoderModel, check_parts, denoise
from metamorph.decoder.schedule import begin
from metamorph.decoder.space import SampleSpace
from metamorph.errors import AlignmentError, CheckpointError, ConfigError, MetaMorphError
from metamorph.places import DECODER_INDEX, check_source


class VisualDecoderPipeline(DiffusionPipeline):
    """Draws the images that visual tokens stand for. Saved as safetensors only; loaded in float32 unless told otherwise.

    Without a conditioner it is a text-conditioned base, which draws from a `context` instead. The denoiser is named as diffusers names
    it: a U-Net `unet`, a diffusion transformer `transformer`.

    Raises:
        ConfigError: not exactly one denoiser, or the parts do not fit together.
    """

    model_cpu_offload_seq = "conditioner->unet->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["conditioner", "unet", "transformer", "vae"]

    def __init__(
        self,
        conditioner: VisualConditioner | None,
        scheduler: Scheduler,
        unet: UNet2DConditionModel | None = None,
        transformer: SanaTransformer2DModel | None = None,
        vae: Autoencoder | None = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ConfigError("both or neither of unet and transformer but exactly one denoises (VisualDecoderPipeline). Give one.")
        self.register_modules(conditioner=conditioner, scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        check_parts(self.denoiser, scheduler, conditioner)
        self.set_progress_bar_config(disable=True)

    @classmethod
    def from_model(cls, model: DecoderModel) -> VisualDecoderPipeline:
        """The pipeline of a model; it shares its weights."""
        denoiser: dict[str, Any] = {kind_of(model.denoiser).part: model.denoiser}
        return cls(model.conditioner, model.scheduler, vae=model.vae, **denoiser)

    def save_pretrained(self, save_directory: str | PathLike, *, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Save every part with its config, weights as safetensors, in `dtype` if given (for example float16, half the size).

        Where a part was loaded from is not saved: a published decoder names no place on this machine.

        Raises:
            ConfigError: asked to write pickle.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ConfigError("safe_serialization=False but only safetensors are written (VisualDecoderPipeline). Leave it out.")
        for part in (self, *self.components.values()):
            if part is not None and "_name_or_path" in part.config:
                part.register_to_config(_name_or_path="")
        if dtype is None:
            super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
            return
        parts = dict(self.components)
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                parts[name] = nn.Module.to(copy.deepcopy(part), dtype)  # diffusers' own `to` warns about a cast that is meant
        type(self)(**parts).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> VisualDecoderPipeline:
        """Load a saved decoder; weights stored as float16 become float32 unless `dtype` says otherwise. Pickle is never read.

        Raises:
            CheckpointError: there is none, or it is incomplete.
            ConfigError: asked to read pickle, or the parts do not fit together.
        """
        if not kwargs.pop("use_safetensors", True):
            raise ConfigError(
                "use_safetensors=False but pickle is never loaded (VisualDecoderPipeline). Convert the weights to safetensors."
            )
        defaults = {"dtype": torch.float32, "low_cpu_mem_usage": False}
        place = fspath(pretrained_model_name_or_path)
        check_source(place, "a decoder", index=DECODER_INDEX)
        try:
            return super().from_pretrained(place, use_safetensors=True, **(defaults | kwargs))
        except MetaMorphError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            found = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            found = found if Path(place).is_dir() else f"no such directory, and from the hub: {found},"
            remedy = "Give the directory of a decoder that training or `save_pretrained` finished writing."
            raise CheckpointError(f"{found} but a whole decoder was expected ({place}). {remedy}") from error

    @torch.no_grad()
    def __call__(
        self,
        visual_tokens: Float[Tensor, "n k v"] | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        seeds: int | Sequence[int] = 0,
        output_type: Literal["pil", "pt"] = "pil",
        *,
        context: Float[Tensor, "n l c"] | None = None,
        context_mask: Bool[Tensor, "n l"] | None = None,
    ) -> list[Image.Image] | Float[Tensor, "n 3 h w"]:
        """Draw each image, from its tokens and its own seed alone, whatever else is in the batch.

        Args:
            visual_tokens: as the vision encoder makes them, or the model predicts them.
            num_inference_steps: calls of the denoiser; with guidance each counts double.
            guidance_scale: 1 = none; above, how far to go from the unconditioned prediction past the conditioned one.
            seeds: one for all images, or one per image; an image's seed decides its initial noise.
            output_type: "pil", or "pt" for a float tensor between 0 and 1.
            context: what to draw, as a text-conditioned base reads it, instead of visual tokens.
            context_mask: true where the context is real.

        Raises:
            AlignmentError: the number of seeds is not that of images, or the tokens are not the conditioner's.
            ConfigError: not exactly one of tokens and context, or tokens for a base.
        """
        told = visual_tokens if visual_tokens is not None else context
        if told is None or (visual_tokens is not None and context is not None):
            raise ConfigError("neither or both of visual tokens and context but exactly one is needed (VisualDecoderPipeline). Give one.")
        if not len(told):
            empty = torch.zeros(0, 3, self.image_size, self.image_size)
            return [] if output_type == "pil" else empty
        seeds = [seeds] * len(told) if isinstance(seeds, int) else list(seeds)
        if len(seeds) != len(told):
            raise AlignmentError(f"{len(seeds)} seeds but {len(told)} images (VisualDecoderPipeline). Give one seed, or one per image.")
        condition = self._condition(told.to(self.device, self.denoiser.dtype), from_tokens=visual_tokens is not None)
        mask = None if context_mask is None else context_mask.to(self.device)
        sample = self._sample(condition, mask, seeds, num_inference_steps, guidance_scale)
        pixels = self.space.decode(sample)
        return pixels if output_type == "pt" else to_images(pixels)

    @property
    def denoiser(self) -> Denoiser:
        """The U-Net or the transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def space(self) -> SampleSpace:
        """Where diffusion happens."""
        return SampleSpace(self.denoiser, self.vae)

    @property
    def image_size(self) -> int:
        """Pixels per side of a picture."""
        return self.space.image_size

    def _condition(self, told: Float[Tensor, "n l c"], from_tokens: bool) -> Condition:
        if not from_tokens:
            sizes = sizes_of(self.denoiser)
            return given_context(told, sizes.map_channels, sizes.sample_size)
        if self.conditioner is None:
            raise ConfigError("visual tokens but no conditioner (a text-conditioned base). Make a decoder of it with `from_base`.")
        return self.conditioner(told)

    def _sample(
        self, condition: Condition, mask: Bool[Tensor, "n l"] | None, seeds: Sequence[int], num_steps: int, guidance_scale: float
    ) -> Float[Tensor, "n p s s"]:
        """Go from noise to samples."""
        guided = guidance_scale != 1.0
        if guided:
            mask = None if mask is None else torch.cat([mask, mask])
            keep = torch.tensor([True, False], device=self.device).repeat_interleave(len(seeds))
            condition = Condition(*(None if one is None else torch.cat([one, one]) for one in condition)).where(keep)
        # a copy: a scheduler counts its steps, and calls from several threads must not share the count
        scheduler = copy.deepcopy(self.scheduler)
        scale = begin(scheduler, num_steps, self.device)  # pyright: ignore[reportArgumentType]
        sample = (initial_noise(seeds, self.space.shape) * scale).to(self.device, self.denoiser.dtype)
        call = _quick(self.denoiser)
        for timestep in self.progress_bar(scheduler.timesteps):  # pyright: ignore[reportGeneralTypeIssues]
            read = torch.cat([sample, sample]) if guided else sample
            predicted = denoise(self.denoiser, read, timestep, condition, mask, call)
            if guided:
                told, untold = predicted.chunk(2)
                predicted = untold + guidance_scale * (told - untold)
            sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
        return sample


def _quick(denoiser: Denoiser) -> Callable[..., Any]:
    """The denoiser for many calls in a row: on a CPU its convolutions are reordered once, not at every call (a tenth of the time)."""
    if denoiser.device.type != "cpu":
        return denoiser
    ordered = {name: value.contiguous(memory_format=torch.channels_last) for name, value in denoiser.named_parameters() if value.ndim == 4}

    def call(**kwargs: Any) -> Any:
        return torch.func.functional_call(denoiser, ordered, (), kwargs)

    return call


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Tensor, "n p s s"]:
    """Normal noise, drawn on the CPU for each image from its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def to_images(pixels: Float[Tensor, "n 3 h w"]) -> list[Image.Image]:
    """Pixels between 0 and 1 as pictures."""
    values = (pixels.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]
