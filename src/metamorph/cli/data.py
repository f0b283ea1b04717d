"""`metamorph data`: look at data before training. One file per subcommand; this one puts them together."""

from __future__ import annotations

from importlib import import_module

import typer

SUBCOMMANDS = ("check", "show", "leak", "encode")
"""In the order of `--help`; `metamorph.cli.data_<name>` has a function of that name."""


def register(app: typer.Typer) -> None:
    """Add the group of commands to the app."""
    group = typer.Typer(help="Data: check it, look at it, encode it before training.", no_args_is_help=True, rich_markup_mode=None)
    for name in SUBCOMMANDS:
        group.command(name)(getattr(import_module(f"metamorph.cli.data_{name}"), name))
    app.add_typer(group, name="data")
