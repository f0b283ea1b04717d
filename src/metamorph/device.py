"""Which device: one rule for training and use."""

from __future__ import annotations

import torch

from metamorph.errors import ConfigError


def find_device(wanted: str | torch.device | None = None, remedy: str = "Give one of these, or leave it out.") -> torch.device:
    """The device of this name; without a name CUDA if there is one, else Apple's MPS, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    present = devices()
    if wanted is None:
        return torch.device(present[0])
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        here = ", ".join(name if name != "cuda" else f"cuda (0 to {torch.cuda.device_count() - 1})" for name in present)
        lacks = " built without CUDA" if device is not None and device.type == "cuda" and torch.version.cuda is None else ""
        raise ConfigError(f"device {str(wanted)!r} asked for but this machine has {here} (torch {torch.__version__}{lacks}). {remedy}")
    return device


def devices() -> list[str]:
    """The kinds of devices that are here, the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    other = torch.accelerator.current_accelerator(check_available=True)  # of another kind: found, but only used where it is named
    return [*(name for name in there if there[name]), *([other.type] if other is not None and other.type not in there else [])]
