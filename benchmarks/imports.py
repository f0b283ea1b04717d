"""How long a fresh process takes to import metamorph, and to show the command line's help.

    python benchmarks/imports.py

Medians over cold processes (files are in the system's cache). The bare interpreter's own start is measured beside them, and taken off
where the row says so.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from machine import arguments, rounded, side_by_side, write

GOALS = {"import metamorph": 0.3, "metamorph --help": 1.0}


def start(*command: str) -> str:
    """Run a command to its end; what it said."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    given = arguments(__doc__, "imports").parse_args()
    python = partial(start, sys.executable, "-c")
    sides = {
        "python": partial(python, "pass"),
        "import metamorph": partial(python, "import metamorph"),
        "metamorph --help": partial(start, str(Path(sys.executable).with_name("metamorph")), "--help"),
    }
    said = {what: run() for what, run in sides.items()}  # files come into the cache
    assert "Usage: metamorph" in said["metamorph --help"], "the installed command must show its help"
    times, _ = side_by_side(sides, 1 if given.quick else given.repeats)
    bare = times["python"].wall
    rows = [{"what": "python", "seconds": rounded(bare)}]
    for what, goal in GOALS.items():
        seconds = times[what].wall
        rows.append({"what": what, "goal": goal, "seconds": rounded(seconds), "seconds_without_python": rounded(seconds - bare)})
    write(given.out, rows, repeats=1 if given.quick else given.repeats)


if __name__ == "__main__":
    main()
