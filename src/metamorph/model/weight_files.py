"""The safetensors files of a saved model: which there are, whether they are whole, and a hash by which the same weights are known again.

Axes: none; whole tensors.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open

from metamorph.errors import CheckpointError

WEIGHTS = "model.safetensors"


def weight_files(directory: Path, name: str = WEIGHTS) -> list[Path]:
    """The files that hold a model's weights: one, or those that an index names. They need not exist."""
    index = directory / f"{name}.index.json"
    if not index.is_file():
        return [directory / name]
    shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
    return [directory / shard for shard in sorted(set(shards))]


def check_weights(directory: Path) -> None:
    """Look whether all weights are there, by the files' headers.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    for file in weight_files(directory):
        problem = None if file.is_file() else f"no {file.name}"
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            problem = problem or f"a broken {file.name} ({error})"
        if problem is not None:
            raise CheckpointError(f"{problem} but weights in safetensors were expected ({directory}). Save the model again.")


def weights_digest(directory: Path) -> str | None:
    """SHA-256 of the weights as float32 values, tensor by tensor; None where there are none, or not all.

    How they are cut into files, and whether values that fit are kept in 16 or in 32 bits, makes no difference.
    """
    digest = hashlib.sha256()
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(directory)]
            place = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (no mapping)
            for name in sorted(place):
                tensor = place[name].get_tensor(name)
                values = tensor.float() if tensor.is_floating_point() else tensor
                digest.update(f"{name} {tuple(values.shape)}\n".encode())
                digest.update(values.contiguous().reshape(-1).numpy())
    except (OSError, SafetensorError):
        return None
    return digest.hexdigest()
