"""`metamorph data encode`: the visual tokens of a whole data set, computed once, so that training needs no vision encoder."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metamorph.cli.data_options import AllowUrls, Columns, ImageRoot, check_input, cores, load_run, parse_columns, sources_of
from metamorph.cli.options import Device
from metamorph.cli.terminal import quiet_libraries, show_table
from metamorph.errors import ConfigError
from metamorph.places import check_target

if TYPE_CHECKING:
    from rich.console import Console

    from metamorph.data.mixture import ExampleSource
    from metamorph.data.token_store import StoreType
    from metamorph.training.config import ModelConfig, RunConfig
    from metamorph.training.encoding_rounds import EncodingProgress

EXIT_PROBLEMS = 1
_SHOWN = 50  # faults that are named on the terminal; all of them are in the file
_SECONDS = 5.0  # between lines where there is no terminal


def encode(
    files: Annotated[list[str] | None, typer.Argument(help="Files, folders or globs; without any, all sources of the recipe.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the store: new, or one to go on with.")] = Path("encoded"),
    model: Annotated[str | None, typer.Option(help="Directory of a model, whose encoder it is; by default the recipe's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe (name or YAML): its model's encoder, and its sources.")] = None,
    image_root: ImageRoot = None,
    columns: Columns = None,
    allow_urls: AllowUrls = False,
    dtype: Annotated[
        str, typer.Option(help="bfloat16: 2 bytes a number. float32: 4 bytes, and exactly the encoder's values.")
    ] = "bfloat16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are encoded at once.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that read and decode; by default all cores.")] = None,
    device: Device = None,
) -> None:
    """Encode every image of a data set once; training reads the result (data.encoded) and never loads the encoder.

    Exit code 0 if all is encoded, 1 if images or rows were broken (the others are encoded), 2 if the input is refused.
    The same command goes on where an earlier one stopped. On N GPUs: torchrun --nproc-per-node=N --no-python metamorph data encode ...
    """
    check_input("metamorph data encode", files, recipe, image_root, columns, allow_urls)
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"{dtype!r} but bfloat16 or float32 was expected (--dtype). Take one of them.")
    check_target(out, "--out", directory=True)
    quiet_libraries()
    from rich.console import Console

    config = load_run(recipe)
    chosen = _encoder(model, config)
    sources = _open(files, config, image_root, parse_columns(columns), allow_urls)
    console, first = Console(stderr=True), int(os.environ.get("RANK", "0")) == 0
    try:
        with _ended_like_an_interrupt():
            result = _run(sources, chosen, out, dtype, batch_size, threads, device, console)
    except KeyboardInterrupt:
        if first:
            command = " ".join(map(quote, ["metamorph", *sys.argv[1:]]))
            told = f"\nStopped. What was encoded so far is kept in {out}. The same command goes on: {command}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if first:
        _report(result, out, console)
    if result.broken:
        raise typer.Exit(EXIT_PROBLEMS)


def _encoder(model: str | None, config: RunConfig | None) -> ModelConfig:
    from metamorph.training.config import ModelConfig

    if model is not None:
        return ModelConfig(start=model)
    if config is None or config.model is None:
        raise ConfigError("no model but --model, or --recipe, is needed (metamorph data encode). Name the model that will be trained.")
    return config.model


def _open(
    files: list[str] | None, config: RunConfig | None, image_root: Path | None, columns: dict[str, str], allow_urls: bool
) -> list[ExampleSource]:
    from metamorph.data.source import open_source

    if files:
        root = None if image_root is None else str(image_root)
        return [open_source(file, image_root=root, columns=columns, allow_urls=allow_urls, needs_answer=False) for file in files]
    assert config is not None
    return [source for source, _ in sources_of(config)]


def _run(
    sources: list[ExampleSource],
    config: ModelConfig,
    out: Path,
    dtype: Any,
    batch_size: int,
    threads: int | None,
    device: str | None,
    console: Console,
) -> EncodingProgress:
    from metamorph.training.device import pick_device, processes, rank, world_size
    from metamorph.training.encoding import encode_images, encoder_of, spec_of

    kind: StoreType = dtype
    place = pick_device(device or "auto")  # pyright: ignore[reportArgumentType]  # refuses what it does not know
    with processes(place):
        files = encoder_of(config)
        spec = spec_of(files)
        encoder = files.load().to(place)
        if rank() == 0:
            told = f"{spec.num_visual_tokens} visual tokens of width {spec.width} per image, encoder {spec.fingerprint}, on {place}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        with _shown(console if rank() == 0 else None) as on_round:
            return encode_images(
                sources,
                lambda pixels: encoder(pixels.to(place, non_blocking=True)),
                files.processor.prepare_image,
                spec,
                out,
                dtype=kind,
                batch_size=batch_size,
                round_size=max(16 * batch_size, 256),
                threads=threads or max(1, cores() // world_size()),
                on_round=on_round,
            )


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """Let the signal by which launchers end their processes do what Ctrl-C does: keep what was encoded."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _shown(console: Console | None) -> Iterator[Any]:
    """Progress by rows, with images per second and the time that is left: a bar on a terminal, elsewhere a line every few seconds."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if console is None:
        yield None
        return
    if not console.is_terminal:
        last = [time.monotonic()]

        def line(progress: EncodingProgress) -> None:
            if time.monotonic() - last[0] >= _SECONDS or progress.done == progress.rows:
                last[0] = time.monotonic()
                console.print(_line(progress), highlight=False, markup=False, soft_wrap=True)

        yield line
        return
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
        task = bar.add_task("rows", total=None, text="")
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.rows, text=_rate(progress))


def _rate(progress: EncodingProgress) -> str:
    broken = f", {progress.broken:,} broken" if progress.broken else ""
    return f"{progress.images:,} images, {progress.encoded / max(progress.seconds, 1e-9):,.1f} encoded/s{broken}"


def _line(progress: EncodingProgress) -> str:
    left = progress.seconds / max(progress.done, 1) * (progress.rows - progress.done)
    return f"{progress.done:,} of {progress.rows:,} rows, {_rate(progress)}, about {left:,.0f} s left"


def _report(result: EncodingProgress, out: Path, console: Console) -> None:
    from metamorph.reporting.tables import Table

    for fault in result.faults[:_SHOWN]:
        console.print(fault, highlight=False, markup=False, soft_wrap=True)
    if result.broken:
        told = f"{result.broken:,} broken rows or images, all of them in {out / 'faults.txt'}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    counts = (result.rows, result.images, result.unique, result.encoded, result.broken, result.bytes)
    rows = [[*(f"{count:,}" for count in counts), f"{result.seconds:,.1f}"]]
    show_table(Table(["rows", "images", "different", "encoded now", "broken", "bytes", "seconds"], rows))
    told = f"Train with: --set data.encoded={out}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
