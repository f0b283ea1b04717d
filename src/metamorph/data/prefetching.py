"""Work done ahead of time, in order: by a thread of this process, or by processes of their own."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from metamorph.errors import TrainingError

T = TypeVar("T")


def in_thread(items: Iterator[T], ahead: int) -> Iterator[T]:
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
        if isinstance(items, Generator):
            items.close()  # what it holds, such as processes, ends with it and not when it is forgotten


def in_processes(steps: Dataset, plans: Iterator[Any], workers: int, ahead: int) -> Iterator[Any]:
    """What `steps[plan]` is for each plan, in the same order, computed by processes.

    Raises:
        TrainingError: one of them was ended from outside.
    """
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
    others = multiprocessing.active_children()
    iterator = iter(loader)
    own = [process for process in multiprocessing.active_children() if process not in others]
    try:
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:  # as which the end of a worker shows, where its answer was read or waited for
        ending = wait([process.sentinel for process in own], timeout=1)  # its end may be seen here before it is complete
        for process in own:
            process.join(1 if process.sentinel in ending else 0)
        codes = [process.exitcode for process in own if process.exitcode]
        if not codes:
            raise
        found = f"a worker process that ended (exit code {codes[0]}) but all {workers} are needed (reading data)"
        raise TrainingError(f"{found}. Out of memory? Lower data.workers; with --resume the run goes on where it was saved.") from error
    finally:
        del iterator  # ends the processes


def _as_it_is(step: T) -> T:
    return step
