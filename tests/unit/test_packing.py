"""Rows filled ahead of time: full, in random order, every document once, exactly resumable; documents isolated from each other."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sequences import Numbers, encode, make_stream, realistic_length, sequence
from tests.tiny import save_parts

from metamorph.data.collate import pack_rows, pad, unpack
from metamorph.data.mixture import Mixture, WeightedSource
from metamorph.data.packing import Packing, RowPacker, fill_row
from metamorph.data.stream import BatchStream, without_targets
from metamorph.errors import CheckpointError, ConfigError, ContextLengthError, MediaError

lengths_of_documents = st.lists(st.integers(1, 20), min_size=1, max_size=60)


@dataclass(frozen=True)
class Document:
    """A document without content, so that many can be packed in little time."""

    id: str
    length: int
    is_blank: bool = False

    def __len__(self):
        return self.length


def measure(example):
    return Document(example.id, 2 + 7 * int(example.messages[0].text) % 14)


def refuse_threes(example):
    if example.messages[0].text == "3":
        raise MediaError("a broken image")
    return measure(example)


def blank(document):
    return replace(document, is_blank=True)


def packed(encode=measure, *, max_length=40, look_ahead=2, order="epoch", **options):
    """Three rows a step, of documents without content; a micro-batch is a list of rows."""
    options = {"batch_size": 3, "prefetch": 0, "blank": blank, "collate": list, **options}
    return make_stream(encode, order=order, packing=Packing(max_length, look_ahead), **options)


def ids(step):
    return [document.id for batch in step for row in batch for document in row]


def rows_of(lengths, packing):
    packer = RowPacker(iter([Document(f"s{i}", n) for i, n in enumerate(lengths)]), packing)
    rows = []
    while row := packer.next_row():
        rows.append([int(document.id[1:]) for document in row])
    return rows


def best_sum(lengths, max_length):
    """The slow twin of `fill_row`: the fullest row that holds the first document, by trying all."""
    sums = {lengths[0]}
    for length in lengths[1:]:
        sums |= {total + length for total in sums if total + length <= max_length}
    return max(sums)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(20, 60))
def test_a_row_is_the_fullest_that_holds_the_oldest_document(lengths, max_length):
    chosen = fill_row(lengths, max_length)
    assert chosen[0] == 0 and chosen == sorted(set(chosen))
    assert sum(lengths[i] for i in chosen) == best_sum(lengths, max_length)


@given(lengths_of_documents, st.integers(20, 60), st.integers(1, 4))
def test_every_document_is_placed_once_and_whole(lengths, max_length, look_ahead):
    rows = rows_of(lengths, Packing(max_length, look_ahead))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= max_length for row in rows)
    for number, row in enumerate(rows):  # nothing waits longer than what is placed before it
        assert min(row) == min(i for later in rows[number:] for i in later)


def test_early_documents_come_first_where_rows_are_as_full():
    assert rows_of([5, 5, 5, 5, 5, 5], Packing(10, 3)) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("max_length", "least"), [(512, 0.985), (2048, 0.985), (4096, 0.985)])
def test_rows_of_a_realistic_mix_are_full(max_length, least):
    lengths = [n for n in map(realistic_length, range(3000)) if n <= max_length]
    rows = rows_of(lengths, Packing(max_length))
    assert sum(lengths) / (len(rows) * max_length) > least  # of the whole epoch, its last rows included
    fills = [sum(lengths[i] for i in row) / max_length for row in rows[: -len(rows) // 10]]
    assert sum(fills) / len(fills) > 0.99


def realistic(size, *, batch_size):
    def encode(example):
        return Document(example.id, realistic_length(int(example.messages[0].text)))

    mixture = Mixture([WeightedSource(Numbers("n", size))], seed=0)
    return BatchStream(mixture, encode, batch_size=batch_size, packing=Packing(2048), collate=list, blank=blank)


def correlation(x, y):
    pairs = torch.tensor([x, y], dtype=torch.float64)
    return float(torch.corrcoef(pairs.argsort(dim=1).argsort(dim=1).double())[0, 1])


def test_the_order_stays_random():
    stream = realistic(2000, batch_size=4)
    found = [(number, int(name[2:])) for number, step in enumerate(stream) for name in ids(step)]
    assert sorted(row for _, row in found) == list(range(2000))
    steps, rows = zip(*found, strict=True)
    assert abs(correlation(steps, [realistic_length(row) for row in rows])) < 0.06  # short ones no sooner than long ones
    assert abs(correlation(steps, rows)) < 0.06


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.integers(16, 60))
def test_an_epoch_comes_once_on_any_number_of_ranks(world_size, epochs, seed, max_length):
    expected = Mixture([WeightedSource(Numbers("a", 40)), WeightedSource(Numbers("b", 7), repeats=0.5)], seed=seed, epochs=epochs)
    drawn = sorted(expected.example(draw).id for draw in expected.draw(10_000))
    others_go_on, found = [True], []

    def gather(own):
        return [own] if world_size == 1 else [own, (not others_go_on[0], ())]

    options = {"max_length": max_length, "batch_size": 2 * world_size, "seed": seed, "epochs": epochs, "gather": gather}
    ranks = [packed(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    while any(steps := [next(rank, []) for rank in ranks]):
        rows = [row for step in steps for batch in step for row in batch]
        real = [row for row in rows if not row[0].is_blank]
        if not real:  # all have run out; each goes on blank as long as it is told that others do not
            break
        assert all(1 <= sum(map(len, step)) <= 2 for step in steps)  # every rank has something to run
        assert all(sum(map(len, row)) <= max_length for row in real)
        found += [document.id for row in real for document in row]
    assert sorted(found) == drawn
    others_go_on[0] = False
    assert all(next(rank, None) is None for rank in ranks)


def taken(stream, number):
    return [ids(step) for _, step in zip(range(number), stream, strict=False)]


@settings(max_examples=15)
@given(st.integers(0, 9), st.sampled_from(["epoch", "infinite"]), st.sampled_from([0, 2]), st.integers(1, 4))
def test_resume_is_exact_anywhere(stop, order, prefetch, look_ahead):
    whole = taken(packed(order=order, look_ahead=look_ahead, epochs=3), 12)
    first = packed(order=order, look_ahead=look_ahead, epochs=3, prefetch=prefetch)
    taken(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = packed(order=order, look_ahead=look_ahead, epochs=3, prefetch=prefetch, micro_batch_size=1)
    second.load_state_dict(state)
    assert state["step"] == min(stop, len(whole))
    assert taken(second, 12 - stop) == whole[stop:]
    second.close()


def test_the_state_holds_what_waits_and_no_more():
    stream = realistic(5000, batch_size=2)
    sizes = []
    for _ in range(40):
        next(stream)
        sizes.append(len(json.dumps(stream.state_dict())))
    stream.close()
    assert max(sizes) < 2000


def test_states_of_other_ranks_or_of_batches_of_draws_are_refused():
    state = packed(batch_size=4, rank=1, world_size=2).state_dict()
    with pytest.raises(CheckpointError, match="rows packed by rank 1 of 2 but this is rank 0 of 1"):
        packed().load_state_dict(state)
    with pytest.raises(CheckpointError, match="rows packed ahead but this stream has draws"):
        make_stream(order="epoch").load_state_dict(state)
    with pytest.raises(CheckpointError, match="draws but this stream has rows packed ahead"):
        packed().load_state_dict(make_stream(order="epoch").state_dict())


def test_rows_are_shared_evenly_or_refused():
    with pytest.raises(ConfigError, match="batch_size 3 in packed rows but 2 processes"):
        packed(world_size=2)
    with pytest.raises(ConfigError, match="look_ahead 0"):
        Packing(100, 0)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ContextLengthError, match=r"\d+ positions but at most 5 fit \([ab]-\d+\)"):
        taken(packed(max_length=5), 5)


def until_refused(stream):
    """What comes before the refusal, and the state then."""
    given = []
    with pytest.raises(MediaError, match=r"a broken image \[[ab]:[ab]-3\]"):
        given += iter(lambda: ids(next(stream)), None)
    with pytest.raises(MediaError):
        next(stream)
    return stream.state_dict()


def test_an_error_comes_at_the_same_step_and_again():
    states = [until_refused(packed(refuse_threes, seed=3, prefetch=prefetch, look_ahead=1)) for prefetch in (0, 2)]
    assert states[0] == states[1] and states[0]["step"] > 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_worker_processes_change_no_row():
    def rows(stream, number):
        return [[batch.ids for batch in step] for _, step in zip(range(number), stream, strict=False)]

    options = {"epochs": 2, "encode": encode, "collate": pack_rows, "blank": without_targets}
    expected = rows(packed(**options), 20)
    two = packed(**options, workers=2, prefetch=2)
    assert rows(two, 5) == expected[:5]
    state = two.state_dict()
    two.close()
    again = packed(**options, workers=1)
    again.load_state_dict(state)
    assert rows(again, 20) == expected[5:]
    assert len(expected) > 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from metamorph.model.conversion import initialize

    return initialize(*map(str, save_parts(tmp_path_factory.mktemp("parts"))), seed=0, num_visual_tokens=4)[0].eval()


def documents(rng, count):
    """Token sequences for the tiny model, with images read and drawn."""
    made = []
    for number in range(count):
        images = ("pixels", "drawn")[: int(rng.integers(0, 3))]
        one = sequence(number, before=int(rng.integers(1, 6)), images=images, after=int(rng.integers(1, 5)), k=4, side=32)
        words = torch.from_numpy(rng.integers(5, 200, len(one)))
        labels = torch.where(one.labels == -100, -100, words)
        made.append(replace(one, input_ids=words, labels=labels, pixel_values=one.pixel_values * 1e-4))
    return made


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_changing_a_document_changes_no_other_documents_outputs(model, seed, count):
    import numpy as np

    rng = np.random.default_rng(seed)
    made = documents(rng, count)
    packer = RowPacker(iter(made), Packing(40, 2))
    rows = []
    while row := packer.next_row():
        rows.append(row)
    changed = rows[0][int(rng.integers(len(rows[0])))]
    other = replace(changed, input_ids=changed.input_ids.flip(0) + 1, pixel_values=changed.pixel_values * -1.0)
    twin = [[other if document is changed else document for document in row] for row in rows]
    with torch.no_grad():
        before, after = (_states(model, pack_rows(one)) for one in (rows, twin))
        alone = _states(model, pad([made[0]]))
    assert not torch.equal(before[changed.id], after[changed.id])
    for name in before.keys() - {changed.id}:
        assert torch.equal(before[name], after[name]), name
    torch.testing.assert_close(before["s0"], alone["s0"], atol=1e-5, rtol=1e-4)


def _states(model, batch):
    """The last states of each document, by id."""
    hidden = model(**batch.model_inputs()).last_hidden_state
    lengths = batch.document_lengths or tuple((int(n),) for n in batch.attention_mask.sum(dim=1))
    names = iter(batch.ids)
    return {next(names): part for row, spans in zip(hidden, lengths, strict=True) for part in row[: sum(spans)].split(list(spans))}


def test_rows_given_are_rows_laid_out():
    made = [sequence(i, images=("drawn",) * (i % 2)) for i in range(4)]
    batch = pack_rows([[made[2], made[0]], [made[1], made[3]]])
    assert batch.ids == ("s2", "s0", "s1", "s3") and [s.id for s in unpack(batch)] == list(batch.ids)
    assert batch.document_lengths == ((4, 4), (8, 8))
