"""How much of a training step the demo spends waiting for data.

    python benchmarks/data_wait.py                     # trains the demo's two stages for a while, every step logged
    python benchmarks/data_wait.py --run runs/demo     # reads the log of a run instead

Batches are made ahead by a thread, so a step waits only if making them takes longer than training on them; the first of a stage always
waits. A run logs its first step and then every tenth or so: each logged step stands for itself and the ones before it that were not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from machine import arguments, rounded, write

GOAL = 0.02
STEPS = {"projector": 100, "vpit": 200}


def shares(metrics: Path, first: int = 0) -> list[dict]:
    """One row per stage: seconds waited of seconds trained; the first so many logged steps are left out of the share."""
    logged = [row for row in map(json.loads, metrics.read_text().splitlines()) if "data_wait_seconds" in row]
    rows = []
    for stage in dict.fromkeys(row["stage"] for row in logged):
        ours = [row for row in logged if row["stage"] == stage]
        weights = [row["step"] - before for row, before in zip(ours, [0, *(row["step"] for row in ours)], strict=False)]
        waited, trained = (
            sum(weight * row[name] for weight, row in list(zip(weights, ours, strict=True))[first:])
            for name in ("data_wait_seconds", "seconds")
        )
        rows.append(
            {
                "stage": stage,
                "goal": GOAL,
                "steps": ours[-1]["step"],
                "logged": len(ours),
                "share_waited": rounded(waited / trained),
                "first_wait_seconds": rounded(ours[0]["data_wait_seconds"]),
                "seconds_per_step": rounded(trained / sum(weights[first:])),
            }
        )
    return rows


def train(steps: dict[str, int], directory: Path) -> Path:
    """Train the demo's stages for some steps; the log."""
    from metamorph.recipes.microworld import microworld_demo
    from metamorph.training.run import run

    recipe = microworld_demo()
    changes = {f"stages.{number}.training.steps": steps[stage.name] for number, stage in enumerate(recipe.stages)}
    changes |= {f"stages.{number}.training.log_every": 1 for number in range(len(recipe.stages))}
    run(recipe.with_overrides({"output_dir": str(directory), **changes}))
    return directory / "metrics.jsonl"


def main() -> None:
    parser = arguments(__doc__, "data_wait")
    parser.add_argument("--run", type=Path, help="a run directory to read")
    given = parser.parse_args()
    steps = dict.fromkeys(STEPS, 2) if given.quick else STEPS
    with tempfile.TemporaryDirectory() as directory:
        metrics = given.run / "metrics.jsonl" if given.run else train(steps, Path(directory) / "run")
        rows = shares(metrics)
    write(given.out, rows)


if __name__ == "__main__":
    main()
