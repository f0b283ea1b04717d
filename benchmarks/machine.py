"""What every benchmark shares: the machine it ran on, timing, and the file it leaves."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"


class Seconds(NamedTuple):
    """How long something took on the wall clock, and how much processor time this process had meanwhile."""

    wall: float
    cpu: float


def timed(function: Callable[[], Any]) -> tuple[Seconds, Any]:
    """The seconds that a call took, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def median(times: Sequence[Seconds]) -> Seconds:
    """Medians of both clocks."""
    return Seconds(*(statistics.median(side) for side in zip(*times, strict=True)))


def side_by_side(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Seconds], dict[str, Any]]:
    """Median seconds and last results of several calls that take turns, so that what else the machine does meets all of them."""
    times: dict[str, list[Seconds]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in sides.items():
            seconds, results[name] = timed(function)
            times[name].append(seconds)
    return {name: median(found) for name, found in times.items()}, results


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless: only to see that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="figures are medians of so many")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the file to write")
    return parser


def machine() -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[1], 2),  # processes that wanted a core, on average of the last 5 minutes
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def write(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write a result: the command, the machine, what was measured and how."""
    script = Path(sys.argv[0])
    command = " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), **settings, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))


def rounded(value: float, digits: int = 3) -> float:
    """A figure with as many significant digits as it deserves."""
    return float(f"{value:.{digits}g}")
