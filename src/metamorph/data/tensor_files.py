"""Tensors in a safetensors file as arrays that are mapped into memory, bfloat16 as its 16 bits, for which numpy has no type."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_KINDS = {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8, "U32": np.uint32, "U64": np.uint64}


class MappedTensors(NamedTuple):
    """Of one file: it may be replaced under its name meanwhile, and these stay together."""

    arrays: dict[str, np.ndarray]
    metadata: Mapping[str, str]


def map_tensors(path: Path) -> MappedTensors:
    """All tensors of a file.

    Raises:
        OSError: there is no such file.
        ValueError: it is not whole.
    """
    with path.open("rb") as file:
        start, tensors, metadata = _header(file, path)
        return MappedTensors({name: _mapped(file, start, entry) for name, entry in tensors.items()}, metadata)


def read_metadata(path: Path) -> Mapping[str, str]:
    """What a file says of its tensors, none of which is read.

    Raises:
        OSError: there is no such file.
        ValueError: it is not whole.
    """
    with path.open("rb") as file:
        return _header(file, path)[2]


def _mapped(file: BinaryIO, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    shape, kind = tuple(entry["shape"]), _KINDS[entry["dtype"]]
    if 0 in shape:  # nothing cannot be mapped
        return np.zeros(shape, kind)
    return np.memmap(file, kind, "r", start + entry["data_offsets"][0], shape)


def _header(file: BinaryIO, path: Path) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Where the tensors begin, where each lies behind that, and the metadata."""
    size = int.from_bytes(file.read(8), "little")
    whole = os.fstat(file.fileno()).st_size
    tensors = json.loads(file.read(size)) if 0 < size <= whole - 8 else None
    if tensors is None:
        raise ValueError(f"{path} is cut short")
    metadata = tensors.pop("__metadata__", {})
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + size + end != whole:
        raise ValueError(f"{path} is cut short")
    return 8 + size, tensors, metadata
