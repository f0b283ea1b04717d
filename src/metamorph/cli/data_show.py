"""`metamorph data show`: rows exactly as a model would read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metamorph.cli.data_options import (
    AllowUrls,
    Chosen,
    Columns,
    ImageRoot,
    ModelDir,
    Recipe,
    check_input,
    choose_processor,
    data_of,
    load_run,
    parse_columns,
    sources_of,
)
from metamorph.cli.terminal import quiet_libraries, show_table
from metamorph.errors import ConfigError, DataError
from metamorph.places import check_target

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from metamorph.data.inspection import Run
    from metamorph.data.mixture import ExampleSource
    from metamorph.data.showing import View
    from metamorph.training.config import RunConfig

_PACK = 4096  # positions of a row, where nobody says how many
_PROBLEMS = 1


def show(
    file: Annotated[str | None, typer.Argument(help="A file, folder or glob; without it, the first source of the recipe.")] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Rows to show, from the first on.")] = 3,
    row: Annotated[list[int] | None, typer.Option(min=0, help="Show this row instead, counted from 0. May be repeated.")] = None,
    model: ModelDir = None,
    recipe: Recipe = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures, too.")] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Show how the rows would be packed.")] = False,
    image_root: ImageRoot = None,
    columns: Columns = None,
    allow_urls: AllowUrls = False,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest row, in positions; by default the recipe's or model's.")] = None,
) -> None:
    """Show rows as a model reads them: tokens, what is a target, images, positions. Exit code 1 if one of the rows cannot be used."""
    check_input("metamorph data show", [file] if file else None, recipe, image_root, columns, allow_urls)
    if html is not None:
        check_target(html, "--html")
    quiet_libraries()
    from rich.console import Console

    from metamorph.data.showing import pack_table, packed

    console = Console()
    config = load_run(recipe)
    chosen = _processor(model, recipe, config, max_length)
    assert chosen.processor is not None
    if file is not None:
        from metamorph.data.source import open_source

        root = None if image_root is None else str(image_root)
        source: ExampleSource = open_source(file, image_root=root, columns=parse_columns(columns), allow_urls=allow_urls, whole_files=False)
    else:
        assert config is not None
        source, _ = next(sources_of(config, first=max(number, *(row or [0])) + 1))
    rows = row or range(min(number, len(source)))
    console.print(
        f"As the processor of {chosen.name} reads it; targets are {_legend(console)}.\n", highlight=False, markup=False, soft_wrap=True
    )
    views = []
    for index in rows:
        view = _look(source, index, chosen)
        if view is not None:
            views.append(view)
            _print(console, view)
    packs = packed(views, chosen.max_length or _PACK, _look_ahead(config)) if pack else []
    if packs:
        show_table(pack_table(packs))
    if html is not None:
        _write(html, source.name, views, chosen, packs)
    if len(views) < len(rows):
        raise typer.Exit(_PROBLEMS)


def _processor(model: str | None, recipe: str | None, config: RunConfig | None, max_length: int | None) -> Chosen:
    """The processor that was asked for; the shipped model's, where none was."""
    from metamorph.microworld.components import shipped

    if model is None and recipe is None:
        chosen = choose_processor(str(shipped("metamorph")), None, max_length)
        return Chosen(chosen.processor, "the shipped microworld model (--model or --recipe names another)", chosen.max_length)
    chosen = choose_processor(model, config, max_length)
    if chosen.processor is None:
        raise ConfigError(f"no processor ({chosen.why_not}) but one is needed to show tokens ({recipe}). Fetch it first, or give --model.")
    return chosen


def _look_ahead(config: RunConfig | None) -> int | None:
    """How far ahead the recipe draws to fill rows, where its first stage with data does."""
    data = next(iter(data_of(config)), None)
    return data.look_ahead if data is not None and data.batch_unit == "rows" else None


def _look(source: ExampleSource, index: int, chosen: Chosen) -> View | None:
    """A row as the model reads it; its faults are told, and None given where it cannot be used."""
    from metamorph.data.examining import examine
    from metamorph.data.faults import Fault, from_error
    from metamorph.data.showing import look

    assert chosen.processor is not None
    if index >= len(source):
        raise ConfigError(f"row {index} but 0 to {len(source) - 1} exist ({source.name}). Choose another one.")
    faults: list[Fault] = []
    place, view = f"{source.name} row {index}", None
    try:
        if (example := examine(source, index, faults.append)) is not None:
            place = example.place
            view = look(example, chosen.processor, chosen.max_length)
    except DataError as error:  # such as an image that does not open
        faults.append(from_error(error, "row-refused", place))
    for fault in faults:
        typer.echo(f"{fault.severity}: {fault}\n")
    return view


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _legend(console: Console) -> str:
    from metamorph.data.showing import TARGET_MARKS

    return "green" if _has_colour(console) else f"in {' '.join(TARGET_MARKS)}"


def _print(console: Console, view: View) -> None:
    one = view.example
    about = ", ".join([one.kind or "conversation", *([f"id {one.id}"] if one.id != one.place else [])])
    console.print(
        f"{one.place}  ({about})", style="bold", highlight=False, markup=False, soft_wrap=True
    )  # a place that is cut finds no file
    console.print(f"{view.summary}.", highlight=False, markup=False, soft_wrap=True)
    for run in view.runs:
        console.print(_line(run, colour=_has_colour(console)), soft_wrap=True, highlight=False)
    console.print()


def _line(run: Run, *, colour: bool) -> Text:
    from rich.text import Text

    from metamorph.data.showing import TARGET_MARKS

    begin, end = TARGET_MARKS if run.is_target and not colour else ("", "")
    style = ("bold green" if run.is_target else "cyan" if run.kind == "visual" else "") if colour else ""
    return Text.assemble((f"{run.start:>6}  ", "dim" if colour else ""), (f"{begin}{run.text}{end}", style))


def _write(path: Path, name: str, views: list[View], chosen: Chosen, packs: list) -> None:
    from metamorph.data.showing import page_of
    from metamorph.reporting.page import write

    assert chosen.processor is not None
    page = page_of(views, name, chosen.name, chosen.processor.decode, packs)
    typer.echo(f"{write(page, path)}: open it in a browser.")
