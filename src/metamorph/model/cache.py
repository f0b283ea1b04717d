"""The LLM's keys and values during a generation: a cache that grows in place, and yet never changes for a state that is kept.

`transformers`' own cache copies everything for each new column. Here a layer's columns lie at the front of a `Store` with spare columns
behind them. A layer that ends where the store is filled to writes its next column there; copies of the layer that are shorter see only
their own columns. Where another copy has already gone on, the columns are copied to a new store first. So a state may be kept, replayed
or forked as if each had a cache of its own. (One thread at a time may advance states that share a past.)

Axes: b rows, t cached positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 64
"""Columns that a new store has to spare: an image of the paper's. They cost memory; every `SPARE` steps everything is copied once."""


@dataclass
class Store:
    """Room for the columns of one layer."""

    keys: Float[Tensor, "b heads room width"]
    values: Float[Tensor, "b heads room width"]
    filled: int  # columns that hold something, of the longest layer that lives here

    @classmethod
    def holding(cls, keys: Float[Tensor, "b heads t width"], values: Float[Tensor, "b heads t width"], new: int) -> Store:
        """A store with these columns, and room for `new` ones and some more."""
        length = keys.shape[-2]
        rooms = [side.new_empty((*side.shape[:-2], length + new + SPARE, side.shape[-1])) for side in (keys, values)]
        for room, side in zip(rooms, (keys, values), strict=True):
            room.narrow(-2, 0, length).copy_(side)
        return cls(rooms[0], rooms[1], length)

    def ends_with(self, keys: Float[Tensor, "b heads t width"]) -> bool:
        """Whether these columns are all that the store holds: nobody has gone on from them, or put other tensors in their place."""
        same = keys.data_ptr() == self.keys.data_ptr() and keys.shape[:-2] == self.keys.shape[:-2] and keys.shape[-2] == self.filled
        return same and self.keys.is_inference() == torch.is_inference_mode_enabled()  # tensors of one mode cannot be written in the other


class GrowingLayer(DynamicLayer):
    """The columns of one layer: `keys` and `values`, as `transformers` expects them, look at the front of a store."""

    store: Store | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; all columns of this layer."""
        length, new = self.get_seq_length(), key_states.shape[-2]
        if not length:  # the prompt, which is often all there is
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        assert self.keys is not None and self.values is not None
        store = self.store
        if store is None or not store.ends_with(self.keys) or length + new > store.keys.shape[-2]:
            store = self.store = Store.holding(self.keys, self.values, new)
        store.keys.narrow(-2, length, new).copy_(key_states)
        store.values.narrow(-2, length, new).copy_(value_states)
        store.filled = length + new
        self.keys, self.values = store.keys.narrow(-2, 0, store.filled), store.values.narrow(-2, 0, store.filled)
        return self.keys, self.values


def new_cache() -> DynamicCache:
    """An empty cache. Every layer keeps all positions, sliding windows being masked, so that rows may join."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that may grow without the other seeing it."""
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    return result


def layers_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values "b heads t width" of each layer."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return [(keys, values) for keys, values in pairs if keys is not None and values is not None]


def with_layers(cache: DynamicCache, layers: Sequence[tuple[Tensor, ...]]) -> DynamicCache:
    """The same cache with other keys and values."""
    result = fork_cache(cache)
    for layer, (keys, values) in zip(result.layers, layers, strict=True):
        layer.keys, layer.values = keys, values
        if isinstance(layer, GrowingLayer):
            layer.store = None
    return result
