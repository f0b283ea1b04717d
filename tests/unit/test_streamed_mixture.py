"""Training from streams: every row once an epoch over ranks, in proportion to the weights, resumed exactly, bad rows told."""

import io
import json
from collections import Counter
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.sequences import encode, refuse_many

from metamorph.data.collate import pack_rows
from metamorph.data.packing import Packing
from metamorph.data.skipping import BadRecords
from metamorph.data.stream import BatchStream
from metamorph.data.streamed_mixture import StreamedMixture, WeightedStream, stream_source
from metamorph.errors import CheckpointError, ConfigError, MediaError, RecordError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two data sets in shards: 30 rows, and 14."""
    root = tmp_path_factory.mktemp("shards")
    for name, sizes in (("a", (15, 15)), ("b", (6, 8))):
        first = 0
        for number, size in enumerate(sizes):
            rows = [talk(name, index) for index in range(first, first + size)]
            pq.write_table(pa.Table.from_pylist(rows), root / f"{name}-{number}.parquet")
            first += size
    return root


def talk(name, index):
    turns = [{"role": "user", "content": str(index)}, {"role": "assistant", "content": "yes"}]
    return {"id": f"{name}-{index}", "messages": turns}


def opened(files, *, seed=0, rank=0, world_size=1, weights=(3.0, 1.0)):
    sources = [stream_source(sorted(map(str, files.glob(f"{name}-*"))), name=name, block=4) for name in "ab"]
    streams = [WeightedStream(source, weight) for source, weight in zip(sources, weights, strict=True)]
    return StreamedMixture(streams, seed=seed, rank=rank, world_size=world_size)


def batches(files, encode=encode, *, rank=0, world_size=1, seed=0, **options):
    mixture = opened(files, rank=rank, world_size=world_size, seed=seed)
    return BatchStream(mixture, encode, **{"batch_size": 4, "rank": rank, "world_size": world_size, **options})


PACKED = {"packing": Packing(40, 2), "collate": pack_rows, "batch_size": 2}


def taken(stream, number):
    """The tensors of so many steps, as plain values."""
    return [[batch.input_ids.tolist() for batch in next(stream)] for _ in range(number)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_together_draw_every_row_once_an_epoch(files, world_size):
    ranks = [opened(files, rank=rank, world_size=world_size, weights=(1.0, 1e-9)) for rank in range(world_size)]
    first = [rank.draw(30 // world_size) for rank in ranks]
    second = [rank.draw(30 // world_size) for rank in ranks]
    names = [[draw.row.values["id"] for draw in chain(*draws)] for draws in (first, second)]
    assert sorted(names[0]) == sorted(names[1]) == sorted(f"a-{index}" for index in range(30))
    assert names[0] != names[1]
    assert sorted(draw.number for draw in chain(*first)) == list(range(30))  # bad rows of two ranks are never taken for one


def test_draws_follow_the_weights(files):
    counts = Counter(draw.source for draw in opened(files).draw(400))
    assert 270 < counts[0] < 330


@pytest.mark.parametrize("options", [{}, {"prefetch": 0}, {"micro_batch_size": 1}, PACKED, {**PACKED, "prefetch": 0}])
def test_resume_is_exact_anywhere(files, options):
    whole = taken(batches(files, **options), 20)
    for stop in (0, 1, 7, 15):  # within a block, and epochs later
        first = batches(files, **options)
        taken(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = batches(files, **options)
        second.load_state_dict(state)
        assert taken(second, 20 - stop) == whole[stop:]
        second.close()


@pytest.mark.parametrize("options", [{}, PACKED])
def test_worker_processes_give_the_same_steps(files, options):
    one, two = batches(files, **options), batches(files, workers=1, **options)
    assert taken(one, 9) == taken(two, 9)
    assert one.state_dict() == two.state_dict()
    two.close()


@pytest.mark.parametrize("options", [{}, PACKED])
def test_bad_rows_are_left_out_and_counted_or_refused(files, options):
    stream = batches(files, refuse_many, bad_records=BadRecords(100), **options)
    found = [name for _ in range(12) for batch in next(stream) for name in batch.ids]
    assert found and not any(name[-1] in "34" for name in found)
    assert stream.bad_records.counts.keys() == {"a", "b"}
    assert all("row" in error and "of epoch" in error for _, _, error in stream.bad_records.state_dict())
    assert stream.bad_records.counts["a"] == 6 and stream.bad_records.counts["b"] <= 3  # each once, in however many epochs
    with pytest.raises(MediaError, match=r"a broken image \[a row \d+ of epoch 0, rank 0 of 1\]|a broken image \[b row"):
        taken(batches(files, refuse_many, **options), 12)
    with pytest.raises(RecordError, match="but at most 1 may be skipped"):
        taken(batches(files, refuse_many, bad_records=BadRecords(1), **options), 12)


@pytest.mark.parametrize("options", [{}, PACKED])
def test_a_stream_of_bad_rows_only_ends(tmp_path, options):
    def refuse_all(example):
        raise MediaError("a broken image")

    pq.write_table(pa.Table.from_pylist([talk("c", 0)]), tmp_path / "c.parquet")
    mixture = StreamedMixture([WeightedStream(stream_source([str(tmp_path / "c.parquet")], name="c"))], seed=0)
    stream = BatchStream(mixture, refuse_all, bad_records=BadRecords(5), **{"batch_size": 4, **options})
    with pytest.raises(RecordError, match="a broken image"):
        next(stream)


def test_a_shard_that_cannot_be_read_is_named_when_it_is_reached(files, tmp_path):
    (tmp_path / "a-0.parquet").write_bytes((files / "a-0.parquet").read_bytes())
    (tmp_path / "a-1.parquet").write_bytes(b"no table")
    source = stream_source([str(tmp_path / "a-0.parquet"), str(tmp_path / "a-1.parquet")], name="a")
    with pytest.raises(RecordError, match=r"a table that cannot be read .* \(a from row \d+ on, rank 0 of 1\)"):
        StreamedMixture([WeightedStream(source)], seed=0).draw(30)


def test_a_state_of_another_rank_or_seed_is_refused(files):
    state = batches(files, world_size=2).state_dict()
    with pytest.raises(CheckpointError, match="rows read by rank 0 of 2 but this is rank 1 of 2"):
        batches(files, rank=1, world_size=2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="a state of seed 0 but this mixture has seed 1"):
        batches(files, seed=1).load_state_dict(batches(files).state_dict())
    with pytest.raises(ConfigError, match="batch_size 3 but 2 processes"):
        batches(files, world_size=2, batch_size=3)


def test_streams_need_names_weights_and_rows(files, tmp_path):
    source = stream_source(str(files), name="both")
    with pytest.raises(ConfigError, match=r"streams \['both', 'both'\]"):
        StreamedMixture([WeightedStream(source), WeightedStream(source)], seed=0)
    with pytest.raises(ConfigError, match="weight 0"):
        StreamedMixture([WeightedStream(source, 0.0)], seed=0)
    with pytest.raises(ConfigError, match="format 'lava'"):
        stream_source(str(files), format="lava")
    pq.write_table(pa.Table.from_pylist([talk("c", 0)]), tmp_path / "c.parquet")
    with pytest.raises(RecordError, match=r"a stream of 0 rows .* \(c, rank 1 of 2\)"):
        StreamedMixture([WeightedStream(stream_source([str(tmp_path / "c.parquet")]))], seed=0, rank=1, world_size=2).draw(1)


def test_pictures_and_captions_in_tars_are_streamed(tmp_path):
    """WebDataset shards, whose fields are named in the recipe."""
    import tarfile

    with tarfile.open(tmp_path / "pairs-000.tar", "w") as tar:
        for number in range(3):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(picture, "PNG")
            for name, data in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", f"caption {number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = stream_source(str(tmp_path), name="pairs", columns={"image": "png", "text": "txt"})
    head = source.head(2)
    assert len(head) == 2 and head.settings.format == "pairs"
    (draw,) = StreamedMixture([WeightedStream(source)], seed=0).draw(1)
    example = source.example(draw.row)
    assert example.kind == "generation" and len(example.messages[-1].images) == 1
