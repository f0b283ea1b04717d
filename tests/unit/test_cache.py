"""The cache that grows in place: states that share a past never see each other's future."""

import torch

from metamorph.model.cache import SPARE, fork_cache, layers_of, new_cache, with_layers

WIDTH = 3


def columns(count: int, seed: int) -> torch.Tensor:
    return torch.randn(2, 1, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def grow(cache, count: int, seed: int):
    """A fork with `count` more columns, in both of two layers."""
    cache = fork_cache(cache)
    for layer in (0, 1):
        cache.update(columns(count, seed + layer), -columns(count, seed + layer), layer)
    return cache


def expected(*pieces: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.cat([columns(count, seed + layer) for count, seed in pieces], dim=-2) for layer in (0, 1)]


def assert_holds(cache, *pieces: tuple[int, int]) -> None:
    assert cache.get_seq_length() == sum(count for count, _ in pieces)
    for (keys, values), wanted in zip(layers_of(cache), expected(*pieces), strict=True):
        assert torch.equal(keys, wanted)
        assert torch.equal(values, -wanted)


def test_states_that_share_a_past_do_not_share_a_future():
    prompt = grow(new_cache(), 5, 0)
    first = grow(prompt, 1, 10)
    second = grow(first, 1, 20)
    other = grow(first, 1, 30)  # the column after `first` is taken by `second`
    again = grow(prompt, 2, 40)
    assert_holds(grow(second, 1, 50), (5, 0), (1, 10), (1, 20), (1, 50))
    assert_holds(grow(other, 3, 60), (5, 0), (1, 10), (1, 30), (3, 60))
    for cache, pieces in (
        (prompt, ()),
        (first, ((1, 10),)),
        (second, ((1, 10), (1, 20))),
        (other, ((1, 10), (1, 30))),
        (again, ((2, 40),)),
    ):
        assert_holds(cache, (5, 0), *pieces)


def test_columns_are_copied_only_where_a_store_ends():
    cache, stores = grow(new_cache(), 5, 0), set()
    for step in range(2 * SPARE):
        cache = grow(cache, 1, 100 + 2 * step)
        stores.add(layers_of(cache)[0][0].data_ptr())
    assert len(stores) == 2
    assert_holds(cache, (5, 0), *((1, 100 + 2 * step) for step in range(2 * SPARE)))


def test_other_columns_leave_the_store():
    cache = grow(grow(new_cache(), 5, 0), 1, 10)
    left = with_layers(cache, [(keys[:1], values[:1]) for keys, values in layers_of(cache)])
    grown = fork_cache(left)
    for layer in (0, 1):
        grown.update(columns(1, 20)[:1], columns(1, 20)[:1], layer)
    assert grown.get_seq_length() == 7
    assert_holds(grow(cache, 1, 30), (5, 0), (1, 10), (1, 30))
