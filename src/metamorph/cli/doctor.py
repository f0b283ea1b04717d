"""`metamorph doctor`: what is installed, what this machine has, what will work here, and the fix for what will not."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metamorph.cli.terminal import quiet_libraries, wide_console
from metamorph.places import check_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metamorph.cli.checkup import Finding

UNHEALTHY = 1
"""Exit code when pictures cannot be generated here."""

_TITLES = {
    "versions": "Required libraries",
    "extras": "Extras",
    "machine": "This machine",
    "parts": "The shipped model",
    "uses": "What will work here",
}
_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "optional": ("--", "dim"), "bad": ("NO", "red")}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(run)


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings as JSON too; - for stdout, without table.")] = None,
    ask_hub: Annotated[bool, typer.Option("--ask-hub", help="Ask whether the hub answers; nothing else uses a network.")] = False,
) -> None:
    """Check versions, machine and shipped weights, and say what will work here. Exit code 0 if pictures can be generated, else 1."""
    if json_file is not None and str(json_file) != "-":
        check_target(json_file, "--json")
    quiet_libraries()
    from metamorph.cli.checkup import check_all, works

    findings = check_all(ask_hub=ask_hub)
    healthy = works(findings)
    if json_file is not None:
        text = json.dumps({"works": healthy, "findings": [asdict(one) for one in findings]}, indent=2) + "\n"
        if str(json_file) == "-":
            typer.echo(text, nl=False)
        else:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(text, encoding="utf-8")
    if str(json_file) != "-":
        show(findings)
    sys.stdout.flush()
    raise typer.Exit(0 if healthy else UNHEALTHY)


def show(findings: Sequence[Finding]) -> None:
    """Print a table for each group, with a line for the fix where there is one."""
    from rich.table import Table
    from rich.text import Text

    console = wide_console()
    for group, title in _TITLES.items():
        rows = [one for one in findings if one.group == group]
        if not rows:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True, width=4)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in rows:
            mark, colour = _MARKS[one.status]
            said = Text(one.found)
            if one.fix and one.status != "ok":
                said.append(f"\n{'to add it' if one.status == 'optional' else 'fix'}: {one.fix}", style="bold")
            table.add_row(Text(mark, style=colour), Text(one.name), said)
        console.print(table)
        console.print()
