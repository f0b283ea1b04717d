"""Reading the denoiser, VAE and scheduler of a saved diffusion model, and nothing else that lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from metamorph.decoder.library import (
    Autoencoder,
    AutoencoderDC,
    AutoencoderKL,
    Denoiser,
    DiffusionPipeline,
    SanaTransformer2DModel,
    Scheduler,
    UNet2DConditionModel,
)
from metamorph.decoder.schedule import load_scheduler
from metamorph.errors import CheckpointError, ConfigError
from metamorph.places import DECODER_INDEX, check_source

_DENOISERS = {"unet": UNet2DConditionModel, "transformer": SanaTransformer2DModel}
_AUTOENCODERS = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC)}


class DiffusionParts(NamedTuple):
    """What a decoder needs of a latent diffusion model."""

    denoiser: Denoiser
    vae: Autoencoder
    scheduler: Scheduler


def load_parts(path: str | Path, *, weights: bool = True) -> DiffusionParts:
    """Read model_index.json, then the parts that it names, from safetensors in float32 or, without `weights`, as shapes only.

    Raises:
        CheckpointError: a file or a weight is missing.
        ConfigError: a part is of a class that is not known.
    """
    index = _index(path)
    folder = next((name for name in _DENOISERS if _class_of(index, name)), None)
    if folder is None or not _class_of(index, "vae") or not _class_of(index, "scheduler"):
        named = [name for name in index if _class_of(index, name)]
        raise CheckpointError(
            f"a {index['_class_name']} of {named} but a vae, a scheduler and a unet or transformer are needed ({path}). {_REMEDY}"
        )
    kinds = {folder: {_DENOISERS[folder].__name__: _DENOISERS[folder]}, "vae": _AUTOENCODERS}
    for name, known in kinds.items():
        if _class_of(index, name) not in known:
            raise ConfigError(f"{name} of class {_class_of(index, name)} but {' or '.join(known)} is known ({path}). Choose another base.")
    denoiser, vae = (load_module(known[str(_class_of(index, name))], path, name, weights=weights) for name, known in kinds.items())
    try:
        return DiffusionParts(denoiser, vae, load_scheduler(path, latent=True))
    except OSError as error:
        raise CheckpointError(f"no readable scheduler/scheduler_config.json but one is needed ({path}): {error}. {_REMEDY}") from error


def load_module(kind: Any, path: str | Path, folder: str, *, weights: bool = True) -> Any:
    """One part, from safetensors in float32 or, without `weights`, its shape on the meta device.

    Raises:
        CheckpointError: its config or weights are missing, or not all of them are there.
    """
    check_source(path, "a saved diffusion model")
    place = Path(path) / folder
    try:
        if not weights:
            with torch.device("meta"):
                return kind.from_config(kind.load_config(path, subfolder=folder))
        model, report = kind.from_pretrained(
            path, subfolder=folder, use_safetensors=True, low_cpu_mem_usage=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        names = sorted(one.name for one in place.glob("*")) if place.is_dir() else []
        found = f"{folder}/ with {names}" if names else f"no {folder}/"
        remedy = "Convert pickled weights to safetensors." if any(one.endswith((".bin", ".ckpt")) for one in names) else _REMEDY
        raise CheckpointError(
            f"{found} but config.json and diffusion_pytorch_model.safetensors are needed, and pickle is never read ({path}): "
            f"{error} {remedy}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{len(missing)} tensors absent, such as {missing[0]}, but all are needed ({place}). Save the model again.")
    return model


_REMEDY = "Give a directory laid out as Stable Diffusion 1.5 (model_index.json, unet/, vae/, scheduler/) or Sana (transformer/ for unet/)."


def _index(path: str | Path) -> dict[str, Any]:
    check_source(path, "a saved diffusion model", index=DECODER_INDEX)
    try:
        index: Any = DiffusionPipeline.load_config(path)
        return dict(index)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable model_index.json but a saved diffusion model is needed ({path}): {error} {_REMEDY}") from error


def _class_of(index: dict[str, Any], name: str) -> str | None:
    """The class of a part, as the index names it: [library, class], both null where the part is left out."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
