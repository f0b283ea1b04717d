"""What `metamorph doctor` looks at: each check returns findings, and a check that fails is a finding too, never a traceback."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metamorph.errors import MetaMorphError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Status = Literal["ok", "note", "optional", "bad"]
"""It works; it works, but know this; it is not installed and need not be; it does not work."""

GENERATE = "metamorph generate"
"""The use by which the doctor's exit code is decided."""

_WORST: tuple[Status, ...] = ("bad", "optional", "note", "ok")

GIB = 2**30
CARD_MEMORY = 80  # GiB of one accelerator of the class that 8B models are trained on; only to say how many are needed
_MODULES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "pyyaml": "yaml"}
_NOT_FOR_USERS = ("dev", "all")
# A broken installation fails to import in many ways: files missing, a library of another build, names that moved.
_FAILURES = (MetaMorphError, ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError, KeyError, SyntaxError)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    group: str
    name: str
    status: Status
    found: str
    fix: str = ""  # a command, or what to do


def check_all(*, ask_hub: bool = False) -> list[Finding]:
    """Every check, in the order of the report."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", check_versions),
        ("extras", check_extras),
        ("machine", check_machine),
        ("machine", lambda: check_hub(ask=ask_hub)),
        ("parts", check_parts),
    ]
    found = [finding for group, check in checks for finding in _guarded(group, check)]
    return [*found, *_guarded("uses", lambda: check_uses(found))]


def works(findings: Sequence[Finding]) -> bool:
    """Whether pictures can be generated here."""
    return any(one.name == GENERATE and one.status == "ok" for one in findings)


def _guarded(group: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check's findings; when it breaks off, what broke it is the last one."""
    found: list[Finding] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.extend(check())
    except _FAILURES as error:
        found.append(Finding(group, "check", "bad", f"broke off: {_said(error)}", "Mend what stands above first."))
    return found


