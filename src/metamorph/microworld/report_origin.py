"""Where figures come from: machine, versions, code, memory. What a report needs so that it can be repeated."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import metamorph

_LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "pillow", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that compute."""
    found = {"python": platform.python_version(), "metamorph": metamorph.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and system; no name of machine or user."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "processor": _processor(), "cores": cores}
    found["threads"] = torch.get_num_threads()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def commit() -> str | None:
    """The commit of the checkout that runs, with "+" if it was changed since; None outside a checkout."""
    here = Path(metamorph.__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"], cwd=here, capture_output=True, text=True, timeout=10
        )
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=here, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None


def command() -> str:
    """The command line, its program without its directory."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="ignore").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
