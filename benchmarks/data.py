"""Microworld examples per second on two cores: drawn only, and encoded as training sequences.

    python benchmarks/data.py

An example is `MicroworldSource[i]`: the row is made up, its pictures are drawn, messages hold both. A sequence is what a training stream
makes of it: checked, pictures brought to the encoder's size and scale, text through the chat template and the tokenizer. Two processes
work at different indices; each counts what it does in the same span of time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from machine import arguments, rounded, write

GOAL = 3000.0
WARM = 50
BEGIN: list[Any] = []  # in a worker: the barrier at which all processes begin a span together


def drawn() -> Callable[[int], Any]:
    """Example i."""
    from metamorph.microworld.examples import MicroworldSource

    return MicroworldSource(size=10_000_000).__getitem__


def encoded() -> Callable[[int], Any]:
    """Example i as a token sequence of the shipped model."""
    import torch

    from metamorph.data.example_encoder import ExampleEncoder
    from metamorph.microworld.components import shipped
    from metamorph.model.processing import MetaMorphProcessor

    torch.set_num_threads(1)
    draw = drawn()
    encode = ExampleEncoder(MetaMorphProcessor.from_pretrained(shipped("metamorph")), max_length=512)
    return lambda index: encode(draw(index))


def take(barrier: Any) -> None:
    """Keep the barrier in a new process."""
    BEGIN.append(barrier)


def count(make: Callable[[], Callable[[int], Any]], worker: int, workers: int, spans: list[float]) -> list[tuple[float, float]]:
    """One process: how many examples it made in each span, per second and per second of processor time."""
    begin = BEGIN[0]
    try:
        function, index = make(), worker
        for _ in range(WARM):
            function(index)
            index += workers
    except BaseException:
        begin.abort()  # the others need not wait
        raise
    found = []
    for span in spans:
        begin.wait()
        done, cpu, until = 0, time.process_time(), time.perf_counter() + span
        while time.perf_counter() < until:
            function(index)
            index, done = index + workers, done + 1
        found.append((done / span, done / (time.process_time() - cpu)))
    return found


def rate(make: Callable[[], Callable[[int], Any]], workers: int, seconds: float, repeats: int) -> tuple[float, float]:
    """Examples per second of all processes together, medians: on the wall clock, and for each second of processor time they got."""
    context = multiprocessing.get_context("spawn")
    spans = [seconds] * repeats
    with ProcessPoolExecutor(workers, context, take, (context.Barrier(workers),)) as pool:
        counting = [pool.submit(count, make, worker, workers, spans) for worker in range(workers)]
        found = [future.result() for future in counting]
    wall, cpu = (statistics.median(sum(span[side] for span in spans) for spans in zip(*found, strict=True)) for side in (0, 1))
    return wall, cpu


def main() -> None:
    given = arguments(__doc__, "data").parse_args()
    seconds, repeats = (0.2, 1) if given.quick else (4.0, given.repeats)
    makers, rows = {"examples": drawn, "encoded sequences": encoded}, []
    for name, workers in itertools.product(makers, (1, 2)) if not given.quick else (("examples", 2), ("encoded sequences", 1)):
        wall, cpu = rate(makers[name], workers, seconds, repeats)
        row = {"what": name, "processes": workers, "per_second": rounded(wall), "per_second_of_processor_time": rounded(cpu)}
        rows.append(row | ({"goal": GOAL} if (name, workers) == ("examples", 2) else {}))
    write(given.out, rows, seconds=seconds, repeats=repeats)


if __name__ == "__main__":
    main()
