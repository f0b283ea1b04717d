"""What the longer commands share on the terminal: libraries that keep quiet, so that only our own lines are seen."""

from __future__ import annotations

import os

_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


def quiet_libraries() -> None:
    """Ask transformers and diffusers for errors only, and no bars; must come before they are imported. A user's own setting is kept."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
