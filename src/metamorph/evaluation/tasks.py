"""What an evaluation task is: a function from a subject (what is evaluated) and a number of samples to metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from metamorph.evaluation.metrics import Metrics

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Task(Generic[Subject]):
    """A named measurement. `run(subject, samples, seed)` returns metrics whose names no other task uses."""

    name: str
    run: Callable[[Subject, int, int], Metrics]
    samples: int
