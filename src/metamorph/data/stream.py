"""The batches of a training run, step by step: drawn, encoded ahead of time, split over processes, exactly resumable.

One order, whatever reads it: step s consists of draws s x batch_size ... (s + 1) x batch_size - 1 of the mixture, and rank r of w takes
every w-th of them, so the union over ranks is what one process would read. All ranks get the same number of micro-batches, as sharded
models need; where a step does not divide evenly, a rank that comes short repeats an example without targets, which adds exactly 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from metamorph.batch import IGNORE_INDEX, TokenSequence
from metamorph.data.collate import pad
from metamorph.data.mixture import Draw, Mixture
from metamorph.errors import ConfigError, MetaMorphError
from metamorph.messages import Example, Message, validate_messages

Item = TypeVar("Item")
T = TypeVar("T")


@runtime_checkable
class EncodesMessages(Protocol):
    """What is needed of a processor."""

    def encode(self, messages: Sequence[Message], *, max_length: int | None, id: str, source: str, weight: float) -> TokenSequence:
        """The conversation as a token sequence, or a ContextLengthError."""
        ...


@dataclass(frozen=True)
class ExampleEncoder:
    """The usual `encode` of a stream: a processor applied to an example, whose weight goes with the sequence."""

    processor: EncodesMessages
    max_length: int | None = None

    def __call__(self, example: Example) -> TokenSequence:
        """Encode.

        Raises:
            RecordError, MediaError: the example is malformed, holds no answer, or an image is broken.
            ContextLengthError: it is longer than `max_length`.
        """
        validate_messages(example.messages, example.place, needs_answer=True)
        return self.processor.encode(
            example.messages, max_length=self.max_length, id=example.id, source=example.source, weight=example.weight
        )


def without_targets(sequence: TokenSequence) -> TokenSequence:
    """The same positions and images, none of them a target."""
    labels, targets = torch.full_like(sequence.labels, IGNORE_INDEX), torch.zeros_like(sequence.visual_targets)
    return replace(sequence, labels=labels, visual_targets=targets)


class BatchStream:
    """An iterator over steps; each is the list of this rank's micro-batches (made by `collate`, with their own `target_counts`).

    Args:
        mixture: the order of the examples; the stream takes it over.
        encode: an example as what `collate` takes, usually a TokenSequence. Pure: the same example gives the same result.
        batch_size: sequences per step, over all ranks.
        collate: makes a batch of a list of items: `pad`, or `functools.partial(pack, max_length=4096)`.
        micro_batch_size: sequences per micro-batch of one rank; None = the rank's whole share at once.
        rank: this process, of `world_size`.
        world_size: number of processes that share the batches.
        workers: processes that encode; 0 = a thread of this one. They are started anew (spawn), so that `encode` and the sources must
            be picklable. A thread is enough unless encoding takes longer than a step.
        prefetch: steps (per worker) to be ahead; 0 without workers = encode when asked.
        group_by_length: sort a rank's share of a step by length, which saves padding; the step's losses stay the same.
        blank: an item without targets, for a rank that comes short.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        mixture: Mixture,
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
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} but 0 to {world_size - 1} is expected (stream of {world_size} processes). Check the launcher.")
        if batch_size < world_size:
            raise ConfigError(f"batch_size {batch_size} but {world_size} processes (stream). Give every process at least 1 sequence.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size {micro_batch_size} but at least 1 is needed (stream). Raise it or use None.")
        self._mixture, self._batch_size, self._rank, self._world_size = mixture, batch_size, rank, world_size
        self._workers, self._prefetch = workers, prefetch
        self._steps = _Steps(mixture, encode, collate, blank, micro_batch_size, group_by_length)
        self._state = {"step": 0, "mixture": mixture.state_dict()}
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
        except StopIteration:
            raise
        except BaseException:  # a broken producer must not look like the end of the data
            self.close()
            raise
        self._state = step.state
        return step.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step that was handed out, whatever has been read ahead; plain JSON values, the same on all ranks."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step at which the state was taken, be it with other ranks, workers or micro-batches.

        Raises:
            CheckpointError: the state belongs to another mixture.
        """
        self.close()
        self._mixture.load_state_dict(state["mixture"])
        self._state = dict(state)

    def close(self) -> None:
        """Stop reading ahead; the next step starts it again."""
        producer, self._producer = self._producer, None
        if isinstance(producer, Iterator) and hasattr(producer, "close"):
            producer.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _produce(self) -> Iterator[_Step | MetaMorphError]:
        """Holds no reference to the stream, so that a forgotten stream ends its thread or processes."""
        plans = _plans(self._mixture, self._batch_size, self._rank, self._world_size, self._state["step"])
        if self._workers:
            return _in_processes(self._steps, plans, self._workers, max(1, self._prefetch))
        steps = map(self._steps.__getitem__, plans)
        return _in_thread(steps, self._prefetch) if self._prefetch else steps


@dataclass(frozen=True)
class _Plan:
    """The draws of one rank in one step, of which the last `blanks` are there for their shape only, and the state after the step."""

    draws: list[Draw]
    blanks: int
    state: dict[str, Any]


def _plans(mixture: Mixture, batch_size: int, rank: int, world_size: int, step: int) -> Iterator[_Plan]:
    """What a rank reads in each step, from the mixture's present position on."""
    while draws := mixture.draw(batch_size):
        step += 1
        share = draws[rank::world_size]
        missing = -(-len(draws) // world_size) - len(share)  # ranks at the end of the line come short by at most one
        yield _Plan(share + draws[:missing], missing, {"step": step, "mixture": mixture.state_dict()})


@dataclass(frozen=True)
class _Step:
    micro_batches: list[Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class _Steps(Dataset, Generic[Item]):
    """From plans to steps; goes to worker processes as a whole."""

    mixture: Mixture
    encode: Callable[[Example], Item]
    collate: Callable[[Sequence[Item]], Any]
    blank: Callable[[Item], Item]
    micro_batch_size: int | None
    group_by_length: bool

    def __getitem__(self, plan: _Plan) -> _Step | MetaMorphError:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The step, or what is wrong with it: a returned error keeps its type and message on the way between processes."""
        try:
            items = [self._item(draw) for draw in plan.draws]
            real = len(items) - plan.blanks
            items[real:] = [self.blank(item) for item in items[real:]]
            if self.group_by_length:
                items.sort(key=lambda item: -len(item))  # pyright: ignore[reportArgumentType]
            size = self.micro_batch_size or len(items)
            return _Step([self.collate(items[start : start + size]) for start in range(0, len(items), size)], plan.state)
        except MetaMorphError as error:
            return error

    def _item(self, draw: Draw) -> Item:
        example = self.mixture.example(draw)
        try:
            return self.encode(example)
        except MetaMorphError as error:
            if example.place in str(error):
                raise
            raise type(error)(f"{error} [{example.place}]") from error


def _in_thread(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items in the same order, computed by a thread that is up to `ahead` items in front."""
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="metamorph-prefetch")
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(ahead))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item  # pyright: ignore[reportReturnType]
    finally:
        pool.shutdown(cancel_futures=True)


def _in_processes(steps: _Steps, plans: Iterator[_Plan], workers: int, ahead: int) -> Iterator[Any]:
    """The same steps in the same order, computed by processes."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=plans,  # pyright: ignore[reportArgumentType]  # any iterable will do
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_as_it_is,
        multiprocessing_context="spawn",  # forking a process that runs threads can hang
        generator=torch.Generator().manual_seed(0),  # else it would draw from, and change, the global one
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        del iterator  # ends the processes


def _as_it_is(step: T) -> T:
    return step
