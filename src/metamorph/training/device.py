"""Which device, which precision, and how many processes. One rule each."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from metamorph.device import find_device

MINIMUM_GAIN = 1.2
"""bfloat16 is chosen on CPU when a small network trains at least this much faster with it: below that its rounding buys nothing."""


def pick_device(wanted: Literal["auto", "cuda", "mps", "cpu"] = "auto") -> torch.device:
    """The device rule of `find_device`; under torchrun, the CUDA device of the local rank.

    Raises:
        ConfigError: a device was asked for by name and is missing.
    """
    device = find_device(None if wanted == "auto" else wanted, "Use device=auto.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def choose_precision(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device, model: nn.Module) -> str:
    """Resolve `auto`: on CUDA by what the GPU supports, on MPS float32, on the CPU by measuring at the model's width. All processes agree.

    Returns:
        "float32" or "bfloat16".
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and measure_bfloat16_gain(model) >= MINIMUM_GAIN
    if dist.is_initialized():  # the first process decides: timings differ
        choice = [fast]
        dist.broadcast_object_list(choice, src=0)
        fast = choice[0]
    return "bfloat16" if fast else "float32"


def measure_bfloat16_gain(model: nn.Module, tokens: int = 512, repeats: int = 5) -> float:
    """float32 time over bfloat16-autocast time of a forward and backward pass through two linear layers of the model's typical width."""
    widths = sorted(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    width = min(statistics.median_low(widths), 2048) if widths else 64
    with torch.random.fork_rng(devices=[]):
        network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        inputs = torch.randn(tokens, width)
    seconds = {False: float("inf"), True: float("inf")}
    for _ in range(repeats):
        for enabled in seconds:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                network(inputs).float().square().mean().backward()
            seconds[enabled] = min(seconds[enabled], time.perf_counter() - start)
    return seconds[False] / seconds[True]


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes when started by torchrun; do nothing otherwise or when that was done already."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1
