"""From what a record writes for an image or video to what can be opened: paths inside the root, data URLs, bytes. Nothing is opened here.

A path may not leave the root, and nothing is fetched from a network unless that was asked for.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from metamorph.data.turns import MediaRef, Teller
from metamorph.errors import DataError, MetaMorphError
from metamorph.messages import ImagePart, ImageSource, image_from_json, resolve_inside

_WINDOWS = re.compile(r"^[A-Za-z]:[\\/]|^\\\\")
_DATA_URL = re.compile(r"^data:(?:image/[\w.+-]+)?(?:;[\w=-]+)*;base64,", re.IGNORECASE)
_URL = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)

Fetch: TypeAlias = Callable[[str], bytes]


@dataclass(frozen=True)
class Roots:
    """Where media may come from.

    `folder` is the one to which paths are relative and which they may not leave; None allows no paths. `fetch` gets a URL; None refuses.
    """

    folder: Path | None
    fetch: Fetch | None = None


def image_part(ref: MediaRef, roots: Roots, teller: Teller) -> ImagePart | None:
    """The image of a reference, unopened; None, and reported, where it cannot be one."""
    value = ref.value
    if isinstance(value, Mapping):
        if "visual_tokens" in value or ("base64" in value and "bytes" not in value):
            try:
                return image_from_json(dict(value), roots.folder, teller.place)
            except DataError as error:
                teller.fault(f"{ref.kind}-broken", ref.field, _found(error), "an image is needed", "Write the record anew.")
                return None
        value = value["bytes"] if value.get("bytes") is not None else value.get("path") or value.get("url") or value.get("file_name")
    source = _source(value, ref, roots, teller)
    return None if source is None else ImagePart(source)


def _found(error: MetaMorphError) -> str:
    return str(error).partition(" but ")[0]


def _source(value: Any, ref: MediaRef, roots: Roots, teller: Teller) -> ImageSource | None:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, (str, Path)):
        found = f"{type(value).__name__} ({value!r:.40})"
        teller.fault(f"{ref.kind}-type", ref.field, found, f"a path or the bytes of the {ref.kind} is needed", "Write its path.")
        return None
    text = str(value)
    if match := _DATA_URL.match(text):
        return _decoded(text[match.end() :], ref, teller)
    if match := _URL.match(text):
        return _fetched(text, match.group(1).lower(), ref, roots, teller)
    return path_of(text, ref, roots, teller)


def _decoded(text: str, ref: MediaRef, teller: Teller) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        teller.fault(f"{ref.kind}-base64", ref.field, "a data URL that does not decode", "base64 is needed", "Encode the file anew.")
        return None


def _fetched(url: str, scheme: str, ref: MediaRef, roots: Roots, teller: Teller) -> bytes | None:
    shown = url if len(url) <= 60 else url[:57] + "..."
    if roots.fetch is None or scheme not in ("http", "https"):
        remedy = "Fetch it first, or allow it (--allow-urls; `allow_urls: true` in a recipe)."
        remedy = remedy if scheme in ("http", "https") else "Copy the file to a local folder first."
        teller.fault(f"{ref.kind}-url", ref.field, f"the URL {shown}", "only local files are read", remedy)
        return None
    try:
        return roots.fetch(url)
    except (OSError, DataError) as error:
        teller.fault(f"{ref.kind}-url", ref.field, f"the URL {shown} ({error})", "it must answer with an image", "Fetch it by hand.")
        return None


def path_of(text: str, ref: MediaRef, roots: Roots, teller: Teller) -> Path | None:
    """A path inside the root; None, and reported, where it leads elsewhere."""
    if _WINDOWS.match(text):
        found, expected = f"the Windows path {text!r}", "a path relative to the root is needed"
        teller.fault(f"{ref.kind}-windows-path", ref.field, found, expected, "Write paths relative to the image root, with '/'.")
        return None
    if roots.folder is None:
        found = f"the path {text!r}"
        teller.fault(f"{ref.kind}-path", ref.field, found, "rows of this file carry their bytes", "Give --image-root.")
        return None
    try:
        return resolve_inside(Path(text), roots.folder, teller.place)
    except DataError:
        remedy = "Move the file below the root, or name a higher root (--image-root; `image_root` in a recipe)."
        teller.fault(f"{ref.kind}-outside", ref.field, f"the path {text!r}", f"a path inside {roots.folder} is needed", remedy)
        return None
