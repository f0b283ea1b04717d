"""Where metrics go: a JSONL file in the run directory, and the terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Row = Mapping[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """Receives one row of metrics per logged step, and one per evaluation (which has the key `evaluation`)."""

    def log(self, row: Row) -> None:
        """Take a row."""
        ...

    def close(self) -> None:
        """The run ended, well or not."""
        ...


class MetricsFile:
    """One JSON object per line. On resume, what was logged after the checkpoint is cut off, a half-written last line too."""

    def __init__(self, path: Path, *, stage: str, step: int) -> None:
        """Open for appending after `step` of `stage`; -1: before the stage began."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for row in read_metrics(path):
            if row.get("stage") == stage and row.get("step", 0) > step:
                break  # rows are in the order of time: later stages lie behind
            kept.append(row)
        beside = path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(beside, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        """Append one line, readable at once."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, oldest first; a half-written last line is left out. Empty when there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TerminalTracker:
    """A progress bar on a terminal; elsewhere a plain line per row, at most one every `seconds`."""

    def __init__(self, stage: str, steps: int, *, console: Console | None = None, seconds: float = 5.0) -> None:
        self._console = console or Console(stderr=True)
        self._stage, self._steps, self._seconds = stage, steps, seconds
        self._last_line = -float("inf")
        self._progress: Progress | None = None
        if self._console.is_terminal:
            text = TextColumn("{task.fields[text]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
            progress = Progress(*columns, console=self._console)
            self._task = progress.add_task(stage, total=steps, text="")
            progress.start()
            self._progress = progress

    def log(self, row: Row) -> None:
        """Show a row."""
        if "evaluation" in row:
            self._console.print(f"{self._stage} step {row['step']}: {_numbers(row)}", highlight=False, markup=False)
        elif self._progress is not None:
            self._progress.update(self._task, completed=row["step"], text=_summary(row))
        elif row["step"] == self._steps or time.monotonic() - self._last_line >= self._seconds:
            self._last_line = time.monotonic()
            line = f"{self._stage} {row['step']}/{self._steps} {_summary(row)}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


class SilentTracker:
    """Shows nothing."""

    def log(self, row: Row) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _summary(row: Row) -> str:
    losses = [f"{key.removesuffix('_loss')} {value:.4f}" for key, value in row.items() if key.endswith("loss") and value is not None]
    return f"{' '.join(losses)} lr {row['learning_rate']:.2e} grad {row['grad_norm']:.2f} {row['tokens_per_second']:,.0f} tokens/s"


def _numbers(row: Row) -> str:
    shown = {key: value for key, value in row.items() if key not in ("step", "stage") and not isinstance(value, dict | list)}
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items())
