"""The `metamorph` command: assembles one file per noun, and turns the package's own errors into one clear line.

Nothing heavy is imported before a subcommand runs: each noun imports what it needs inside its functions.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

import metamorph
from metamorph.errors import MetaMorphError

NOUNS = ("init", "convert", "train", "generate", "chat", "evaluate", "push", "demo", "doctor", "data", "microworld")
"""The subcommands in the order of `--help`; `metamorph.cli.<noun>` has `register(app)`."""

EXIT_REFUSED = 2
"""Exit code when the input was refused: the same as for a wrong option."""


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"metamorph {metamorph.__version__}")
        raise typer.Exit
    return wanted


def build_app() -> typer.Typer:
    """The whole command, every noun registered."""
    app = typer.Typer(
        name="metamorph",
        help="Morph a language model into one that understands and draws images (Visual-Predictive Instruction Tuning).",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # an unexpected error keeps its ordinary traceback
        rich_markup_mode=None,
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
        ] = False,
    ) -> None:
        """Morph a language model into one that understands and draws images (Visual-Predictive Instruction Tuning)."""

    for noun in NOUNS:
        import_module(f"metamorph.cli.{noun}").register(app)
    return app


app = build_app()


def main() -> None:
    """Run the command; a `MetaMorphError` becomes one line on stderr and exit code 2, anything else keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names of files may be any bytes
    try:
        app()
    except MetaMorphError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(EXIT_REFUSED)
    except BrokenPipeError:
        # The reader (head, less) left early: point stdout elsewhere so that the interpreter's last flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
