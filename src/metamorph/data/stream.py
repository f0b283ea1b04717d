"""The batches of a training run, step by step: drawn, encoded ahead of time, split over processes, exactly resumable.

One order, whatever reads it: step s consists of draws s x batch_size ... (s + 1) x batch_size - 1 of the mixture, and rank r of w takes
every w-th of them, so the union over ranks is what one process would read. All ranks get the same number of micro-batches, as sharded
models need; where a step does not divide evenly, a rank that comes short repeats an example without targets, which adds exactly 0.

A `StreamedMixture` knows only its own rank's rows: each rank takes batch_size / w of them, and its state is its own.

With `packing`, a batch is stated in rows: rank r packs every w-th draw of the whole order into rows of its own, and a step takes
batch_size / w of them from each rank, however many draws that are. Every document comes once; towards the end of the last epoch a rank
that has run out repeats one without targets until the others have, too. What waits to be packed belongs to the state and is read again on
resume; since each rank packs for itself, a run goes on with as many ranks as it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from metamorph.batch import IGNORE_INDEX, TokenSequence
from metamorph.data.collate import pad
from metamorph.data.mixture import Draw, Mixture, Place
from metamorph.data.packing import Packing, RowPacker
from metamorph.data.prefetching import in_processes, in_thread
from metamorph.data.skipping import BadRecord, BadRecords, RowReader
from metamorph.data.streamed_mixture import StreamedMixture, StreamedPlace, StreamReader
from metamorph.errors import CheckpointError, ConfigError, MetaMorphError, RecordError
from metamorph.messages import Example

Item = TypeVar("Item")
T = TypeVar("T")
_CHUNK, _CHUNKS_AHEAD = 8, 4
"""Draws that a worker process reads at a time, and how many times that for each worker in advance, where rows are packed ahead."""


def without_targets(sequence: TokenSequence) -> TokenSequence:
    """The same positions and images, none of them a target."""
    labels, targets = torch.full_like(sequence.labels, IGNORE_INDEX), torch.zeros_like(sequence.visual_targets)
    return replace(sequence, labels=labels, visual_targets=targets, turns_cut=0)


def alone(own: T) -> list[T]:
    """What every process has to say, where there is only one."""
    return [own]


class BatchStream:
    """An iterator over steps; each is the list of this rank's micro-batches (made by `collate`, with their own `target_counts`).

    Args:
        mixture: the order of the examples; the stream takes it over. Of streams: of this rank.
        encode: an example as what `collate` takes, usually a TokenSequence. Pure: the same example gives the same result.
        batch_size: sequences per step, over all ranks; with `packing`, rows.
        collate: makes a batch of a list of items: `pad`, or `functools.partial(pack, max_length=4096)`; with `packing` of a list of rows,
            each a list of items: `pack_rows`.
        micro_batch_size: sequences (rows) per micro-batch of one rank; None = the rank's whole share at once.
        rank: this process, of `world_size`.
        world_size: number of processes that share the batches.
        workers: processes that encode; 0 = a thread of this one. They are started anew (spawn), so that `encode` and the sources must
            be picklable. A thread is enough unless encoding takes longer than a step.
        prefetch: steps (per worker) to be ahead; 0 without workers = encode when asked.
        group_by_length: sort a rank's share of a step by length, which saves padding; the step's losses stay the same.
        blank: an item without targets, for a rank that comes short.
        packing: fill rows ahead of time, as the module says; None = the draws of a step, as they come.
        bad_records: pass over rows that cannot be used, up to its limit; None = the first one is an error.
        gather: this process's value -> those of all ranks, in order; called once a step if rows are packed or passed over.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        mixture: Mixture | StreamedMixture,
        encode: Callable[[Example], Any],
        *,
        batch_size: int,
        collate: Callable[[Sequence[Any]], Any] = pad,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        group_by_length: bool = False,
        blank: Callable[[Any], Any] = without_targets,
        packing: Packing | None = None,
        bad_records: BadRecords | None = None,
        gather: Callable[[Any], list[Any]] = alone,
    ) -> None:
        self._has_own_state = mixture.is_of_one_rank or packing is not None
        _check_sizes(batch_size, micro_batch_size, rank, world_size, own=self._has_own_state, packed=packing is not None)
        self._mixture, self._batch_size, self._rank, self._world_size = mixture, batch_size, rank, world_size
        self._workers, self._prefetch, self._packing, self._gather = workers, prefetch, packing, gather
        self.bad_records = bad_records
        skip = bad_records.limit if bad_records is not None else None
        reader = StreamReader(mixture.sources, encode, skip) if isinstance(mixture, StreamedMixture) else RowReader(mixture, encode, skip)
        self._steps = _Steps(reader, collate, blank, micro_batch_size, group_by_length)
        self._state: dict[str, Any] = {"step": 0, "mixture": mixture.state_dict()} | ({"waiting": []} if packing is not None else {})
        self._producer: Iterator[_Step | MetaMorphError] | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        """Itself: a stream is read once; `load_state_dict` goes back."""
        return self

    def __next__(self) -> list[Any]:
        """The micro-batches of the next step.

        Raises:
            StopIteration: the last epoch has ended.
            MetaMorphError: an example could not be read or encoded; the message names it. Asking again raises it again.
        """
        if self._producer is None:
            self._mixture.load_state_dict(self._state["mixture"])
            self._producer = self._produce()
        try:
            step = next(self._producer)
            if isinstance(step, MetaMorphError):
                raise step
            self._hear_others(step)
        except StopIteration:
            raise
        except BaseException:  # a broken producer must not look like the end of the data
            self.close()
            raise
        self._state = step.state
        return step.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step that was handed out, whatever has been read ahead; plain JSON values.

        It is the same on all ranks, except with `packing` or of streams: then each knows only its own rows, and all states are needed.
        """
        ranks = {"rank": self._rank, "world_size": self._world_size} if self._has_own_state else {}
        state = {**self._state, **ranks}
        return state if self.bad_records is None else {**state, "bad_records": self.bad_records.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step at which the state was taken, be it with other workers, micro-batches or, where states are shared, ranks.

        Raises:
            CheckpointError: the state belongs to another mixture, or to other rows: of another rank, or not packed ahead.
        """
        self.close()
        if ("waiting" in state) != (self._packing is not None):
            found, expected = ("rows packed ahead", "draws") if self._packing is None else ("draws", "rows packed ahead")
            raise CheckpointError(f"a state of {found} but this stream has {expected} (resuming the data order). Keep data.batch_unit.")
        if self._has_own_state and (state.get("rank"), state.get("world_size")) != (self._rank, self._world_size):
            how = "packed" if self._packing is not None else "read"
            found = f"rows {how} by rank {state.get('rank')} of {state.get('world_size')}"
            raise CheckpointError(
                f"{found} but this is rank {self._rank} of {self._world_size} (resuming the data order). Resume with as many processes."
            )
        self._mixture.load_state_dict(state["mixture"])
        self._state = {name: state[name] for name in self._state}
        if self.bad_records is not None:
            self.bad_records.load_state_dict(state.get("bad_records", []))

    def close(self) -> None:
        """Stop reading ahead; the next step starts it again."""
        producer, self._producer = self._producer, None
        if isinstance(producer, Iterator) and hasattr(producer, "close"):
            producer.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _hear_others(self, step: _Step) -> None:
        """Add up the bad rows of all ranks, so that all stop at the same step; and end when no rank has a row left."""
        if self._packing is None and self.bad_records is None:
            return
        everyone = self._gather((step.is_blank, step.bad))
        if self.bad_records is not None:
            self.bad_records.add(record for _, bad in everyone for record in bad)
        if all(is_blank for is_blank, _ in everyone):
            raise StopIteration

    def _produce(self) -> Iterator[_Step | MetaMorphError]:
        """Holds no reference to the stream, so that a forgotten stream ends its thread or processes."""
        if self._packing is None:
            plans = _plans(self._mixture, self._batch_size, self._rank, self._world_size, self._state["step"])
            if self._workers:
                steps = in_processes(self._steps, plans, self._workers, max(1, self._prefetch))
                return in_thread(steps, 1)  # its tensors are fetched from the worker one by one, which takes milliseconds
            steps = map(self._steps.__getitem__, plans)
        else:
            reads = _reads(self._steps.reader, self._mixture, self._rank, self._world_size, self._state["waiting"], self._workers)
            rows = self._batch_size // self._world_size
            steps = _packed_steps(self._steps, RowPacker(reads, self._packing), rows, self._mixture, self._state)
        return in_thread(steps, self._prefetch) if self._prefetch else steps


