"""Rows that cannot be used: passed over in the same way whoever reads them, counted once, written down, limited; long ones cut by turns."""

import json
import logging
from dataclasses import dataclass

import pytest
from tests.sequences import Numbers, make_stream, refuse_many, sequence

from metamorph.data.collate import pack_rows
from metamorph.data.example_encoder import ExampleEncoder
from metamorph.data.mixture import Draw, Mixture, WeightedSource
from metamorph.data.packing import Packing
from metamorph.data.skipping import BadRecord, BadRecords, RowReader
from metamorph.errors import AlignmentError, ContextLengthError, MediaError, RecordError
from metamorph.messages import Example, Message


def ids(steps):
    return [name for step in steps for batch in step for name in batch.ids]


def mixture(size=40):
    return Mixture([WeightedSource(Numbers("a", size))], seed=0)


@pytest.mark.parametrize(("drawn", "given", "passed"), [(2, "a-2", []), (3, "a-5", [3, 4]), (4, "a-5", [4]), (34, "a-0", [34])])
def test_the_next_good_row_of_the_source_takes_the_place(drawn, given, passed):
    item, bad = RowReader(mixture(35), refuse_many, skip=5).read(Draw(0, drawn))
    assert item.id == given
    assert [(record.source, record.index) for record in bad] == [("a", index) for index in passed]
    assert all(f"[a:a-{record.index}]" in record.error for record in bad)


def test_a_capped_source_names_the_row_of_its_file():
    capped = Mixture([WeightedSource(Numbers("a", 40), max_examples=20)], seed=0)
    _, *found = zip(*(RowReader(capped, refuse_many, skip=20).read(Draw(0, index)) for index in range(20)), strict=True)
    bad = {record for records in found[0] for record in records}
    assert bad and all(f"[a:a-{record.index}]" in record.error for record in bad)


def test_by_default_the_first_bad_row_is_refused():
    with pytest.raises(MediaError, match=r"a broken image \[a:a-3\]"):
        RowReader(mixture(), refuse_many).read(Draw(0, 3))


def always(error):
    def encode(example):
        raise error

    return encode


def test_a_source_without_good_rows_is_refused():
    for limit in (4, 0):
        with pytest.raises(RecordError, match=rf"{limit + 1} bad rows one after another.*at most {limit}.*source a.*data check"):
            RowReader(mixture(40), always(RecordError("broken")), skip=limit).read(Draw(0, 0))
    with pytest.raises(RecordError, match=r"4 bad rows, which are all, the last: broken.*at least one that can be used.*source a"):
        RowReader(mixture(4), always(RecordError("broken")), skip=100).read(Draw(0, 0))


def test_what_is_no_fault_of_the_row_is_not_passed_over():
    for error in (AlignmentError("of another model"), ZeroDivisionError("a bug")):
        with pytest.raises(type(error)):
            RowReader(mixture(), always(error), skip=100).read(Draw(0, 0))


def test_bad_records_may_have_names_that_are_not_utf8(tmp_path, caplog):
    path = tmp_path / "bad_records.jsonl"
    records = BadRecords(9, path, "vpit")
    for index in range(2):
        records.add([BadRecord("a", index, "broken (a.tar sample caf\udce9)")])
    assert [json.loads(line)["error"] for line in path.read_text().splitlines()] == ["broken (a.tar sample caf\udce9)"] * 2
    BadRecords(9, path, "other").add([BadRecord("a", 0, "caf\udce9")])
    assert len(path.read_text().splitlines()) == 3 and r"caf\udce9" in caplog.text


