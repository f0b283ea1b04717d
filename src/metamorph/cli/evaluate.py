"""`metamorph evaluate`: the table of results of a microworld model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metamorph.cli.options import Device
from metamorph.cli.terminal import quiet_libraries, show_table
from metamorph.places import check_target


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("evaluate")(run)


def run(
    model: Annotated[Path | None, typer.Option(help="Directory of a model; by default the shipped one.")] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="Directory of a decoder; by default the model's own `decoder`, or the shipped one.")
    ] = None,
    llm: Annotated[Path | None, typer.Option(help="The language model before it learnt to see; by default the shipped one.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Samples of every task; by default at least 500.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the results as JSON.")] = Path("runs/evaluation.json"),
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Device = None,
) -> None:
    """Measure a model on the microworld's tasks: print the table, write metrics with intervals, protocol, versions and hashes."""
    from rich.console import Console

    check_target(output, "--output")
    quiet_libraries()
    from metamorph.microworld.components import shipped
    from metamorph.microworld.measuring import Measured, measure
    from metamorph.microworld.report import summary_table, verdict
    from metamorph.model.card import CARD, add_results

    own = model / "decoder" if model is not None else None
    chosen = Measured(
        model=model or shipped("metamorph"),
        decoder=decoder or (own if own is not None and own.is_dir() else shipped("decoder")),
        llm=llm or shipped("llm"),
    )
    console = Console(stderr=True)
    report = measure(
        chosen,
        samples=samples,
        seed=seed,
        device=device,
        output=output,
        told=lambda line: console.print(line, highlight=False, markup=False),
    )
    if model is not None and add_results(model / CARD, report):
        console.print(f"The results are also on the model's card, {model / CARD}.", highlight=False, markup=False, soft_wrap=True)
    shown = Console()
    show_table(summary_table(report, "shipped"))
    shown.print(verdict(report), markup=False)
    shown.print(f"Written: {output}", markup=False, highlight=False, soft_wrap=True)
