"""Outputs of the frozen vision encoder, kept by image, so that an image seen again is not encoded again.

Axes: m images given as pixels, n images, k visual tokens per image, v vision width.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metamorph.batch import Batch, TokenSequence
from metamorph.errors import ConfigError
from metamorph.messages import Example

Readable = TypeVar("Readable", TokenSequence, Batch)


def encoder_fingerprint(encoder: nn.Module, settings: Any) -> str:
    """Identifies an encoder: its weights, and the settings (JSON values) that say what is taken from it."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EncoderCache:
    """Pixels -> visual tokens through memory (the most recently used `capacity` images), then disk, then the encoder.

    Args:
        encode: the frozen encoder, "m 3 h w" -> "m k v".
        fingerprint: of the encoder; results of another one on disk are never used.
        capacity: images to keep in memory.
        directory: where to keep results as well; None = nowhere. Several processes may share it.

    Raises:
        ConfigError: it could keep nothing.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], fingerprint: str, *, capacity: int, directory: Path | None = None) -> None:
        if capacity < 1 and directory is None:
            raise ConfigError(f"capacity {capacity} and no directory but at least one image must be kept (encoder cache). Raise it.")
        self.hits = self.misses = 0
        self._encode, self._fingerprint, self._capacity = encode, fingerprint, capacity
        self._directory = None if directory is None else directory / fingerprint
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # streams encode in a thread of their own

    def __call__(self, pixel_values: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m k v"]:
        """Visual tokens on the CPU, float32; images that are not known are encoded in one batch."""
        keys = [_key(image) for image in pixel_values]
        with self._lock:
            found = {key: tokens for key in dict.fromkeys(keys) if (tokens := self._look_up(key)) is not None}
            unknown = {key: i for i, key in enumerate(keys) if key not in found}
            self.hits, self.misses = self.hits + len(keys) - len(unknown), self.misses + len(unknown)
            if unknown:
                encoded = self._encode(pixel_values[list(unknown.values())]).float().cpu()
                for key, tokens in zip(unknown, encoded, strict=True):
                    found[key] = tokens.clone(memory_format=torch.contiguous_format)
                    self._store(key, found[key])
        return torch.stack([found[key] for key in keys])

    def _look_up(self, key: str) -> Tensor | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        try:
            tokens = load_file(self._path(key))["tokens"] if self._directory is not None else None
        except (OSError, SafetensorError, KeyError):  # absent, or cut short by a crash: encoded again
            return None
        if tokens is not None:
            self._remember(key, tokens)
        return tokens

    def _store(self, key: str, tokens: Tensor) -> None:
        self._remember(key, tokens)
        if self._directory is not None:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"tokens": tokens}, path)

    def _remember(self, key: str, tokens: Tensor) -> None:
        self._memory[key] = tokens
        while len(self._memory) > self._capacity:
            self._memory.popitem(last=False)

    def _path(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / key[:2] / f"{key}.safetensors"


def use_visual_tokens(readable: Readable, cache: EncoderCache) -> Readable:
    """The same sequence or batch with visual tokens in place of pixels."""
    if not len(readable.pixel_values):
        return readable
    tokens = cache(readable.pixel_values).to(readable.pixel_values.device)
    if readable.visual_tokens is not None:  # some images came as visual tokens already
        tokens = readable.visual_tokens.masked_scatter(readable.from_pixels[:, None, None], tokens.to(readable.visual_tokens.dtype))
    return replace(
        readable, pixel_values=readable.pixel_values[:0], visual_tokens=tokens, from_pixels=torch.zeros_like(readable.from_pixels)
    )


@dataclass(frozen=True)
class CachingEncode:
    """A stream's `encode` whose images go through the cache."""

    encode: Callable[[Example], TokenSequence]
    cache: EncoderCache

    def __call__(self, example: Example) -> TokenSequence:
        """The example as a sequence without pixels."""
        return use_visual_tokens(self.encode(example), self.cache)


def _key(image: Float[Tensor, "3 h w"]) -> str:
    content = image.detach().cpu().contiguous()
    digest = hashlib.blake2b(str((tuple(content.shape), str(content.dtype))).encode(), digest_size=16)
    digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
