"""`metamorph data check`: what is in files of data, and what is wrong with them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metamorph.cli.data_options import (
    STDOUT,
    AllowUrls,
    Chosen,
    Columns,
    ImageRoot,
    Jobs,
    ModelDir,
    Recipe,
    check_input,
    choose_processor,
    cores,
    load_run,
    parse_columns,
    shown_progress,
    sources_of,
    write_json,
)
from metamorph.cli.terminal import quiet_libraries, show_table
from metamorph.places import check_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metamorph.data.check import SourceReport
    from metamorph.data.faults import Fault
    from metamorph.data.mixture import ExampleSource
    from metamorph.data.row_checks import CheckSettings

EXIT_PROBLEMS = 1


def check(
    files: Annotated[list[str] | None, typer.Argument(help="Files, folders or globs; without any, all sources of the recipe.")] = None,
    image_root: ImageRoot = None,
    recipe: Recipe = None,
    model: ModelDir = None,
    columns: Columns = None,
    allow_urls: AllowUrls = False,
    every: Annotated[bool, typer.Option("--all", help="Check every row, not a sample.")] = False,
    sample: Annotated[int, typer.Option(min=1, help="Rows of each source that are checked, spread evenly, the same each time.")] = 2000,
    jobs: Jobs = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON; - writes it to stdout.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest row, in positions; by default the recipe's or model's.")] = None,
) -> None:
    """Check data before training: exit code 0 if nothing is wrong, 1 if there are problems (warnings too), 2 if the input is refused."""
    check_input("metamorph data check", files, recipe, image_root, columns, allow_urls)
    if json_file is not None and str(json_file) != STDOUT:
        check_target(json_file, "--json")
    quiet_libraries()
    from metamorph.data.check import check as check_source
    from metamorph.data.check_report import to_json
    from metamorph.data.source import open_source

    config = load_run(recipe)
    chosen = choose_processor(model, config, max_length)
    opened: Iterator[tuple[ExampleSource, int | None]]
    if files:
        named, root = parse_columns(columns), None if image_root is None else str(image_root)
        open_file = partial(open_source, image_root=root, columns=named, allow_urls=allow_urls, whole_files=False)
        opened = ((open_file(file), chosen.max_length) for file in files)
    else:
        assert config is not None
        opened = ((source, max_length or limit) for source, limit in sources_of(config, whole_files=False, first=sample))
    reports = []
    for source, limit in list(opened):  # all are opened first: a name that is wrong costs no finished report
        with shown_progress(f"Checking {source.name}") as told:
            workers = jobs or (cores() if every else 1)
            reports.append(check_source(source, _settings(chosen, limit), sample=None if every else sample, jobs=workers, told=told))
    write_json(json_file, to_json(reports))
    if str(json_file) != STDOUT:
        show(reports, chosen.why_not, listed=json_file)
    if any(report.faults for report in reports):
        raise typer.Exit(EXIT_PROBLEMS)


def _settings(chosen: Chosen, max_length: int | None) -> CheckSettings:
    from metamorph.data.lengths import CountedLengths, EstimatedLengths
    from metamorph.data.row_checks import CheckSettings

    measure = EstimatedLengths() if chosen.processor is None else CountedLengths(chosen.processor, chosen.name)
    return CheckSettings(measure, max_length)


def show(reports: list[SourceReport], why_not: str = "", listed: Path | None = None) -> None:
    """Tables, then the problems, of each kind the first few."""
    from metamorph.data.check_report import contents, overview

    show_table(overview(reports))
    for report in reports:
        show_table(contents(report))
        if not report.complete:
            typer.echo(
                f"A sample: {report.checked:,} of {report.rows:,} rows of {report.name}, in {report.seconds:.1f} s. "
                "What repeats is found only among them. --all checks every row.\n"
            )
    if why_not:
        typer.echo(f"Lengths are estimated: {why_not}.\n")
    for report in reports:
        _show_problems(report.faults, listed)
    total = sum(len(report.faults) for report in reports)
    rows = sum(report.checked for report in reports)
    typer.echo(f"{total:,} problem{'' if total == 1 else 's'} in {rows:,} rows." if total else f"No problems in {rows:,} rows.")


def _show_problems(faults: tuple[Fault, ...], listed: Path | None) -> None:
    from metamorph.data.check_report import grouped

    for code, number, first in grouped(faults):
        typer.echo(f"{first[0].severity} {code}: {number:,}")
        for fault in first:
            typer.echo(f"  {fault}")
        if number > len(first):
            typer.echo(f"  ... and {number - len(first):,} more ({listed or 'all with --json FILE'})")
        typer.echo()
