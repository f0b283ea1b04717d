"""Places on this machine, judged before anything long begins: from where a model is read, and where something is to be written."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from pathlib import Path

from metamorph.errors import CheckpointError, ConfigError

CONFIG, DECODER_INDEX = "config.json", "model_index.json"
"""The files by which a saved model, and a saved decoder, are known."""
_SHOWN = 8  # names of a directory that an error lists


def check_source(reference: str | Path, what: str, *, index: str | None = None, hub: bool = True, owned: bool = False) -> None:
    """Refuse what cannot be loaded from, without asking the hub: a mistyped path, a file, the directory of a run instead of its model's.

    Args:
        reference: a directory or, with `hub`, a name on the hub, which passes unseen.
        what: is expected there, for the message: "a MetaMorph checkpoint".
        index: the file by which it is known, such as `config.json`; only to find it inside of a run's directory.
        hub: whether a name on the hub would do.
        owned: whether such a name has an owner, as all have but those of a few old models (`gpt2`).

    Raises:
        CheckpointError: with the nearest path that exists.
    """
    place = Path(reference)
    if place.is_dir():
        inner = place / "model"
        if index is not None and not (place / index).is_file() and (inner / index).is_file():
            raise CheckpointError(f"the directory of a run but {what} was expected ({place}). Give {inner}, which the run saved.")
    elif place.exists():
        raise CheckpointError(f"a file but the directory of {what} was expected ({place}). Give {place.parent}.")
    elif not hub or (_is_no_repository(reference, owned) and not _in_cache(str(reference), index or CONFIG)):
        raise CheckpointError(f"no such directory but {what} was expected ({reference}). {_nearest(str(reference), hub)}")


def _is_no_repository(reference: str | Path, owned: bool) -> bool:
    return looks_local(reference) or (owned and "/" not in str(reference))


def looks_local(reference: str | Path) -> bool:
    """Whether this is spelt as a path on this machine, not as the name of a repository (`owner/name`, or `name`)."""
    text = str(reference)
    if text.startswith((".", "/", "~")) or "\\" in text or re.match("[A-Za-z]:", text) or text.count("/") > 1:
        return True
    first, slash, _ = text.partition("/")
    return bool(slash) and Path(first).is_dir()


def check_target(path: Path, option: str, *, directory: bool = False) -> None:
    """Refuse a place to which nothing can be written. Nothing is made there; what is there stays as it is.

    Args:
        path: of the file, or with `directory` of the directory; folders above it may be missing.
        option: which setting named it, for the message.
        directory: that many files are to be written below it.

    Raises:
        ConfigError: it is of the wrong kind, lies below a file, or cannot be written.
    """
    kind = "directory" if directory else "file"
    above = path
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if path.is_dir() and not directory:
        raise ConfigError(f"a directory but a file name is needed ({option} {path}). Add a name, such as {path / 'result.json'}.")
    if not above.is_dir() and (directory or above != path):
        raise ConfigError(f"a file at {above} but a directory is needed there ({option} {path}). Choose another place.")
    try:
        if path.is_file():
            path.open("ab").close()
        elif above.is_dir():
            with tempfile.TemporaryFile(dir=above):
                pass
    except OSError as error:
        found = f"{above} cannot be written to ({error.strerror})"
        raise ConfigError(f"{found} but a {kind} is to be written there ({option} {path}). Choose another place.") from error


def _in_cache(name: str, file: str) -> bool:
    """Whether a repository's file was fetched from the hub before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return False


def _nearest(text: str, hub: bool) -> str:
    """The remedy for a path that does not exist."""
    if text.startswith("~") and os.path.exists(os.path.expanduser(text)):
        return f"Write {os.path.expanduser(text)}: ~ is not expanded here."
    below = Path(text)
    there = next((one for one in below.parents if one.is_dir()), Path())
    names = sorted(one.name for one in there.iterdir() if one.is_dir()) if there.is_dir() and os.access(there, os.R_OK) else []
    rest = below.parts[len(there.parts) :]
    guess = difflib.get_close_matches(rest[0], names, n=1, cutoff=0.5) if rest else []
    if guess:
        whole = there.joinpath(guess[0], *rest[1:])
        return f"Did you mean {whole if whole.is_dir() else there / guess[0]}?"
    held = f"{there.resolve() if there == Path() else there} holds {', '.join(names[:_SHOWN]) or 'no directories'}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    also = ", or a name on the hub: owner/name" if hub else ""
    return f"Give a directory that exists ({held}{more}){also}."