def _check_sizes(batch_size: int, micro_batch_size: int | None, rank: int, world_size: int, *, own: bool, packed: bool) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} but 0 to {world_size - 1} is expected (stream of {world_size} processes). Check the launcher.")
    if batch_size < world_size:
        raise ConfigError(f"batch_size {batch_size} but {world_size} processes (stream). Give every process at least 1 row.")
    if own and batch_size % world_size:
        found = f"batch_size {batch_size}{' in packed rows' if packed else ''} but {world_size} processes with rows of their own"
        raise ConfigError(f"{found} need a multiple (stream). Give every process as many rows.")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ConfigError(f"micro_batch_size {micro_batch_size} but at least 1 is needed (stream). Raise it or use None.")


@dataclass(frozen=True)
class _Plan:
    """The draws of one rank in one step, of which the last `blanks` are there for their shape only, and the state after the step."""

    draws: Sequence[Any]
    blanks: int
    state: dict[str, Any]


def _plans(mixture: Mixture | StreamedMixture, batch_size: int, rank: int, world_size: int, step: int) -> Iterator[_Plan]:
    """What a rank reads in each step, from the mixture's present position on."""
    while (share := mixture.share(batch_size, rank, world_size)).draws:
        step += 1
        yield _Plan(share.draws, share.blanks, {"step": step, "mixture": mixture.state_dict()})


