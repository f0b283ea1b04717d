"""Run tasks one after the other, with progress, and keep what they measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metamorph.errors import ConfigError
from metamorph.evaluation.metrics import Metric
from metamorph.evaluation.tasks import Subject, Task


@dataclass(frozen=True)
class Results:
    """Metrics by name, the seconds that each task took, and what the figures rest on."""

    metrics: Mapping[str, Metric]
    seconds: Mapping[str, float]
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        metrics = {name: metric.to_dict() for name, metric in self.metrics.items()}
        return {"metrics": metrics, "seconds": dict(self.seconds), "protocol": dict(self.protocol)}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def evaluate(
    tasks: Sequence[Task[Subject]],
    subject: Subject,
    *,
    seed: int = 0,
    samples: Mapping[str, int] | None = None,
    told: Callable[[str], None] | None = None,
) -> Results:
    """Run every task on the subject.

    Args:
        tasks: what to measure.
        subject: what is measured.
        seed: of the samples; the same seed asks the same questions.
        samples: numbers of samples by task, where a task's own is not wanted.
        told: is given a line when a task ends.

    Raises:
        ConfigError: two tasks report a metric of the same name.
    """
    metrics: dict[str, Metric] = {}
    seconds: dict[str, float] = {}
    for task in tasks:
        began = time.perf_counter()
        found = task.run(subject, (samples or {}).get(task.name, task.samples), seed)
        seconds[task.name] = time.perf_counter() - began
        twice = sorted(set(found) & set(metrics))
        if twice:
            raise ConfigError(f"metric {twice[0]!r} from {task.name} but another task reports it too. Rename one of them.")
        metrics.update(found)
        if told is not None:
            told(f"{task.name}: {seconds[task.name]:.1f} s")
    return Results(metrics, seconds, {"seed": seed, "samples": {task.name: (samples or {}).get(task.name, task.samples) for task in tasks}})
