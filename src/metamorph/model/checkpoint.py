"""Loading a checkpoint, or refusing it with what is wrong and what to do. Only safetensors are ever read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from metamorph.errors import CheckpointError
from metamorph.model.vision_encoder import AbsentEncoder, load_vision_model
from metamorph.places import CONFIG, check_source

if TYPE_CHECKING:
    from metamorph.model.modeling import MetaMorph

REMEDY = "Give a directory that `metamorph init` or training finished writing."


def load_checkpoint(load: Callable[..., Any], path: str | Path, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Run a `from_pretrained` and check what it loaded.

    Raises:
        CheckpointError: files are missing, broken or of another shape, or the special tokens are absent.
    """
    if path is not None:  # with a config of its own a model needs no place
        check_source(path, "a MetaMorph checkpoint", index=CONFIG, owned=True)
    kwargs |= {"use_safetensors": True}
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))  # the older name of the same setting
    try:
        model, report = load(path, *args, output_loading_info=True, **kwargs)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        found = _first_line(error).rstrip(".")
        found = found if path is None or Path(path).is_dir() else f"no such directory, and from the hub: {found},"
        raise CheckpointError(f"{found} but a MetaMorph checkpoint was expected ({path}). {REMEDY}") from error
    _check_complete(model, sorted(report["missing_keys"]), path)
    if model.config.vision_encoder_path is not None and not isinstance(model.vision_encoder.encoder, AbsentEncoder):
        _load_encoder(model, Path(path))
    model.vision_encoder.requires_grad_(False)  # transformers makes new parameters while it loads, and all of them train
    _load_generation_config(model, path)
    return (model, report) if output_loading_info else model


def _check_complete(model: "MetaMorph", missing: list[str], path: str | Path) -> None:
    if missing:
        raise CheckpointError(f"{len(missing)} tensors absent, such as {missing[0]}, but a complete model was expected ({path}). {REMEDY}")
    config, rows = model.config, model.get_input_embeddings().weight.shape[0]
    ids = (config.image_token_id, config.image_start_token_id, config.image_end_token_id)
    if not all(isinstance(number, int) and number >= 0 for number in ids) or max(ids[1:]) >= rows:  # the placeholder needs no row
        raise CheckpointError(
            f"image token ids {ids} but three ids, the last two below {rows}, the rows of the embedding, were expected ({path}). "
            "Make the model with `metamorph init`."
        )


def _load_encoder(model: "MetaMorph", directory: Path) -> None:
    place = directory / model.config.vision_encoder_path
    encoder = load_vision_model(place)
    try:
        model.vision_encoder.encoder.load_state_dict(encoder.state_dict())
    except RuntimeError as error:
        found = _first_line(error)
        raise CheckpointError(f"{found} but this model's vision encoder was expected ({place}). Put the right encoder there.") from error
    model.config.vision_encoder_path = None  # the weights are here now: saving again saves all of them


def _load_generation_config(model: "MetaMorph", path: str | Path) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # saved by something else than this class: the LLM config's own settings hold
        return
    model.language_model.generation_config = model.generation_config


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
