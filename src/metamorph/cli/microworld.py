"""`metamorph microworld`: build the tiny world's pretrained parts, look at its data, store what is expected of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from metamorph.errors import ConfigError
from metamorph.places import check_target

if TYPE_CHECKING:
    from metamorph.messages import Example


def register(app: typer.Typer) -> None:
    """Add the group of commands to the app."""
    group = typer.Typer(help="The microworld: build its pretrained parts, look at its data.", no_args_is_help=True, rich_markup_mode=None)
    group.command("build")(build)
    group.command("show")(show)
    group.command("export")(export)
    group.command("band")(band)
    group.command("ship")(ship)
    app.add_typer(group, name="microworld")


def build(
    out: Annotated[Path, typer.Option(help="Where the parts go; a part that is already there is kept.")] = Path("runs/microworld/parts"),
    size: Annotated[str, typer.Option(help="Of the language model: tiny, small or base; small ships.")] = "small",
    scale: Annotated[float, typer.Option(min=0.0, help="Multiplies the steps of every part.")] = 1.0,
    only: Annotated[str | None, typer.Option(help="Some parts, with commas: llm,encoder,base,decoder.")] = None,
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Keep parts that miss their gates: for trials only.")] = False,
    seed: Annotated[int, typer.Option(help="Of data and weights.")] = 0,
) -> None:
    """Pretrain language model, encoder, diffusion base and decoder from nothing; interrupted, it goes on where it stopped."""
    from metamorph.microworld.cards import CARD, read_card
    from metamorph.microworld.components import PARTS, Build
    from metamorph.microworld.components import build as build_parts
    from metamorph.microworld.language import SIZES, LanguageSize
    from metamorph.training.config import unknown_name

    check_target(out, "--out", directory=True)
    if size not in SIZES:
        raise ConfigError(f"{unknown_name(size, list(SIZES), 'size')} (--size)")
    parts = tuple(name.strip() for name in only.split(",")) if only else PARTS
    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"{unknown_name(name, list(PARTS), 'part')} (--only)")
    build_parts(Build(out, out / "training", cast(LanguageSize, size), scale, seed, gates=not no_gates), parts)
    for name in PARTS:
        if (out / name / CARD).is_file():
            card = read_card(out / name)
            scores = ", ".join(f"{key} {value:.3f}" for key, value in card.scores.items()) or "no scores"
            typer.echo(f"{out / name}: {card.what}; {scores}")


def show(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("runs/microworld/data.html"),
    rows: Annotated[int, typer.Option(min=1, max=200, help="Conversations of each kind.")] = 6,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which scenes.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
) -> None:
    """Write a page with sample rows of all kinds of data and their truth."""
    from metamorph.microworld.report_rows import data_page
    from metamorph.reporting.page import write

    check_target(out, "--out")
    typer.echo(f"{write(data_page(rows, seed, split), out)}: open it in a browser.")


def export(
    out: Annotated[Path, typer.Option(help="The directory to write; it may exist if it is empty.")],
    format: Annotated[Literal["llava", "messages", "parquet", "webdataset"], typer.Option(help="How the rows are written.")] = "messages",
    rows: Annotated[int, typer.Option(min=1, help="Conversations.")] = 1000,
    kinds: Annotated[str | None, typer.Option(help="Some kinds, with commas: generation,edit. Default: all, as in training.")] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which scenes.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
) -> None:
    """Write conversations and their pictures as files, in a format in which data sets are published: sample data to try things on."""
    from rich.console import Console
    from rich.progress import track

    from metamorph.microworld.export import export as export_rows
    from metamorph.microworld.export import rows_to_export

    check_target(out, "--out", directory=True)
    console = Console(stderr=True)

    def follow(examples: Iterable[Example]) -> Iterable[Example]:
        return track(examples, "rows", total=rows, console=console, transient=True, disable=not console.is_terminal)

    made = export_rows(rows_to_export(rows, kinds, split, seed), format, out, name=split, follow=follow)
    named = str(made.files[0]) + (f" to {made.files[-1].name}" if len(made.files) > 1 else "")
    typer.echo(f"{named}: {made.rows} rows as {format}, {made.bytes / 1e6:.1f} MB with images.")


def band(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs of one recipe with different seeds.")],
    out: Annotated[Path, typer.Option(help="Where to store the band.")] = Path("runs/microworld/band.json"),
) -> None:
    """Store the band in which losses of a recipe are expected, from several runs of it."""
    from metamorph.microworld.report_curves import expected_band
    from metamorph.training.trackers import read_metrics

    check_target(out, "--out")
    made = expected_band([read_metrics(run / "metrics.jsonl") for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made) + "\n", encoding="utf-8")
    typer.echo(f"{out}: from {len(runs)} runs.")


def ship(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a finished run of the recipe `microworld`.")],
    out: Annotated[Path, typer.Option(help="Where the weights go; the encoder must lie beside it as `../encoder`.")],
    decoder: Annotated[Path | None, typer.Option(help="The decoder; by default the shipped one.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Samples of every task; by default at least 500.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Turn a finished run into weights that ship: float16, without the encoder, with a card of measured scores."""
    from metamorph.microworld.components import shipped
    from metamorph.microworld.measuring import Measured, measure
    from metamorph.microworld.shipping import save_shipped_model, write_model_card

    check_target(out, "--out", directory=True)
    save_shipped_model(run_dir, out)
    parts = Measured(out, decoder or shipped("decoder"), shipped("llm"))
    report = measure(parts, samples=samples, seed=seed, told=lambda line: typer.echo(line, err=True))
    write_model_card(run_dir, out, report)
    typer.echo(f"{out}: " + ", ".join(f"{name} {row['value']:.3f}" for name, row in report["metrics"].items() if "/" not in name))