@dataclass(frozen=True)
class _Step:
    micro_batches: list[Any]
    state: dict[str, Any]
    bad: tuple[BadRecord, ...] = ()
    is_blank: bool = False  # this rank has nothing left; its micro-batch is there so that others do not wait for it


@dataclass(frozen=True)
class _Steps(Dataset, Generic[Item]):
    """From plans to steps; goes to worker processes as a whole."""

    reader: RowReader[Item] | StreamReader[Item]
    collate: Callable[[Sequence[Any]], Any]
    blank: Callable[[Item], Item]
    micro_batch_size: int | None
    group_by_length: bool

    def __getitem__(self, plan: _Plan) -> _Step | MetaMorphError:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The step, or what is wrong with it: a returned error keeps its type and message on the way between processes."""
        try:
            reads = [self.reader.read(draw) for draw in plan.draws]
            items = [item for item, _ in reads if item is not None]
            bad = tuple(record for _, records in reads for record in records)
            if not items:
                raise RecordError(f"{len(bad)} rows of a step, none of which can be used; the last: {bad[-1].error} Repair the data.")
            real = len(items) - plan.blanks
            items[real:] = [self.blank(item) for item in items[real:]]
            if self.group_by_length:
                items.sort(key=lambda item: -len(item))  # pyright: ignore[reportArgumentType]
            return _Step(self.batches(items), plan.state, bad)
        except MetaMorphError as error:
            return error

    def batches(self, parts: Sequence[Any]) -> list[Any]:
        """Micro-batches of items, or of rows of items."""
        size = self.micro_batch_size or len(parts)
        return [self.collate(parts[start : start + size]) for start in range(0, len(parts), size)]


@dataclass(frozen=True)
class _Read(Generic[Item]):
    """A draw and what it gave, an item or an error; and the place of the order after it."""

    reference: list[Any]  # of the draw
    place: Place | StreamedPlace | None  # None: it waited already when the state was taken
    item: Item | None = None
    bad: tuple[BadRecord, ...] = ()
    error: MetaMorphError | None = None

    def __len__(self) -> int:
        return len(self.item)  # pyright: ignore[reportArgumentType]

    @property
    def id(self) -> str:
        """Of the item, for errors."""
        return getattr(self.item, "id", "")


@dataclass(frozen=True)
class _Reading(Dataset, Generic[Item]):
    """Reads a few draws at a time; goes to worker processes as a whole."""

    reader: RowReader[Item] | StreamReader[Item]

    def __getitem__(self, draws: Sequence[tuple[Any, Any]]) -> list[_Read[Item]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each draw's item, or its error: one bad row does not keep those before it from being packed."""
        return [self._read(draw, place) for draw, place in draws]

    def _read(self, draw: Any, place: Any) -> _Read[Item]:
        try:
            return _Read(draw.reference(), place, *self.reader.read(draw))
        except MetaMorphError as error:
            return _Read(draw.reference(), place, error=error)


