"""The order of a mixture: deterministic, complete, in proportion, resumable at any position."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sequences import Numbers

from metamorph.data.mixture import Mixture, WeightedSource, mean_length, shuffled
from metamorph.errors import CheckpointError, ConfigError


def mixture(*entries, seed=0, order="infinite", **options):
    """Sources of (length, weight); in epochs the second number is their repeats."""
    named = "repeats" if order == "epoch" else "weight"
    sources = [WeightedSource(Numbers(f"n{i}", n), **{named: rate}) for i, (n, rate) in enumerate(entries)]
    return Mixture(sources, seed=seed, order=order, **options)


@given(st.integers(1, 100), st.integers(0, 2**70))
def test_shuffled_is_a_permutation(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffled_puts_every_item_everywhere():
    for size in (3, 5):
        places = Counter(shuffled(0, size, key) for key in range(100 * size))
        assert min(places.values()) > 60
        assert max(places.values()) < 150


def test_shuffled_is_fast_for_millions():
    assert shuffled(12_345_678, 16_066_000, 7) != 12_345_678  # nothing of that size is allocated


def test_an_epoch_holds_every_row_as_often_as_its_repeats_say():
    draws = mixture((10, 1), (4, 3), (20, 0.5), order="epoch").draw(1000)
    counts = Counter(draws)
    assert len(draws) == 10 + 12 + 10
    assert all(counts[0, i] == 1 for i in range(10))
    assert all(counts[1, i] == 3 for i in range(4))
    assert sorted(counts[2, i] for i in range(20)) == [0] * 10 + [1] * 10


def test_epochs_differ_and_end():
    order = mixture((30, 1), (20, 0.5), order="epoch", epochs=2)
    first, second, rest = order.draw(order.epoch_length), order.draw(order.epoch_length), order.draw(5)
    assert first != second
    assert {d for d in first if d.source == 1} != {d for d in second if d.source == 1}  # another half each time
    assert len(second) == 40
    assert rest == []


def test_infinite_draws_follow_the_weights_and_pass_over_every_row():
    draws = mixture((50, 3), (1000, 1)).draw(800)
    counts = Counter(d.source for d in draws)
    assert 550 < counts[0] < 650
    first_pass = [d.index for d in draws if d.source == 0][:50]
    second_pass = [d.index for d in draws if d.source == 0][50:100]
    assert sorted(first_pass) == sorted(second_pass) == list(range(50))
    assert first_pass != second_pass


def test_the_order_depends_on_the_seed_only():
    assert mixture((50, 1), (9, 1), seed=5).draw(80) == mixture((50, 1), (9, 1), seed=5).draw(80)
    assert mixture((50, 1), (9, 1), seed=5).draw(80) != mixture((50, 1), (9, 1), seed=6).draw(80)


@given(st.sampled_from(["infinite", "epoch"]), st.integers(0, 60), st.integers(1, 30))
def test_any_position_can_be_resumed(order, before, after):
    one = mixture((13, 1), (7, 2.5), seed=3, order=order, epochs=3)
    one.draw(before)
    state = json.loads(json.dumps(one.state_dict()))
    two = mixture((13, 1), (7, 2.5), seed=3, order=order, epochs=3)
    two.load_state_dict(state)
    assert one.draw(after) == two.draw(after)


@pytest.mark.parametrize(
    ("other", "found"),
    [({"seed": 1}, "seed 0 but this mixture has 1"), ({"order": "epoch"}, "repeats None"), ({}, r"lengths \[5\] .* \[6\]")],
)
def test_a_state_of_another_mixture_is_refused(other, found):
    state = mixture((5, 1)).state_dict()
    with pytest.raises(CheckpointError, match=found):
        mixture((5 if other else 6, 1), **other).load_state_dict(state)


def capped(cap, *, seed=0, length=100, **options):
    sources = [WeightedSource(Numbers("a", length), max_examples=cap), WeightedSource(Numbers("b", 5))]
    return Mixture(sources, seed=seed, **options)


def rows_of(order, number):
    """The ids of the drawn examples of the capped source."""
    return [order.example(draw).id for draw in order.draw(number) if draw.source == 0]


def test_a_cap_is_a_random_subset_the_same_in_every_pass():
    order = capped(10, epochs=2)
    assert order.epoch_length == 15
    first, second = rows_of(order, 15), rows_of(order, 15)
    assert len(set(first)) == 10 and sorted(first) == sorted(second) and first != second
    assert set(first) != {f"a-{index}" for index in range(10)}  # not simply the first ones
    assert sorted(rows_of(capped(10), 15)) == sorted(first) != sorted(rows_of(capped(10, seed=1), 15))
    assert rows_of(capped(10, order="infinite"), 40)[0] in first
    assert capped(200).epoch_length == 105  # a cap above the source's length changes nothing


def test_a_state_of_another_cap_is_refused():
    for ours, theirs in ((10, 11), (None, 10), (10, None)):
        with pytest.raises(CheckpointError, match="max_examples"):
            capped(ours).load_state_dict(capped(theirs).state_dict())


def test_mean_length_is_measured_on_the_same_rows_each_time():
    asked = []

    def encode(example):
        asked.append(example.id)
        return range(10 + 10 * (int(example.messages[0].text) % 2))

    assert mean_length(Numbers("n", 4), encode, 100) == 15  # all rows, where the source is small
    asked.clear()
    measured = mean_length(Numbers("n", 1000), encode, 50)
    assert 12 < measured < 18 and len(set(asked)) == 50
    before = list(asked)
    assert mean_length(Numbers("n", 1000), encode, 50) == measured and asked == before * 2


@given(st.sampled_from(["infinite", "epoch"]), st.integers(0, 40), st.integers(1, 8), st.integers(0, 3))
def test_a_place_that_was_noted_is_a_place_to_go_on_from(order, before, size, further):
    one, two = capped(7, order=order), capped(7, order=order)
    one.draw(before)
    place = one.place
    expected = one.draw(size)
    one.draw(further)
    two.load_state_dict(one.state_dict(place))
    assert two.draw(size) == expected


def test_weights_of_the_loss_multiply():
    drawn = Mixture([WeightedSource(Numbers("n", 3), loss_weight=0.25)], seed=0)
    assert drawn.example(drawn.draw(1)[0]).weight == 0.5


@pytest.mark.parametrize(
    ("entries", "found"), [([], "0 sources"), ([(0, 1)], "0 examples"), ([(3, 0)], "weight 0 but"), ([(3, -1)], "weight -1")]
)
def test_impossible_mixtures_are_refused(entries, found):
    with pytest.raises(ConfigError, match=found):
        mixture(*entries)


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"2 sources called 'n' but losses and bad rows are told by name \(mixture\)"):
        Mixture([WeightedSource(Numbers("n", 3)), WeightedSource(Numbers("m", 3)), WeightedSource(Numbers("n", 4))], seed=0)
