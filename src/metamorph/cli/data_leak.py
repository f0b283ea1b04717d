"""`metamorph data leak`: prompts of a benchmark that training data hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metamorph.cli.data_options import STDOUT, Columns, cores, parse_columns, shown_progress, write_json
from metamorph.errors import ConfigError
from metamorph.places import check_target

EXIT_LEAKS = 1
SHOWN = 20
"""Leaks that are written out on a terminal."""
_WIDTH = 100


def leak(
    train: Annotated[list[str], typer.Argument(help="Training data: files, folders or globs.")],
    against: Annotated[
        Path, typer.Option(help="The benchmark's prompts: a text file, one a line; JSON with a field question or prompt; any data file.")
    ],
    ngram: Annotated[int, typer.Option(min=1, help="Words of an n-gram.")] = 8,
    threshold: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of a prompt's n-grams that counts as leaked.")] = 0.7,
    columns: Columns = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; by default all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON; - writes it to stdout.")] = None,
) -> None:
    """Find a benchmark's prompts in training data: exit code 0 if there are none, 1 if there are, 2 if the input is refused."""
    if json_file is not None and str(json_file) != STDOUT:
        check_target(json_file, "--json")
    from metamorph.data.leak import Benchmark, find_leaks, read_prompts, to_json
    from metamorph.data.source import open_source

    benchmark = Benchmark(read_prompts(against), ngram, threshold)
    reports = []
    for file in train:
        source = open_source(file, columns=parse_columns(columns), whole_files=False)
        with shown_progress(f"Searching {source.name}") as told:
            reports.append(find_leaks(source, benchmark, jobs=jobs or cores(), told=told))
    for report, file in zip(reports, train, strict=True):
        if report.unread == report.rows:
            found = f"prompts in none of {report.rows:,} rows"
            raise ConfigError(f"{found} but they are to be compared ({file}). Name their field (--columns question=ITS_NAME).")
    write_json(json_file, to_json(reports))
    found = [one for report in reports for one in report.leaks]
    if str(json_file) != STDOUT:
        for one in found[:SHOWN]:
            typer.echo(f"{one.match} {one.overlap:.0%}: {one.train.place} and {one.benchmark.place}")
            typer.echo(f"  train:     {_short(one.train.text)}\n  benchmark: {_short(one.benchmark.text)}")
        if len(found) > SHOWN:
            typer.echo(f"... and {len(found) - SHOWN:,} more ({json_file or 'all with --json FILE'})")
        rows, unread = sum(report.rows for report in reports), sum(report.unread for report in reports)
        unreadable = f"; no prompt could be read in {unread:,} rows (metamorph data check says why)" if unread else ""
        typer.echo(f"{len(found):,} of {rows:,} rows' prompts are, or nearly are, among {len(benchmark.prompts):,} prompts{unreadable}.")
    if found:
        raise typer.Exit(EXIT_LEAKS)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."
