"""A frozen vision encoder as it lies in files: known by its fingerprint without being loaded, and loaded without the rest of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import cached_file

from metamorph.errors import CheckpointError
from metamorph.model.configuration import MetaMorphConfig
from metamorph.model.conversion import CONFIG_CHOICES, read_processor
from metamorph.model.processing import MetaMorphProcessor
from metamorph.model.vision_encoder import VisionEncoder, fingerprint, load_vision_model, read_vision_config
from metamorph.model.weight_files import WEIGHTS, weight_files
from metamorph.places import CONFIG, check_source

_INSIDE = "vision_encoder.encoder."


@dataclass(frozen=True)
class EncoderFiles:
    """Where an encoder's weights are, what is taken from it, and how its pixels are made."""

    config: MetaMorphConfig
    processor: MetaMorphProcessor
    place: str
    """The directory, or the name on the hub, of a checkpoint with the weights."""

    def fingerprint(self) -> str:
        """That of the loaded encoder; only one tensor is in memory at a time."""
        return fingerprint(self.config, self.config.vision_config, self._tensors())

    def load(self) -> VisionEncoder:
        """The encoder with its weights, float32, and nothing else of the model.

        Raises:
            CheckpointError: files are missing or broken.
        """
        encoder = VisionEncoder(self.config)
        encoder.encoder.load_state_dict(dict(self._tensors()), assign=True)
        encoder.encoder.requires_grad_(False)
        return encoder.eval()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The encoder's tensors by name, float32, in the order of their names."""
        with torch.device("meta"):
            names = sorted(VisionEncoder(self.config).encoder.state_dict())
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(self.place)]
                place = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no mapping)
                found = _match(names, place)
                if found is not None:
                    for name in names:
                        tensor = place[found[name]].get_tensor(found[name])
                        yield name, tensor.float() if tensor.is_floating_point() else tensor
                    return
        except (OSError, SafetensorError) as error:
            remedy = "Give the directory of a complete checkpoint."
            raise CheckpointError(f"{error} but a vision encoder in safetensors was expected ({self.place}). {remedy}") from error
        yield from sorted(load_vision_model(self.place).state_dict().items())  # names of an older release, which the library knows


def encoder_of_model(directory: str | Path) -> EncoderFiles:
    """The encoder of a saved MetaMorph.

    Raises:
        CheckpointError: there is no such model.
    """
    check_source(directory, "a MetaMorph checkpoint", index=CONFIG, owned=True)
    try:
        config = MetaMorphConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error} but a MetaMorph checkpoint was expected ({directory}). Give a model's directory.") from error
    place, outside = str(directory), config.vision_encoder_path
    return EncoderFiles(config, MetaMorphProcessor.from_pretrained(directory), place if outside is None else str(Path(place) / outside))


def encoder_of_parts(llm: str | Path, vision: str | Path, **choices: Any) -> EncoderFiles:
    """The encoder that `initialize` would join with these settings.

    Raises:
        CheckpointError: a file is not here.
        ConfigError, TemplateError: as `initialize`.
    """
    processor = read_processor(llm, vision, **choices)
    settings = {name: choices[name] for name in CONFIG_CHOICES if name in choices}
    text = AutoConfig.from_pretrained(llm)
    return EncoderFiles(MetaMorphConfig(text_config=text, vision_config=read_vision_config(vision), **settings), processor, str(vision))


def preprocessing_of(processor: MetaMorphProcessor) -> dict[str, Any]:
    """How pixels are made, as plain values."""
    names = ("image_size", "image_mean", "image_std", "image_resample", "scaled_jpeg")
    values = {name: getattr(processor, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _match(names: list[str], there: Mapping[str, Any]) -> dict[str, str] | None:
    """What each tensor is called in the files: of a MetaMorph, of one tower, or of two; None if one is missing."""
    for prefix in (_INSIDE, "", "vision_model.", "dinov2."):
        if all(prefix + name in there for name in names):
            return {name: prefix + name for name in names}
    return None


def _files(place: str) -> list[Path]:
    """The safetensors files of a checkpoint, in a directory or in the hub's cache."""
    if Path(place).is_dir():
        return weight_files(Path(place))
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in (f"{WEIGHTS}.index.json", WEIGHTS):
        if (file := cached_file(place, name, **quiet)) is not None:
            found = weight_files(Path(file).parent)
            return [Path(cached_file(place, path.name) or path) for path in found]
    return [Path(place) / WEIGHTS]
