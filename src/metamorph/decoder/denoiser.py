"""The denoiser: a U-Net or a diffusion transformer (DiT) of diffusers, and all that is asked of either.

Axes: n images, l context positions, c context width, p sample channels, s side of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metamorph.decoder.library import Denoiser, SanaTransformer2DModel, UNet2DConditionModel
from metamorph.errors import ConfigError


@dataclass(frozen=True)
class DenoiserKind:
    """What two classes of denoisers call differently; the rest of the decoder knows no class."""

    part: str
    """Name of its folder in a saved pipeline."""
    sample: str
    """Name of the sample among the arguments of `forward`."""
    context_width: str
    """Name of that setting."""
    first: str
    """Its first layer, a convolution that reads the sample."""
    last: str
    """Its last layer, which makes the prediction."""
    beyond: tuple[str, ...]
    """Settings that, where they are on, ask for more than a sample, a time and a context."""


_KINDS: dict[type[nn.Module], DenoiserKind] = {
    UNet2DConditionModel: DenoiserKind(
        part="unet",
        sample="sample",
        context_width="cross_attention_dim",
        first="conv_in",
        last="conv_out",
        beyond=("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds"),
    ),
    SanaTransformer2DModel: DenoiserKind(
        part="transformer",
        sample="hidden_states",
        context_width="caption_channels",
        first="patch_embed.proj",
        last="proj_out",
        beyond=("guidance_embeds",),
    ),
}


class DenoiserSizes(NamedTuple):
    """The sizes that the parts around a denoiser depend on."""

    context_width: int
    channels: int
    """Of a sample, and of the prediction."""
    map_channels: int
    """Read beside the sample: the conditioner's map."""
    sample_size: int


def kind_of(denoiser: Denoiser) -> DenoiserKind:
    """How the denoiser is saved and called.

    Raises:
        ConfigError: it is of a class that is not known, or needs more than a sample, a time and a context.
    """
    kind = _KINDS.get(type(denoiser))
    if kind is None:
        known = " or ".join(one.__name__ for one in _KINDS)
        raise ConfigError(f"a denoiser of class {type(denoiser).__name__} but {known} is known (decoder). Choose another base.")
    for name in kind.beyond:
        if denoiser.config.get(name):
            raise ConfigError(
                f"a denoiser with {name}={denoiser.config[name]!r} but it is told only a sample, a time and a context (decoder). "
                "Choose another base."
            )
    return kind


def sizes_of(denoiser: Denoiser) -> DenoiserSizes:
    """Context width, channels and side, from the denoiser's own config.

    Raises:
        ConfigError: see `kind_of`; or it reads fewer channels than it predicts.
    """
    config, read = denoiser.config, denoiser.config["in_channels"]
    channels = config["out_channels"] or read
    if read < channels:
        raise ConfigError(f"a denoiser that reads {read} channels but predicts {channels} (decoder). Choose another base.")
    return DenoiserSizes(config[kind_of(denoiser).context_width], channels, read - channels, config["sample_size"])


def call_arguments(
    denoiser: Denoiser,
    sample: Float[Tensor, "n p s s"],
    timesteps: Tensor,
    context: Float[Tensor, "n l c"],
    context_mask: Bool[Tensor, "n l"] | None = None,
) -> dict[str, Any]:
    """What `forward` of this denoiser is called with; one timestep for all images or one for each."""
    return {
        kind_of(denoiser).sample: sample,
        "timestep": timesteps.expand(len(sample)) * (denoiser.config.get("timestep_scale") or 1),
        "encoder_hidden_states": context,
        "encoder_attention_mask": context_mask,
    }


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


def build_dit(
    *,
    sample_size: int,
    channels: int,
    context_width: int,
    width: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    map_channels: int = 0,
) -> SanaTransformer2DModel:
    """A small diffusion transformer of Sana's class (linear attention, convolutions in its MLPs), one token per position of a sample.

    Args:
        sample_size: positions per side: pixels / patch, or those of the latents.
        channels: of a sample: 3 x patch^2, or those of the latents.
        context_width: width of the cross-attention context.
        width: of a token.
        num_layers: blocks.
        num_heads: of both attentions.
        map_channels: channels of the conditioner's map, read beside the sample.

    Raises:
        ConfigError: the heads do not divide the width.
    """
    if width % num_heads:
        raise ConfigError(f"width {width} but {num_heads} heads must divide it (DiT). Choose other sizes.")
    return SanaTransformer2DModel(
        in_channels=channels + map_channels,
        out_channels=channels,
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        num_cross_attention_heads=num_heads,
        cross_attention_head_dim=width // num_heads,
        cross_attention_dim=width,
        num_layers=num_layers,
        caption_channels=context_width,
        sample_size=sample_size,
        patch_size=1,
        interpolation_scale=1,  # sine positions, as Sana has them at 2,048 pixels; below it finds places by its convolutions alone
    )


def widen_input(denoiser: Denoiser, channels: int) -> Any:
    """A copy that reads `channels` more, with zero weights: it computes what the original does until it is trained."""
    config: dict[str, Any] = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    config |= {"in_channels": config["in_channels"] + channels, "out_channels": sizes_of(denoiser).channels}
    wide = type(denoiser)(**config).to(denoiser.dtype)
    state = denoiser.state_dict()
    name = f"{kind_of(denoiser).first}.weight"
    zeros = state[name].new_zeros(len(state[name]), channels, *state[name].shape[2:])
    state[name] = torch.cat([state[name], zeros], dim=1)
    wide.load_state_dict(state)
    return wide.to(denoiser.device)


def last_layer(denoiser: Denoiser) -> nn.Module:
    """What makes the prediction."""
    return denoiser.get_submodule(kind_of(denoiser).last)
