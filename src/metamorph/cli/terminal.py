"""What the longer commands share on the terminal: libraries that keep quiet, and tables whose names are never cut."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from metamorph.reporting.tables import Table

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
_WIDTH = 110  # columns that the widest table needs


def quiet_libraries() -> None:
    """Ask transformers, diffusers and the hub for errors only, and no bars.

    A user's own setting is kept, unless they are already imported.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for library in ("transformers", "diffusers"):  # they read the environment once
        if sys.modules.get(library) is not None:
            logging = import_module(f"{library}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()
    if sys.modules.get("huggingface_hub") is not None and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] != "0":
        import_module("huggingface_hub.utils").disable_progress_bars()


def wide_console() -> Console:
    """The terminal, or one that is wide enough for whoever reads from a pipe: names, figures and commands are not broken."""
    from rich.console import Console

    return Console(width=max(Console().width, _WIDTH))


def show_table(table: Table) -> None:
    """Print a table to stdout; in a narrow terminal its lines wrap, but no name or figure is cut."""
    from metamorph.reporting.tables import to_rich

    wide_console().print(to_rich(table))
