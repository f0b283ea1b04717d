"""Outputs of the frozen vision encoder, kept by image, so that an image seen again is not encoded again.

Axes: m images given as pixels, n images, k visual tokens per image, v vision width.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from metamorph.batch import Batch, TokenSequence
from metamorph.errors import ConfigError
from metamorph.messages import Example

Readable = TypeVar("Readable", TokenSequence, Batch)


class EncoderCache:
    """Pixels -> visual tokens through memory (the most recently used `capacity` images), then the encoder.

    What is to outlive the process is encoded beforehand: `metamorph.data.token_store`.

    Args:
        encode: the frozen encoder, "m 3 h w" -> "m k v".
        capacity: images to keep in memory.

    Raises:
        ConfigError: it could keep nothing.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity {capacity} but at least one image must be kept (encoder cache). Raise it.")
        self.hits = self.misses = 0
        self._encode, self._capacity = encode, capacity
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
                    self._remember(key, found[key])
        return torch.stack([found[key] for key in keys])

    def _look_up(self, key: str) -> Tensor | None:
        if key not in self._memory:
            return None
        self._memory.move_to_end(key)
        return self._memory[key]

    def _remember(self, key: str, tokens: Tensor) -> None:
        self._memory[key] = tokens
        while len(self._memory) > self._capacity:
            self._memory.popitem(last=False)


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
