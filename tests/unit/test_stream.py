"""Streams: one order whatever reads it, exact resume, and errors that name the record."""

import json
import multiprocessing
import os
import signal
import threading
from functools import partial

import pytest
import torch
from tests.sequences import make_stream as stream
from tests.sequences import refuse, same, sequence

from metamorph.data.collate import pack, pack_rows, pad, unpack
from metamorph.data.example_encoder import ExampleEncoder
from metamorph.data.packing import Packing
from metamorph.data.stream import without_targets
from metamorph.errors import CheckpointError, ConfigError, ContextLengthError, MediaError, RecordError, TrainingError
from metamorph.messages import Example, Message


def crashing(example):
    raise ZeroDivisionError("a bug")


def ids(micro_batches):
    return [name for batch in micro_batches for name in batch.ids]


def take(steps, number):
    return [ids(next(steps)) for _ in range(number)]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetching_changes_nothing(prefetch):
    assert take(stream(prefetch=prefetch), 8) == take(stream(prefetch=0), 8)


def test_micro_batches_partition_the_step():
    whole, parts = next(stream()), next(stream(micro_batch_size=4))
    assert [len(batch) for batch in whole] == [6]
    assert [len(batch) for batch in parts] == [4, 2]
    assert ids(whole) == ids(parts)
    for kind in ("text", "visual"):
        assert sum(batch.target_counts[kind] for batch in parts) == whole[0].target_counts[kind]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("order", ["infinite", "epoch"])
def test_ranks_together_read_what_one_process_reads(world_size, order):
    alone = list(zip(range(9), stream(order=order, micro_batch_size=1)))  # noqa: B905  # the infinite order never ends
    ranks = [stream(order=order, micro_batch_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _, whole in alone:
        shares = [next(rank) for rank in ranks]
        assert len({len(share) for share in shares}) == 1  # the same number of forwards on every rank
        with_targets = [name for share in shares for batch in share if batch.target_counts["text"] for name in batch.ids]
        assert sorted(with_targets) == sorted(ids(whole))
        for kind in ("text", "visual"):
            total = sum(batch.target_counts[kind] for share in shares for batch in share)
            assert total == sum(batch.target_counts[kind] for batch in whole)
    if order == "epoch":
        assert len(alone) == 8  # 44 examples: seven whole steps and one of 2, fewer than some worlds have ranks
        for rank in ranks:
            with pytest.raises(StopIteration):
                next(rank)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resume_is_exact(prefetch, stop):
    uninterrupted = take(stream(seed=4), 10)
    first = stream(seed=4, prefetch=prefetch)
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))  # the thread has read further ahead
    second = stream(seed=4, prefetch=prefetch, micro_batch_size=2)
    second.load_state_dict(state)
    assert state["step"] == stop
    assert take(second, 10 - stop) == uninterrupted[stop:]


def test_a_stream_can_be_set_back():
    steps = stream()
    take(steps, 2)
    state = steps.state_dict()
    third = take(steps, 3)
    steps.load_state_dict(state)
    assert take(steps, 3) == third


def test_resume_with_other_ranks_continues_the_same_order():
    alone = stream()
    take(alone, 3)
    ranks = [stream(rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    assert sorted(ids(next(alone))) == sorted(ids(next(ranks[0])) + ids(next(ranks[1])))


def test_a_state_of_other_data_is_refused():
    with pytest.raises(CheckpointError, match="lengths"):
        stream(length=41).load_state_dict(stream().state_dict())


def test_packed_and_padded_streams_hold_the_same_sequences():
    padded, packed = stream(), stream(collate=partial(pack, max_length=30))
    for _ in range(3):
        a = {s.id: s for s in unpack(next(padded)[0])}
        b = {s.id: s for s in unpack(next(packed)[0])}
        assert a.keys() == b.keys()
        assert all(same(a[name], b[name]) for name in a)


def test_grouping_by_length_saves_padding_and_keeps_the_step():
    plain, grouped = next(stream(batch_size=16, micro_batch_size=4)), next(stream(batch_size=16, micro_batch_size=4, group_by_length=True))
    assert sorted(ids(plain)) == sorted(ids(grouped))
    assert sum(batch.input_ids.numel() for batch in grouped) < sum(batch.input_ids.numel() for batch in plain)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_names_the_record_and_comes_again(prefetch):
    steps = stream(refuse, length=5, prefetch=prefetch)
    with pytest.raises(MediaError, match=r"a broken image \[[ab]:[ab]-3\]"):
        take(steps, 5)
    state = steps.state_dict()
    with pytest.raises(MediaError, match="a broken image"):
        next(steps)
    assert steps.state_dict() == state


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bug_is_not_taken_for_the_end_of_the_data(prefetch):
    steps = stream(crashing, prefetch=prefetch)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(steps)


def test_a_long_record_is_named():
    with pytest.raises(ContextLengthError, match=r"positions .* but at most 3 fit \(s\d+\)"):
        next(stream(collate=partial(pad, max_length=3)))


def prefetching():
    return sum(thread.name.startswith("metamorph-prefetch") for thread in threading.enumerate())


def test_threads_end_with_the_stream():
    before, steps = prefetching(), stream()
    next(steps)
    assert prefetching() == before + 1
    steps.close()
    assert prefetching() == before
    assert len(ids(next(steps))) == 6  # it starts again where it was
    del steps  # forgotten rather than closed
    assert prefetching() == before


@pytest.mark.parametrize("options", [{}, {"packing": Packing(40, 2), "collate": pack_rows, "batch_size": 2}])
def test_a_killed_worker_is_named(options):
    before = set(multiprocessing.active_children())
    steps = stream(workers=1, **options)
    next(steps)
    for process in set(multiprocessing.active_children()) - before:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"a worker process that ended \(exit code -9\) but all 1 are needed .*Lower data\.workers"):
        take(steps, 100)
    assert set(multiprocessing.active_children()) == before


def test_blanked_sequences_have_no_targets():
    blank = without_targets(sequence(1, images=("drawn",)))
    assert pad([blank]).target_counts == {"text": 0, "visual": 0}
    assert blank.num_images == 1


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 but 0 to 1"),
        ({"batch_size": 2, "world_size": 3}, "batch_size 2 but 3 processes"),
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
    ],
)
def test_impossible_streams_are_refused(options, found):
    with pytest.raises(ConfigError, match=found):
        stream(**options)


def test_the_encoder_passes_identity_and_weight():
    class Processor:
        def encode(self, messages, *, max_length, id, source, weight):
            assert max_length == 9
            return sequence(int(messages[0].text), weight=weight)

    example = Example((Message.user("4"), Message.assistant("yes")), "x", "y", weight=0.5)
    assert ExampleEncoder(Processor(), 9)(example).weight == 0.5
    with pytest.raises(RecordError, match=r"0 assistant messages .*\(y:x\)"):
        ExampleEncoder(Processor(), 9)(Example((Message.user("4"),), "x", "y"))


def until_refused(steps):
    """What a stream gives before it refuses a record, the state then, and the refusal."""
    given = []
    try:
        for step in steps:
            given.append(ids(step))
    except MediaError as error:
        return given, steps.state_dict(), str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_worker_processes_change_nothing():
    expected = until_refused(stream(refuse, seed=11))
    before = torch.random.get_rng_state()
    assert until_refused(stream(refuse, seed=11, workers=2)) == expected
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(expected[0]) > 1
