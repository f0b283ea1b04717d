"""Conversations written as our own records, one a line: what `source.open_source` reads back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from metamorph.messages import Example, to_json


def write_jsonl(path: Path, examples: Iterable[Example], *, root: Path | None = None) -> None:
    """Write records that `open_source(path, image_root=root)` reads back; the file appears at once, whole.

    Raises:
        MediaError: an image path lies outside the root (default: the file's folder).
    """
    folder = path.parent if root is None else root
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(to_json(example, root=folder), ensure_ascii=False) + "\n" for example in examples)
    os.replace(partial, path)
