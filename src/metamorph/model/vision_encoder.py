"""What a visual token is, stated once: which states of the encoder, post layer norm or not, pooled to k, normalised or not.

Axes: n images, k visual tokens per image, v vision width, p patches of the encoder's grid.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from metamorph.errors import AlignmentError, CheckpointError, ConfigError
from metamorph.model.configuration import MetaMorphConfig
from metamorph.places import check_source

MIN_NORM = 1e-12
TOKEN_SETTINGS = ("num_visual_tokens", "vision_feature_layer", "vision_post_layernorm", "pooling", "normalize_visual_tokens")
"""Fields of the config that say what is taken from the encoder."""


class AbsentEncoder(nn.Module):
    """Stands where the encoder was left out: training on visual tokens that are ready needs no weights of it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class VisionEncoder(nn.Module):
    """A frozen Hugging Face vision encoder and the steps from its states to visual tokens.

    Without `weights` it only says what a visual token is, and refuses to make one.

    Raises:
        ConfigError: the encoder has no grid of patches.
    """

    def __init__(self, config: MetaMorphConfig, *, weights: bool = True) -> None:
        super().__init__()
        self.config = config
        if missing := [name for name in ("patch_size", "hidden_size") if getattr(config.vision_config, name, None) is None]:
            raise ConfigError(
                f"no {' and no '.join(missing)} in {type(config.vision_config).__name__} but an encoder with patches was expected "
                "(vision encoder). Use a vision transformer such as SigLIP, CLIP or DINOv2."
            )
        encoder: Any = AutoModel.from_config(config.vision_config) if weights else AbsentEncoder(config.vision_config)
        self.encoder: PreTrainedModel = encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        size = self.encoder.config.patch_size
        return size if isinstance(size, int) else size[0]

    @torch.no_grad()
    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k v"]:
        """Visual tokens of images, float32, in raster order. They carry no gradient: they are targets and inputs.

        Raises:
            AlignmentError: the encoder returns fewer states than the image has patches.
            ConfigError: the encoder was left out.
        """
        if isinstance(self.encoder, AbsentEncoder):
            found = f"{len(pixel_values)} images as pixels but the vision encoder was left out"
            raise ConfigError(f"{found} (VisionEncoder). Load the model whole, or give visual tokens.")
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        with torch.autocast(pixel_values.device.type, enabled=False):  # what a visual token is does not depend on how training computes
            states = self._states(pixel_values, rows, columns)
        if states.shape[1] < rows * columns:
            raise AlignmentError(
                f"{states.shape[1]} encoder states but {rows} x {columns} patches ({type(self.encoder).__name__}). "
                "Use an encoder that keeps one state for each patch."
            )
        states = states[:, states.shape[1] - rows * columns :]  # class and register tokens come first
        return self.pool(states.float().unflatten(1, (rows, columns)))

    def pool(self, grid: Float[Tensor, "n rows columns v"]) -> Float[Tensor, "n k v"]:
        """Pool a grid of states in float32 to k tokens and normalise them."""
        side = self.config.token_grid
        maps = grid.float().permute(0, 3, 1, 2)
        if self.config.pooling == "bilinear":
            maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False, antialias=False)
        else:
            maps = F.adaptive_avg_pool2d(maps, (side, side))
        tokens = maps.flatten(2).transpose(1, 2).contiguous()  # products round alike whether tokens come from here or from a store
        return F.normalize(tokens, dim=-1, eps=MIN_NORM) if self.config.normalize_visual_tokens else tokens

    def fingerprint(self) -> str:
        """Hash of the encoder (config and weights) and of the visual-token settings: caches are valid only under the same one."""
        return fingerprint(self.config, self.encoder.config, sorted(self.encoder.state_dict().items()))

    def _states(self, pixel_values: Float[Tensor, "n 3 h w"], rows: int, columns: int) -> Float[Tensor, "n p v"]:
        pixels = pixel_values.to(self.encoder.dtype)
        inputs: dict[str, Any] = {"pixel_values": pixels}
        if self.encoder.config.model_type == "siglip2_vision_model":  # takes flat patches and their grid instead of images
            count = len(pixels)
            inputs = {
                "pixel_values": flat_patches(pixels, self.patch_size),
                "pixel_attention_mask": torch.ones(count, rows * columns, dtype=torch.long, device=pixels.device),
                "spatial_shapes": torch.tensor([[rows, columns]] * count, device=pixels.device),
            }
        states = self.encoder(**inputs, output_hidden_states=True).hidden_states[self.config.vision_feature_layer]
        return self._post_layernorm()(states) if self.config.vision_post_layernorm else states

    def _post_layernorm(self) -> nn.Module:
        for name in ("post_layernorm", "layernorm", "norm"):
            if isinstance(module := getattr(self.encoder, name, None), nn.Module):
                return module
        raise ConfigError(
            f"vision_post_layernorm=True but {type(self.encoder).__name__} has no last layer norm (VisionEncoder). Set it to False."
        )


def fingerprint(config: MetaMorphConfig, encoder: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of an encoder by its config and weights (given in the order of their names), and of what is taken from it.

    Weights count by value, whether they are kept in 16 bits or in 32.
    """
    unrelated = ("_name_or_path", "transformers_version", "dtype", "architectures", "torch_dtype")
    described = {key: value for key, value in encoder.to_dict().items() if key not in unrelated}
    settings: dict[str, Any] = {"encoder": described, **{name: getattr(config, name) for name in sorted(TOKEN_SETTINGS)}}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in tensors:  # encoders of one shape differ in their weights
        digest.update(name.encode())
        values = value.detach().float() if value.is_floating_point() else value.detach()
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def flat_patches(images: Float[Tensor, "n 3 h w"], patch: int) -> Float[Tensor, "n p values"]:
    """Cut images into patches, raster order, each flattened as height, width, channel; pixels beyond the last whole patch are left out."""
    rows, columns = (side // patch for side in images.shape[-2:])
    images = images[..., : rows * patch, : columns * patch]
    blocks = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # n 3 rows patch columns patch
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def read_vision_config(path: str | Path) -> Any:
    """The config of the vision tower of a checkpoint, of one tower or two, without any weights.

    Raises:
        CheckpointError: there is none.
    """
    check_source(path, "a vision encoder in safetensors")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{error} but a vision encoder was expected ({path}). Give the directory of a complete checkpoint."
        ) from error
    return getattr(config, "vision_config", config)


def load_vision_model(path: str | Path) -> PreTrainedModel:
    """Read the vision tower of a checkpoint, of one tower or two, in float32 from safetensors.

    Raises:
        CheckpointError: files are missing or broken, or a tensor of the tower is absent.
    """
    check_source(path, "a vision encoder in safetensors")
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers lists the text tower, which nobody asked for; what matters is checked below
    try:
        config = AutoConfig.from_pretrained(path)
        model, report = AutoModel.from_pretrained(
            path, config=getattr(config, "vision_config", config), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{error} but a vision encoder in safetensors was expected ({path}). Give the directory of a complete checkpoint."
        ) from error
    finally:
        logging.set_verbosity(loudness)
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{len(missing)} tensors absent, such as {missing[0]}, but a complete vision encoder was expected ({path}). Save it again."
        )
    return model
