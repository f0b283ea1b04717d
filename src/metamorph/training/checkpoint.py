"""Checkpoints that can be trusted: complete or absent, without pickle, and enough to go on exactly.

<directory>/step-00000100/
shard-*.safetensors   model, optimizer, companions (an EMA), one file per process: PyTorch's distributed checkpoints on safetensors
rank-00000.json       what each process alone knows: its place in the data, its random states
training.json         step, processes, precision; written last but one: the last act is renaming the directory into place
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from metamorph.errors import CheckpointError
from metamorph.training.device import rank, world_size


@runtime_checkable
class Stateful(Protocol):
    """Something with a state of plain JSON values (a stream)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go on from there."""
        ...


@runtime_checkable
class Companion(Protocol):
    """Something that follows the weights and is saved with them, such as an exponential moving average; its state is named tensors."""

    def update(self, model: Any, /) -> Any:
        """Called after each optimizer step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies: loading writes into them."""
        ...


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What was being written when a process died has another name and is not among them."""
    found = directory.iterdir() if directory.is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name) and (path / "training.json").is_file())


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Stateful,
    *,
    companions: Mapping[str, Companion] | None = None,
    details: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint on all processes, move it into place at once, and delete all but the newest `keep`."""
    final = step_directory(directory, step)
    partial = final.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer) | _companion_tensors(companions)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a case of many
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True), no_dist=not dist.is_initialized())
    own = {"stream": stream.state_dict(), "random": _random_states()}
    (partial / f"rank-{rank():05d}.json").write_text(json.dumps(own), encoding="utf-8")
    _barrier()
    if rank() == 0:
        (partial / "training.json").write_text(json.dumps({"step": step, "processes": world_size(), **(details or {})}), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(directory)
        for old in list_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return final


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stream: Stateful, *, companions: Mapping[str, Companion] | None = None
) -> dict[str, Any]:
    """Go on from a checkpoint: weights, optimizer, companions, place in the data, random states. Returns the contents of training.json.

    Raises:
        CheckpointError: it is incomplete, of another model, or was written by another number of processes.
    """
    details = read_details(path)
    if details["processes"] != world_size():
        raise CheckpointError(
            f"written by {details['processes']} processes but read by {world_size()} ({path})."
            " Resume with as many, or start a new run from its weights."
        )
    saved = _saved_shapes(path)
    _create_optimizer_state(path, model, optimizer, saved)
    _read(path, _model_tensors(model) | _optimizer_tensors(model, optimizer) | _companion_tensors(companions), saved)
    own = json.loads((path / f"rank-{rank():05d}.json").read_text(encoding="utf-8"))
    stream.load_state_dict(own["stream"])
    _set_random_states(own["random"])
    return details


def load_weights(path: Path, model: nn.Module) -> None:
    """Take only the model's weights from a checkpoint, for example of the stage before; any number of processes may read it.

    Raises:
        CheckpointError: it is incomplete or of another model.
    """
    read_details(path)
    _read(path, _model_tensors(model), _saved_shapes(path))


def read_details(path: Path) -> dict[str, Any]:
    """The contents of training.json: step, processes, precision.

    Raises:
        CheckpointError: there is none, so that this is no complete checkpoint.
    """
    try:
        return json.loads((path / "training.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"no readable training.json but every complete checkpoint has one ({path}): {error}. Use another checkpoint."
        ) from None


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers; a tied tensor once, under its first name."""
    first_names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    return {f"model.{name}": value for name, value in model.state_dict().items() if isinstance(value, Tensor) and name not in tied}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments by parameter name. Rates and decays are settings, not state: they are computed from the config."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states = ((names[parameter], state) for parameter, state in optimizer.state.items())
    return {f"optimizer.{name}.{key}": value for name, state in states for key, value in state.items() if isinstance(value, Tensor)}


def _companion_tensors(companions: Mapping[str, Companion] | None) -> dict[str, Tensor]:
    pairs = [(name, companion.state_dict()) for name, companion in (companions or {}).items()]
    return {f"companion.{name}.{key}": value for name, tensors in pairs for key, value in tensors.items()}


def _create_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, torch.Size]) -> None:
    """Make empty moments for the parameters that have some in the checkpoint; reading fills them.

    Raises:
        CheckpointError: the moments are those of another optimizer.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        keys, other = (["momentum_buffer"], "exp_avg") if group.get("orthogonal") else (["exp_avg", "exp_avg_sq"], "momentum_buffer")
        for parameter in group["params"]:
            name = f"optimizer.{names[parameter]}"
            if f"{name}.{other}" in saved:
                remedy = "Resume with the optimizer that the run began with."
                raise CheckpointError(f"{name}.{other} but {keys[0]} was expected ({path}): moments of another optimizer. {remedy}")
            if f"{name}.{keys[0]}" in saved:
                optimizer.state[parameter] = {key: torch.zeros_like(parameter, requires_grad=False) for key in keys}
                if not group.get("orthogonal"):
                    optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)


def _saved_shapes(path: Path) -> dict[str, torch.Size]:
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"unreadable weights but safetensors files were expected ({path}): {error}. Use another checkpoint."
        ) from error
    return {name: torch.Size(getattr(value, "size", ())) for name, value in metadata.items()}


def _read(path: Path, tensors: dict[str, Tensor], saved: Mapping[str, torch.Size]) -> None:
    """Fill `tensors` in place."""
    remedy = f"({path}). Is it of another model? Start in another directory."
    missing = sorted(set(tensors) - set(saved))
    if missing:
        raise CheckpointError(f"{len(missing)} tensors missing, such as {missing[0]}, but {len(tensors)} are needed {remedy}")
    for name, value in tensors.items():
        if value.shape != saved[name]:
            raise CheckpointError(f"{name} of shape {list(saved[name])} but {list(value.shape)} is needed {remedy}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())


def _random_states() -> dict[str, Any]:
    python, numpy_state = random.getstate(), np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    states: dict[str, Any] = {"torch": _encode(torch.get_rng_state()), "python": [python[0], list(python[1]), python[2]]}
    states["numpy"] = numpy_state | {"state": {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}}
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(_decode(states["torch"]))
    random.setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
    key = np.array(states["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(states["numpy"] | {"state": {"key": key, "pos": states["numpy"]["state"]["pos"]}})
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a directory, are on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