def _said(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"


def check_versions() -> Iterator[Finding]:
    """Python, this package, and every library that it requires: in range, and really importable."""
    yield _python()
    package = metadata.distribution("metamorph")
    yield Finding("versions", "metamorph", "ok", f"{package.version} in {Path(__file__).parents[1]}")
    for requirement in requirements():
        yield _library(requirement, "versions")
    if (torchvision := _torchvision()) is not None:
        yield torchvision


def requirements(extra: str = "") -> list[Requirement]:
    """What the installed package requires, always or for an extra, on this machine."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires("metamorph") or []]
    always = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one for one in found if one not in always and one.marker and one.marker.evaluate({"extra": extra})] if extra else always


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("metamorph")["Requires-Python"]
    found = platform.python_version()
    fits = SpecifierSet(wanted).contains(found, prereleases=True)
    where = f"{found} ({sys.executable})"
    return Finding("versions", "python", "ok" if fits else "bad", where, "" if fits else f"Use Python {wanted}.")


def _library(requirement: Requirement, group: str, *, optional: bool = False) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    fix = f'python -m pip install "{name}{wanted}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        said = "" if optional else f", but {wanted or 'any version'} is needed"
        return Finding(group, name, "optional" if optional else "bad", f"not installed{said}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(group, name, "bad", f"{version}, but {wanted} is needed", fix)
    try:
        importlib.import_module(_MODULES.get(name, name))
    except _FAILURES as error:
        return Finding(group, name, "bad", f"{version}, but it does not import ({_said(error)})", f"{fix} --force-reinstall")
    return Finding(group, name, "ok", version)


def _torchvision() -> Finding | None:
    """Nothing here needs it; beside another build of torch it breaks transformers and diffusers when they import it."""
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return None
    fix = "python -m pip uninstall torchvision"
    try:
        importlib.import_module("torchvision")
        extension: Any = importlib.import_module("torchvision.extension")
    except _FAILURES as error:
        return Finding("versions", "torchvision", "bad", f"{version} does not import ({_said(error)}) and breaks transformers with it", fix)
    # Some releases import without their compiled part. The version's name tells nothing: "+cpu" is on some platforms' builds only.
    if not getattr(extension, "_has_ops", lambda: True)():
        said = f"{version} cannot load its operators, as beside another build of torch: transformers breaks where it uses them"
        return Finding("versions", "torchvision", "bad", said, fix)
    said = f"{version}: not needed. transformers' own image processors then resize with it; this package always resizes with PIL"
    return Finding("versions", "torchvision", "note", said)


def check_extras() -> Iterator[Finding]:
    """The optional libraries of every extra."""
    for extra in metadata.metadata("metamorph").get_all("Provides-Extra") or []:
        if extra in _NOT_FOR_USERS:
            continue
        found = _extra(extra)
        worst: Status = min(found, key=lambda one: _WORST.index(one.status)).status if found else "ok"
        said = ", ".join(f"{one.name} {one.found}" for one in found)
        fixes = [one.fix.removeprefix("python -m pip install ") for one in found if one.fix]
        fix = "python -m pip install " + " ".join(fixes) if fixes else ""
        yield Finding("extras", extra, worst, said, fix)


def _extra(extra: str) -> list[Finding]:
    """A finding for each library of an extra."""
    return [_library(one, "extras", optional=True) for one in requirements(extra)]


def check_machine() -> Iterator[Finding]:
    """Accelerators, precision, cores, memory, disk."""
    import torch

    from metamorph.training.device import MINIMUM_GAIN, measure_bfloat16_gain, pick_device

    device = pick_device().type
    if device == "cuda":
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            said = f"{torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            yield Finding("machine", f"cuda:{number}", "ok", said)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("machine", "bfloat16", "ok" if fast else "note", "supported" if fast else "not supported: training uses float32")
    else:
        yield Finding("machine", "device", "ok", "Apple's GPU (mps)" if device == "mps" else "CPU only: enough for the microworld")
        gain = measure_bfloat16_gain(torch.nn.Linear(256, 256), tokens=256, repeats=3)
        said = f"{gain:.1f} x the speed of float32 on the CPU at width 256; training takes it from {MINIMUM_GAIN} x"
        yield Finding("machine", "bfloat16", "ok", said)
    yield _cores(torch.get_num_threads())
    yield _memory(*memory())
    room = shutil.disk_usage(Path.cwd()).free
    full = "" if room > 2 * GIB else "A run of the demo writes about 100 MB; free some space."
    yield Finding("machine", "disk", "note" if full else "ok", f"{room / GIB:.1f} GiB free here", full)


def _cores(threads: int) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"{cores} for this process, torch uses {threads} thread{'s' if threads != 1 else ''}"
    if threads > cores:
        return Finding("machine", "cores", "note", f"{said}: that is many times slower", f"export OMP_NUM_THREADS={cores}")
    return Finding("machine", "cores", "ok", said)


def _memory(total: int | None, free: int | None) -> Finding:
    all_of_it = "an unknown amount" if total is None else f"{total / GIB:.1f} GiB"
    said = f"{all_of_it}; how much is free is unknown here" if free is None else f"{free / GIB:.1f} GiB of {all_of_it} free"
    return Finding("machine", "memory", "note" if free is not None and free <= 2 * GIB else "ok", said)


def memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int | None]:
    """Bytes of main memory that this process may use: all, and free now. None where the system does not say: a Mac tells the first only."""
    total: int | None = None
    free: int | None = None
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        with suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # a container may allow less than the machine has
        limit, used = (int((cgroup / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        total = limit if total is None else min(total, limit)
        free = max(limit - used if free is None else min(free, limit - used), 0)
    return total, free


def check_hub(*, ask: bool = False) -> Iterator[Finding]:
    """Whether models may be fetched from the hub: what the environment says and, only if asked, whether the hub answers."""
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0").lower() not in ("", "0", "false")]
    if offline:
        yield Finding("machine", "hub", "ok", f"offline ({', '.join(offline)} is set): only directories and the cache are read")
        return
    if not ask:
        yield Finding("machine", "hub", "ok", "online mode, not tried (--ask-hub tries); the microworld never needs it")
        return
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=5) as answer:
            yield Finding("machine", "hub", "ok", f"{endpoint} answers ({answer.status})")
    except (OSError, ValueError) as error:
        yield Finding("machine", "hub", "note", f"{endpoint} does not answer ({error})", "Give directories, or set HF_HUB_OFFLINE=1.")


def check_parts() -> Iterator[Finding]:
    """The weights that come with the package: as their cards say, loadable, and able to draw."""
    from metamorph.microworld.cards import read_card
    from metamorph.microworld.components import shipped

    for name in ("llm", "encoder", "decoder", "metamorph"):
        try:
            card = read_card(shipped(name))
            yield Finding("parts", name, "ok", f"{card.what} (sha256 {card.sha256[:12]}, as on its card)")
        except _FAILURES as error:
            yield Finding("parts", name, "bad", _said(error), "python -m pip install --force-reinstall --no-deps metamorph")
    yield _drawing()


def _drawing() -> Finding:
    """Load the shipped model and let it draw one picture."""
    from metamorph.cli.generate import load

    if (absent := next((one for one in _extra("decoder") if one.status == "optional"), None)) is not None:
        return Finding("parts", "drawing", "optional", f"not tried: {absent.name} is {absent.found}", absent.fix)
    start = time.perf_counter()
    try:
        pipeline = load(None, None, None, needs_decoder=True)
        loaded = time.perf_counter()
        reply = pipeline("Generate an image of a red circle", steps=1, max_new_tokens=64)
    except _FAILURES as error:
        return Finding("parts", "drawing", "bad", _said(error), "Mend what stands above first.")
    drawn = f"loaded in {loaded - start:.1f} s, drew {len(reply.images)} picture in {time.perf_counter() - loaded:.1f} s"
    return Finding("parts", "drawing", "ok" if reply.images else "bad", f"{drawn} on {pipeline.model.device.type}")


def check_uses(found: Sequence[Finding]) -> Iterator[Finding]:
    """What will work here, judged by the findings of the other checks."""
    by_name = {(one.group, one.name): one for one in found}

    def use(name: str, said: str, *needs: tuple[str, str]) -> Finding:
        missing = [one for one in (by_name.get(need) for need in needs) if one is not None and one.status != "ok"]
        missing += [Finding(group, other, "bad", "not checked") for group, other in needs if (group, other) not in by_name]
        if not missing:
            return Finding("uses", name, "ok", said)
        causes = [one for one in found if one.group == "versions" or one.name == "decoder"]  # why a picture could not be drawn
        fixes = " && ".join(dict.fromkeys(one.fix for one in [*causes, *missing] if one.status != "ok" and one.fix.startswith("python")))
        status: Status = "optional" if all(one.status == "optional" for one in missing) else "bad"
        return Finding("uses", name, status, "; ".join(f"{one.name}: {one.found}" for one in missing), fixes or "See the lines above.")

    draws = ("parts", "drawing")
    yield use(GENERATE, "questions about pictures, drawings, video as lists of frames", draws)
    yield use("metamorph chat", "the same, in turns", draws)
    yield use(
        "metamorph demo",
        "trains both stages in under 5 minutes on 2 free cores, and measures them",
        draws,
        ("extras", "reporting"),
    )
    yield use("train a decoder", "on images and their visual tokens", ("extras", "decoder"), ("versions", "torch"))
    yield _large_model(by_name)
    for extra, name in (("peft", "LoRA (peft)"), ("docs", "build the documentation")):
        if ("extras", extra) in by_name:
            yield use(name, "installed", ("extras", extra))


def _large_model(by_name: dict[tuple[str, str], Finding]) -> Finding:
    """Whether the paper's 8B model would fit: computed from its shape, not measured."""
    name = "train an 8B model"
    needed = [by_name.get(("versions", library)) for library in ("torch", "transformers")]
    if any(one is None or one.status != "ok" for one in needed):
        return Finding("uses", name, "bad", "not computed: torch or transformers is missing", "See the lines above.")
    needs = memory_of_large_model()
    cards = next(number for number in range(1, 1025) if needs(number) <= CARD_MEMORY * GIB)
    said = f"needs about {needs(1) / GIB:.0f} GiB on one GPU (computed: recipe metamorph_llama3_1_8b), or {cards} GPUs of {CARD_MEMORY} GiB"
    here = accelerator_memory()
    if here and needs(len(here)) <= min(here):
        return Finding("uses", name, "ok", f"{said}; {len(here)} x {min(here) / GIB:.0f} GiB are here")
    fix = f"torchrun --nproc-per-node={cards} --no-python metamorph train metamorph_llama3_1_8b, where they are"
    present = f"{len(here)} x {min(here) / GIB:.0f} GiB" if here else "no GPU"
    return Finding("uses", name, "note", f"{said}; here: {present}", fix)


def memory_of_large_model() -> Callable[[int], int]:
    """Bytes that each of n processes needs for the paper's LLaMA-3.1 8B recipe in its larger stage, as `--dry-run` computes them."""
    from metamorph.recipes import metamorph_llama3_1_8b
    from metamorph.recipes.shapes import empty_model
    from metamorph.training.plan import plan

    config = metamorph_llama3_1_8b()
    assert config.model is not None
    model = empty_model(config.model)
    return lambda processes: max(stage.memory_bytes for stage in plan(config, model, processes))


def accelerator_memory() -> list[int]:
    """Bytes of each CUDA device."""
    import torch

    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
