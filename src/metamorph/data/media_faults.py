"""What is wrong with an image that a record names, as a `Fault`: for checks before training, and by the same code as training's errors."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from metamorph.data.faults import Fault
from metamorph.errors import MediaError
from metamorph.media import DEFAULT_LIMITS, ImageLimits, check_header, detected_format, format_of_name, open_image
from metamorph.messages import ImageSource, resolve_inside

_URL = re.compile(r"(?i)([a-z][a-z0-9+.-]+)://")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def fault_of_image(
    source: ImageSource | str,
    *,
    place: str,
    field: str = "image",
    root: Path | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_urls: bool = False,
    decode: bool = True,
) -> Fault | None:
    """The worst thing that is wrong with an image; None if nothing is.

    Codes of errors: image-url, image-windows-path, image-outside, image-case, image-missing, image-unreadable, image-too-large,
    image-empty, image-broken, image-bomb, image-animated, image-depth. Of warnings: image-type.

    Args:
        source: as for `open_image`, or a string as it stands in a record: a path or a URL. Nothing is fetched.
        place: file and line of the record.
        field: where in the record the image stands.
        root: the folder that a path may not leave.
        limits: what is refused.
        allow_urls: take http and https addresses as they are; they are not looked at.
        decode: decode all of it. Otherwise only what can be told from names and headers is: a file that was cut short is not found.
    """
    if isinstance(source, str):
        scheme = _URL.match(source)
        if scheme is not None and scheme[1].lower() in ("http", "https") and allow_urls:
            return None
        if fault := _fault_of_text(source, scheme, place, field):
            return fault
        source = Path(source)
    shown = "" if not isinstance(source, Path) else f" {str(source)!r}"
    path = source
    if isinstance(source, Path):
        try:
            path = resolve_inside(source, root, place)
        except MediaError:
            found = f"image path{shown}"
            remedy = "Move the file or name a higher root."
            return Fault("image-outside", place, field, found, f"a path inside {root} is needed", remedy, media=True)
    try:
        (open_image if decode else check_header)(path, limits=limits)
    except MediaError as error:
        return _refused(error, source, root, place, field, shown)
    return _fault_of_type(path, place, field, shown)


def _fault_of_text(text: str, scheme: re.Match[str] | None, place: str, field: str) -> Fault | None:
    """What can be told from the words of a record alone."""
    if scheme is not None:
        fetched = scheme[1].lower() in ("http", "https")
        remedy = "Download the images and name their paths" + (", or allow URLs (--allow-urls)." if fetched else ".")
        return Fault("image-url", place, field, f"the address {_short(text)!r}", "a path of a file is needed", remedy, media=True)
    if _WINDOWS.match(text):
        remedy = "Write paths relative to the image root, with '/'."
        found = f"the Windows path {_short(text)!r}"
        return Fault("image-windows-path", place, field, found, "a path inside the image root is needed", remedy, media=True)
    return None


def _refused(error: MediaError, source: ImageSource, root: Path | None, place: str, field: str, shown: str) -> Fault:
    code, found, expected, remedy = error.fault or ("image-broken", str(error), "an image is needed", "Fetch it again.")
    if code == "image-missing" and isinstance(source, Path):
        if (other := _other_case(source, root)) is not None:
            found, expected = f"image path{shown}", f"the file is called {other!r}"
            return Fault("image-case", place, field, found, expected, "Write the name as the file has it.", media=True)
        if "\\" in str(source) and (Path(root or "") / str(source).replace("\\", "/")).exists():
            found, expected = f"the Windows path{shown}", "'/' between folders is needed"
            return Fault("image-windows-path", place, field, found, expected, "Write it with '/'.", media=True)
        looked = f" in {root}" if root is not None and not source.is_absolute() else ""
        return Fault(code, place, field, f"no file{shown}{looked}", "an image is needed", remedy, media=True)
    return Fault(code, place, field, f"{found}{' in' if shown else ''}{shown}", expected, remedy, media=True)


def _fault_of_type(path: ImageSource, place: str, field: str, shown: str) -> Fault | None:
    if not isinstance(path, Path) or (promised := format_of_name(path.name)) is None:
        return None
    found = detected_format(path)
    if found == promised:
        return None
    remedy = "Rename the file; it is read by its content."
    expected = f"its name promises {promised}"
    return Fault("image-type", place, field, f"{found} data in{shown}", expected, remedy, severity="warning", media=True)


def _other_case(path: Path, root: Path | None) -> str | None:
    """The path as it is on the disk, if it differs from the given one by nothing but case."""
    there, relative = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (Path(root or "."), path)
    here, found = there, []
    for part in relative.parts:
        name = part if part == ".." or os.path.lexists(here / part) else _names(here).get(part.casefold())
        if name is None:
            return None
        found.append(name)
        here = here / name
    other = str(Path(path.anchor, *found))
    return None if other == str(path) else other


def _names(folder: Path) -> dict[str, str]:
    try:
        return _listing(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=16)
def _listing(folder: Path, modified: int) -> dict[str, str]:
    """Names in a folder by their lower-case form; kept while the folder stays the same, for whoever misses one file often misses many."""
    return {name.casefold(): name for name in os.listdir(folder)}


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
