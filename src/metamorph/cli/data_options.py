"""What the commands of `metamorph data` share: options, sources from files or recipes, the processor that counts, progress."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from metamorph.errors import ConfigError

if TYPE_CHECKING:
    from metamorph.data.mixture import ExampleSource
    from metamorph.model.processing import MetaMorphProcessor
    from metamorph.training.config import RunConfig

STDOUT = "-"
"""The name by which `--json` means standard output."""
ImageRoot: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder to which paths of images are relative, and which they may not leave; by default the file's own.")
]
Columns: TypeAlias = Annotated[
    list[str] | None, typer.Option("--columns", help="ours=theirs: the file's name of a field, such as image=img. May be repeated.")
]
AllowUrls: TypeAlias = Annotated[bool, typer.Option("--allow-urls", help="Fetch images that are named by a URL.")]
Recipe: TypeAlias = Annotated[str | None, typer.Option(help="A recipe (name or YAML) whose processor and max_length hold.")]
ModelDir: TypeAlias = Annotated[str | None, typer.Option("--model", help="Directory of a model whose processor counts tokens.")]
Jobs: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Processes; by default 1 for a sample, and all cores for all rows.")]


@dataclass(frozen=True)
class Chosen:
    """The processor that was asked for, or why there is none."""

    processor: MetaMorphProcessor | None
    name: str = ""
    max_length: int | None = None
    why_not: str = ""


def check_input(
    command: str,
    files: Sequence[str] | None,
    recipe: str | None,
    image_root: Path | None,
    columns: Sequence[str] | None,
    allow_urls: bool,
) -> None:
    """Refuse a command without anything to read, and options for files where there are none.

    Raises:
        ConfigError: neither files nor a recipe; or options of files beside a recipe alone, which has such settings of its own.
    """
    if not files and recipe is None:
        raise ConfigError(f"no files but some, or --recipe, are needed ({command}). Name what training would read.")
    given = [("--image-root", image_root is not None), ("--columns", bool(columns)), ("--allow-urls", allow_urls)]
    if not files and (names := [name for name, is_given in given if is_given]):
        raise ConfigError(f"{', '.join(names)} but no files ({command}). The recipe says how its own are read.")


def parse_columns(assignments: Sequence[str] | None) -> dict[str, str]:
    """`["image=img"]` as a mapping.

    Raises:
        ConfigError: an assignment has no `=`.
    """
    columns = {}
    for assignment in assignments or ():
        ours, equals, theirs = assignment.partition("=")
        if not equals or not ours or not theirs:
            raise ConfigError(f"{assignment!r} but ours=theirs is expected (--columns). Write for example --columns image=img.")
        columns[ours] = theirs
    return columns


def load_run(recipe: str | None) -> RunConfig | None:
    """The recipe's settings, if one is named.

    Raises:
        ConfigError: there is no such recipe, or it trains a decoder, which reads no conversations.
    """
    if recipe is None:
        return None
    from metamorph.recipes import load_recipe

    config = load_recipe(recipe)
    if config.model is None:
        raise ConfigError(f"a recipe that trains a decoder but one with a model is needed ({recipe}). It names its batches itself.")
    return config


def choose_processor(model: str | None, config: RunConfig | None, max_length: int | None) -> Chosen:
    """The processor of `--model`, else of the recipe; the longest row by `--max-length`, else the recipe's, else the model's context.

    Raises:
        CheckpointError: there is none where one is named.
    """
    if model is not None:
        from metamorph.model.processing import MetaMorphProcessor

        processor = MetaMorphProcessor.from_pretrained(model)
        return Chosen(processor, model, max_length or _longest(config) or processor.max_length)
    if config is None or config.model is None:
        return Chosen(None, max_length=max_length)
    from metamorph.training.rehearsal import find_processor

    processor, why_not = find_processor(config.model)
    return Chosen(processor, config.name, max_length or _longest(config), why_not)


def _longest(config: RunConfig | None) -> int | None:
    """The largest limit of a recipe's stages, by which files that it does not name are judged."""
    return max((data.max_length for data in data_of(config)), default=None)


def data_of(config: RunConfig | None) -> list:  # of DataConfig, which is not imported here
    """The data settings of a recipe's stages."""
    stages = [] if config is None else [stage.data or config.data for stage in config.stages]
    return [data for data in stages if data is not None]


def sources_of(config: RunConfig, *, whole_files: bool = True, first: int = 0) -> Iterator[tuple[ExampleSource, int]]:
    """Every source of a recipe, once for each limit of length under which it is read.

    Args:
        config: the recipe's settings.
        whole_files: refuse broken files, as training does; off to see what is wrong with them, where the reader can leave it.
        first: rows of a stream that stand for it.

    Raises:
        MetaMorphError: one cannot be opened.
    """
    from metamorph.training.assembly import load_object, load_source

    told = {(repr(source.to_dict()), data.max_length): source for data in data_of(config) for source in data.sources}
    for (_, max_length), source in told.items():
        can_be = not whole_files and "whole_files" in signature(load_object(source.source)).parameters
        looser = {"kwargs": {**source.kwargs, "whole_files": False}} if can_be else {}
        yield load_source(source.model_copy(update=looser), first), max_length


def write_json(place: Path | None, values: Any) -> None:
    """What `--json` asks for: into a file, to stdout for `-`, nowhere without it. Names of files may be any bytes; they are escaped."""
    if place is None:
        return
    text = json.dumps(values, indent=1, ensure_ascii=False)
    if str(place) == STDOUT:
        typer.echo(text)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def shown_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone when it is done; on something that is no terminal, nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
