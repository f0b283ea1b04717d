"""Rows in a stream, through Hugging Face `datasets`: for what is too large to be downloaded, read from the hub or from local shards.

What it can do: give every row once per epoch, shuffled by a seed, shared out over ranks and worker processes, and go on exactly where a
saved state was taken. What it cannot: say how many rows there are, or give one by its number. So it is no source of a `Mixture`; recipes
train from it by `streamed_mixture.py`, for a stated number of steps; a check sees the first rows only; and a state belongs to the rank that
saved it, of as many ranks. Where the disk is large enough, `open_rows` has none of these limits.

Shuffling is by blocks: shards in an order of the seed, and within each run of `block` rows a permutation. `datasets` itself shuffles
through a buffer whose rows are lost when it resumes; a block is read again from its beginning, and nothing is lost. To get there, the
library passes over what lies before it in its shard: resuming costs up to one shard of each stream.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from metamorph.data.parquet import errors_named, load_table, parse_reference
from metamorph.data.rows import RawRow
from metamorph.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import datasets


class StreamedRows:
    """One rank's share of a stream of rows; a DataLoader over `dataset()` shares it out further, over its workers.

    Where the shards (files) divide evenly by the ranks, each rank reads its own; else all ranks read all, and each keeps every w-th row.
    Workers take shards of their rank, so more workers than shards have nothing to do.

    Args:
        stream: what `datasets` streams.
        name: how errors call it.
        seed: of the order; None leaves rows as they lie.
        block: rows that are shuffled among themselves, and held in memory.
        rank: this process, of `world_size`.
        world_size: number of processes that share the stream.

    Raises:
        ConfigError: numbers that do not fit each other.
    """

    def __init__(
        self, stream: datasets.IterableDataset, name: str, *, seed: int | None, block: int = 1000, rank: int = 0, world_size: int = 1
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} but 0 to {world_size - 1} is expected ({name}). Check the launcher.")
        if block < 1:
            raise ConfigError(f"blocks of {block} rows but at least 1 is needed ({name}). Raise it; 1 does not shuffle.")
        self.name, self.seed, self._block, self._rank, self._world_size = name, seed, block, rank, world_size
        self.num_shards = stream.num_shards
        if seed is not None and stream.num_shards > 1:
            # The order of the shards only: a buffer of 1 loses nothing, and shards one after the other need no thread for each.
            stream = stream.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        self._stream = split_dataset_by_node(stream.with_format("arrow"), rank=rank, world_size=world_size)
        self._state: dict[str, Any] = {"epoch": 0, "block": 0, "taken": 0, "stream": None}

    def __iter__(self) -> Iterator[RawRow]:
        """The rows of the present epoch that are left; the next call begins the next epoch.

        Raises:
            RecordError: a shard is broken, or has other columns than the first.
            HubError: the hub does not answer.
        """
        worker = get_worker_info()
        self._stream.set_epoch(self._state["epoch"])
        if self._state["stream"] is None:
            self._state["stream"] = _plain(self._stream.state_dict())
        self._stream.load_state_dict(self._state["stream"])
        rows, number = iter(self._stream), self._state["block"] * self._block
        while block := _read(rows, self._block, f"{self.name} from row {number} on, {self._share(worker)}"):
            following = _plain(self._stream.state_dict())
            order = self._order(len(block), 0 if worker is None else worker.id)
            for taken in range(self._state["taken"], len(block)):
                self._state["taken"] = taken + 1
                place = f"{self.name} row {number + order[taken]} of epoch {self._state['epoch']}, {self._share(worker)}"
                yield RawRow(block[order[taken]], place)
            number += len(block)
            self._state.update(block=self._state["block"] + 1, taken=0, stream=following)
        self._state = {"epoch": self._state["epoch"] + 1, "block": 0, "taken": 0, "stream": None}

    def dataset(self) -> Dataset[RawRow]:
        """The stream as `torch.utils.data.DataLoader` wants it (`batch_size=None` gives single rows)."""
        return _Streamed(self)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands, as plain JSON values; of a stream that is read by this process itself, not by a DataLoader's workers."""
        return {**self._state, "seed": self.seed, "rows_per_block": self._block, "rank": self._rank, "world_size": self._world_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the row at which a state was taken.

        Raises:
            CheckpointError: it belongs to another seed, block size, rank or number of ranks.
        """
        for name, ours in (("seed", self.seed), ("rows_per_block", self._block), ("rank", self._rank), ("world_size", self._world_size)):
            if state.get(name) != ours:
                found = f"a state of {name} {state.get(name)} but this stream has {ours}"
                raise CheckpointError(f"{found} ({self.name}). Resume with the same settings, or begin anew.")
        self._state = {name: state[name] for name in self._state}

    def _order(self, length: int, worker: int) -> list[int]:
        if self.seed is None:
            return list(range(length))
        key = (self.seed, self._state["epoch"], self._state["block"], self._rank, worker)
        return np.random.default_rng(key).permutation(length).tolist()

    def _share(self, worker: Any) -> str:
        rank = f"rank {self._rank} of {self._world_size}"
        return rank if worker is None else f"{rank}, worker {worker.id}"


class _Streamed(IterableDataset):
    def __init__(self, rows: StreamedRows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[RawRow]:
        return iter(self._rows)


def stream_rows(
    path: str | Sequence[str | Path],
    *,
    seed: int | None,
    block: int = 1000,
    rank: int = 0,
    world_size: int = 1,
    name: str = "",
    split: str = "train",
    config: str | None = None,
) -> StreamedRows:
    """A data set as a stream of rows, without a download or a cache.

    Args:
        path: `hf://datasets/OWNER/NAME[@REVISION][:CONFIG][/SPLIT]`, a local folder laid out as a data set of the hub, or a list of
            Parquet files.
        seed: of the order; None leaves rows as they lie.
        block: rows that are shuffled among themselves.
        rank: this process, of `world_size`.
        world_size: number of processes that share the stream.
        name: how errors call it; default: from the path.
        split: which part, where the reference does not say.
        config: which configuration, where the reference does not say.

    Raises:
        ConfigError: numbers that do not fit each other.
        RecordError: it cannot be read as a table.
        HubError: the hub does not answer.
    """
    if isinstance(path, str):
        source = parse_reference(path, split, config)
        options = {"name": source.config, "split": source.split, "revision": source.revision}
        stream = load_table(source.name, path, streaming=True, **options)
    else:
        files = [glob.escape(str(file)) for file in path]
        stream = load_table("parquet", files[0], streaming=True, data_files=files, split="train")
    default = path if isinstance(path, str) else Path(path[0]).stem
    return StreamedRows(stream, name or default, seed=seed, block=block, rank=rank, world_size=world_size)


def _read(rows: Iterator[Any], number: int, place: str) -> list[dict[str, Any]]:
    """The next rows of a stream of tables of one row each."""
    logger = logging.getLogger("datasets.iterable_dataset")
    logger.addFilter(_is_true)
    try:
        with errors_named(place):
            return [table.to_pylist()[0] for table in islice(rows, number)]
    finally:
        logger.removeFilter(_is_true)


def _is_true(record: logging.LogRecord) -> bool:
    """Not a warning that a shuffle buffer loses rows on resuming: ours holds one, and is empty whenever a state is taken."""
    return "shuffle buffer" not in record.getMessage()


def _plain(state: Any) -> Any:
    """A copy of the library's state that does not change as it reads on."""
    if isinstance(state, Mapping):
        return {name: _plain(value) for name, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, list | tuple) else state
