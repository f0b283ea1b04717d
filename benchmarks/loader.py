"""How much of a training step is spent waiting for rows and pictures in files, read by two worker processes.

    python benchmarks/loader.py

The microworld's rows are exported as JSON lines with PNG files beside them. The shipped language model trains on them as in the demo's
second stage (batches of 16, packed), one thread, while two processes open, check, encode and collate. Every step is logged. The first step
waits until the processes have started and imported their libraries, once in a run; that time stands apart and is not in the share.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from data_wait import shares
from machine import arguments, write

WORKERS = 2
ROWS, STEPS = 4000, 200


def train(rows: int, steps: int, directory: Path) -> Path:
    """Export rows, train on the files; the log."""
    from metamorph import RunConfig
    from metamorph.microworld.export import export, rows_to_export
    from metamorph.recipes.microworld import microworld_demo
    from metamorph.training.run import run

    export(rows_to_export(rows), "messages", directory / "rows")
    (path,) = sorted((directory / "rows").glob("*.jsonl"))
    recipe = microworld_demo().to_dict()
    source = {"source": "metamorph.data.source.open_source", "kwargs": {"path": str(path)}}
    recipe["data"] |= {"sources": [source], "workers": WORKERS}
    recipe["stages"] = [stage | {"data": None} for stage in recipe["stages"] if stage["name"] == "vpit"]
    recipe["stages"][0]["training"] |= {"steps": steps, "log_every": 1}
    recipe["output_dir"] = str(directory / "run")
    run(RunConfig(**recipe))
    return directory / "run" / "metrics.jsonl"


def main() -> None:
    given = arguments(__doc__, "loader").parse_args()
    rows, steps = (20, 2) if given.quick else (ROWS, STEPS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        found = shares(train(rows, steps, Path(directory)), first=1)
    write(given.out, found, workers=WORKERS, rows_of_data=rows)


if __name__ == "__main__":
    main()
