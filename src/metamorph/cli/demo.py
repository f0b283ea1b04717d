"""`metamorph demo`: morph the small language model, measure it, show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metamorph.cli.terminal import quiet_libraries, show_table


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("demo")(run)


def run(
    output_dir: Annotated[Path, typer.Option(help="Run directory; an interrupted demo in it goes on where it stopped.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data, training and samples.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier demo left there, and begin anew.")] = False,
) -> None:
    """Train a model that answers questions about pictures and draws them, from the shipped parts; write report.html and report.json."""
    from rich.console import Console

    quiet_libraries()
    from metamorph.microworld.components import shipped
    from metamorph.microworld.demo import Demo, clear, run_demo
    from metamorph.microworld.report import summary_table, verdict
    from metamorph.recipes.microworld import microworld_demo

    console = Console(stderr=True)
    for part in ("llm", "encoder"):
        shipped(part)
    decoder = shipped("decoder")
    recipe = microworld_demo()
    seeds = {f"stages.{number}.training.seed": seed for number in range(len(recipe.stages))}
    config = recipe.with_overrides({"output_dir": str(output_dir), "data.sources.0.kwargs.seed": seed, **seeds})
    if fresh:
        clear(output_dir)
    try:
        outcome = run_demo(Demo(config, decoder, seed), told=lambda line: console.print(line, highlight=False, markup=False))
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    shown = Console()
    show_table(summary_table(outcome.report, "demo"))
    shown.print(verdict(outcome.report), markup=False)
    shown.print(f"\nWhat to try next:\n{outcome.next_steps}\n", markup=False, highlight=False)
    shown.print(f"The report: {outcome.page} (open it in a browser) and {outcome.json}", markup=False, highlight=False, soft_wrap=True)