def test_bad_records_count_once_and_are_named(tmp_path, caplog):
    path = tmp_path / "run" / "bad_records.jsonl"
    records = BadRecords(2, path, "vpit")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            records.add([BadRecord("a", 3, "broken (a.jsonl:4)"), BadRecord("b", 3, "long (b.jsonl:4)")])
    assert records.counts == {"a": 1, "b": 1}
    assert [line.getMessage() for line in caplog.records] == [
        "skipped a row of a: broken (a.jsonl:4)",
        "skipped a row of b: long (b.jsonl:4)",
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {"stage": "vpit", "source": "b", "index": 3, "error": "long (b.jsonl:4)"}
    for _ in range(2):  # asked again it says so again
        with pytest.raises(RecordError, match=r"3 bad rows \(2 of a, 1 of b; the last: no\) but at most 2 .*listed in .*bad_records"):
            records.add([BadRecord("a", 9, "no")])


def test_the_file_follows_the_state_on_resume(tmp_path):
    path = tmp_path / "bad_records.jsonl"
    BadRecords(9, path, "projector").add([BadRecord("a", 1, "x")])
    first = BadRecords(9, path, "vpit")
    first.add([BadRecord("a", 2, "y")])
    state = json.loads(json.dumps(first.state_dict()))
    first.add([BadRecord("a", 3, "z")])
    with path.open("a") as file:
        file.write('{"stage": "vp')  # the process died
    again = BadRecords(9, path, "vpit")
    again.load_state_dict(state)
    again.add([BadRecord("a", 2, "y"), BadRecord("a", 4, "w")])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [1, 2, 4]
    assert again.counts == {"a": 2}


def skipping(limit=50, path=None, **options):
    return make_stream(refuse_many, order="epoch", epochs=2, bad_records=BadRecords(limit, path), **{"prefetch": 0, **options})


PACKED = {"packing": Packing(40, 2), "collate": pack_rows, "batch_size": 2}
EXPECTED = {"a": 8, "b": 2}  # rows 3, 4, 13, ... of 40, and 3 and 4 of the 7 of which half come in each epoch


@pytest.mark.parametrize("options", [{}, {"prefetch": 2}, {"micro_batch_size": 2}, PACKED])
def test_a_stream_passes_over_bad_rows_and_counts_them(options, tmp_path):
    stream = skipping(path=tmp_path / "bad.jsonl", **options)
    found = ids(stream)
    assert len(found) == 88 and not any(name[-1] in "34" for name in found)
    assert stream.bad_records.counts["a"] == 8 and stream.bad_records.counts.keys() <= EXPECTED.keys()
    assert sum(stream.bad_records.counts.values()) == len((tmp_path / "bad.jsonl").read_text().splitlines())


def test_skipping_does_not_depend_on_ranks():
    def heard(own):
        return [own, (False, ())]

    whole = skipping()
    ranks = [skipping(rank=rank, world_size=2, gather=heard) for rank in range(2)]
    for step in whole:
        shares = [batch for rank in ranks for batch in next(rank)]
        assert sorted(name for batch in shares if batch.target_counts["text"] for name in batch.ids) == sorted(ids([step]))


def test_bad_rows_of_all_ranks_count_and_stop_all():
    both = [skipping(limit=3, rank=rank, world_size=2) for rank in range(2)]
    shares = [[stream._steps[plan].bad for _, plan in zip(range(3), _plans_of(stream), strict=False)] for stream in both]
    steps = list(zip(*shares, strict=True))
    for rank in range(2):
        said = iter(steps)
        stream = skipping(limit=3, rank=rank, world_size=2, gather=lambda own, said=said: [(False, bad) for bad in next(said)])
        with pytest.raises(RecordError, match="but at most 3 may be skipped"):
            ids(stream)
        both[rank] = stream.state_dict()["step"], stream.bad_records.counts
    assert both[0] == both[1]


def _plans_of(stream):
    from metamorph.data.stream import _plans

    mixture = Mixture(stream._mixture.sources, seed=0, order="epoch", epochs=2)
    return _plans(mixture, 6, stream._rank, 2, 0)


@pytest.mark.parametrize("options", [{}, PACKED])
def test_resume_keeps_rows_and_counts(options):
    whole = skipping(**options)
    everything = [ids([step]) for step in whole]
    first = skipping(**options)
    for _ in range(3):
        next(first)
    second = skipping(**options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.bad_records.counts == first.bad_records.counts
    assert [ids([step]) for step in second] == everything[3:]
    assert second.bad_records.counts == whole.bad_records.counts


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("options", [{}, PACKED])
def test_worker_processes_skip_the_same_rows(options):
    one, two = skipping(**options), skipping(workers=2, **options)
    assert ids(one) == ids(two)
    assert one.bad_records.state_dict() == two.bad_records.state_dict()


@dataclass(frozen=True)
class Words:
    """A processor for which a turn is as long as its text."""

    def encode(self, messages, *, max_length, id, source, weight):
        length = sum(len(message.text) for message in messages)
        if length > max_length:
            raise ContextLengthError(f"{length} positions but at most {max_length} are allowed ({id}).")
        return sequence(0, before=0, after=length)


def talk(*lengths):
    turns = [(Message.user, Message.assistant)[number % 2]("x" * length) for number, length in enumerate(lengths)]
    return Example(tuple(turns), "talk", "talks")


@pytest.mark.parametrize(
    ("lengths", "left", "cut"),
    [((2, 3, 4, 5), 14, 0), ((2, 3, 4, 12), 5, 2), ((2, 3, 4, 5, 90), 14, 1), ((2, 3, 9, 9, 1, 1), 5, 4), ((10, 10), 20, 0)],
)
def test_a_long_conversation_loses_whole_turns_until_it_fits(lengths, left, cut):
    sequence = ExampleEncoder(Words(), 20, "cut_turns")(talk(*lengths))
    assert (len(sequence), sequence.turns_cut) == (left, cut)


def test_what_never_fits_is_a_bad_row_and_cutting_must_be_asked_for():
    with pytest.raises(ContextLengthError, match="21 positions"):
        ExampleEncoder(Words(), 20, "cut_turns")(talk(2, 19, 1, 1))
    with pytest.raises(ContextLengthError, match="23 positions"):
        ExampleEncoder(Words(), 20)(talk(2, 3, 9, 9))