def _reads(
    reader: RowReader[Item] | StreamReader[Item],
    mixture: Mixture | StreamedMixture,
    rank: int,
    world_size: int,
    waiting: list[list[Any]],
    workers: int,
) -> Iterator[_Read[Item]]:
    """A rank's draws, read: first those that waited to be packed, then from the mixture's present position on."""
    draws = chain(((draw, None) for draw in mixture.reread(waiting)), _share(mixture, rank, world_size))
    if workers:
        chunks = iter(lambda: list(islice(draws, _CHUNK)), [])
        found = map(_with_own_memory, chain.from_iterable(in_processes(_Reading(reader), chunks, workers, _CHUNKS_AHEAD)))
    else:
        found = (read for one in draws for read in _Reading(reader)[[one]])
    bad: tuple[BadRecord, ...] = ()
    for read in found:
        if read.error is not None:
            raise read.error
        bad += read.bad
        if read.item is not None:  # else it was left out, and the next one tells of it
            yield replace(read, bad=bad)
            bad = ()
        elif len(bad) > (reader.skip or 0):  # a stream of nothing else would be read without end
            found = f"{len(bad)} bad rows one after another, the last: {bad[-1].error}"
            raise RecordError(f"{found} but at most {reader.skip} may be skipped (source {bad[-1].source}). Repair them.")


def _share(mixture: Mixture | StreamedMixture, rank: int, world_size: int) -> Iterator[tuple[Any, Place | StreamedPlace]]:
    """A rank's part of every `world_size` draws, and the place after them."""
    while not (share := mixture.share(world_size, rank, world_size)).blanks:
        if not share.draws:
            return
        yield share.draws[0], mixture.place


def _packed_steps(
    steps: _Steps[Item], packer: RowPacker[_Read[Item]], rows: int, mixture: Mixture | StreamedMixture, state: Mapping[str, Any]
) -> Iterator[_Step]:
    """Steps of so many rows, as long as there are documents; then blank ones without end, for other ranks may have more."""
    number, place, last = state["step"], state["mixture"], None
    packer.waiting += islice(packer.documents, len(state["waiting"]))
    while True:
        before = set(map(id, packer.waiting))
        step = [row for row in (packer.next_row() for _ in range(rows)) if row]
        fresh = [read for read in chain(*step, packer.waiting) if id(read) not in before]
        if not step:
            break
        number, last = number + 1, step[0][0].item
        reached = [read.place for read in fresh if read.place is not None]
        place = mixture.state_dict(max(reached)) if reached else place  # pyright: ignore[reportArgumentType]  # of one kind
        bad = tuple(record for read in fresh for record in read.bad)
        waiting = [read.reference for read in packer.waiting]
        batches = steps.batches([[read.item for read in row] for row in step])
        yield _Step(batches, {"step": number, "mixture": place, "waiting": waiting}, bad)
    template: Any = steps.reader.read(Draw(0, 0))[0] if last is None else last  # pyright: ignore[reportArgumentType]  # streams never end
    blank = _Step([steps.collate([[steps.blank(template)]])], {"step": number, "mixture": place, "waiting": []}, is_blank=True)
    while True:
        number += 1
        yield replace(blank, state={**blank.state, "step": number})


def _with_own_memory(read: _Read[Item]) -> _Read[Item]:
    """A copy out of the memory shared with the worker: each shared tensor holds a file open, and many documents wait."""
    if not isinstance(read.item, TokenSequence):
        return read
    tensors = {name: value.clone() for name, value in vars(read.item).items() if isinstance(value, torch.Tensor)}
    return replace(read, item=replace(read.item, **tensors))
