"""`metamorph train`: run a recipe, or say what it would do."""

from __future__ import annotations

import os
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from metamorph.cli.terminal import quiet_libraries
from metamorph.errors import ConfigError, MetaMorphError
from metamorph.places import check_target

if TYPE_CHECKING:
    from rich.console import Console

    from metamorph.training.config import RunConfig
    from metamorph.training.plan import StagePlan


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("train")(train)


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe (see --list), or a YAML file with the fields of RunConfig.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="field=value, with a dotted path: --set stages.0.training.steps=100. May be repeated.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where the run is written; by default runs/<name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that directory.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Show the recipes and leave.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Open the data, say what would be trained, and leave.")] = False,
) -> None:
    """Train a recipe: its stages in sequence, in one run directory.

    On N GPUs of a machine: torchrun --nproc-per-node=N --no-python metamorph train RECIPE
    """
    from rich.console import Console

    from metamorph.recipes import load_recipe
    from metamorph.training.config import parse_assignments

    console, first = Console(), int(os.environ.get("RANK", "0")) == 0
    if list_recipes:
        _show_recipes(console)
        return
    if recipe is None:
        raise ConfigError("no recipe but a name or a YAML file is needed (metamorph train). See metamorph train --list.")
    changes = parse_assignments(assignments or [])
    config = load_recipe(recipe).with_overrides(changes | ({"output_dir": output_dir} if output_dir is not None else {}))
    quiet_libraries()  # the run shows its own progress
    if dry_run:
        _show_plan(console, config)
        return

    from metamorph.training.run import run

    if resume and first and not (config.run_dir / "config.yaml").is_file():
        Console(stderr=True).print(f"nothing to go on with in {config.run_dir}: the run begins now", highlight=False, markup=False)
    try:
        result = run(config, resume=resume)
    except KeyboardInterrupt:
        if first:
            Console(stderr=True).print(f"\n{_stopped(config)}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if first:
        console.print(f"saved {result.model_dir} after {result.seconds:,.0f} s", highlight=False, markup=False, soft_wrap=True)


def _stopped(config: RunConfig) -> str:
    """What is left of a run that was interrupted, and how it goes on."""
    from metamorph.training.run import last_checkpoint

    settings, last = config.run_dir / "config.yaml", last_checkpoint(config)
    if last is None:
        return "Stopped before the first checkpoint (training.checkpoint_every): the same command begins anew."
    stage, step = last
    return f"Stopped. The last checkpoint is of stage {stage}, step {step}. Go on with: metamorph train {quote(str(settings))} --resume"


def _show_recipes(console: Console) -> None:
    from rich.table import Table

    from metamorph.recipes import RECIPES

    table = Table("recipe", "stages", "what it trains", box=None)
    for recipe in RECIPES:
        config = recipe()
        stages = ", ".join(f"{stage.name} ({_steps(stage.training.steps)})" for stage in config.stages)
        table.add_row(recipe.__name__, stages, config.description)
    console.print(table)


def _show_plan(console: Console, config: RunConfig) -> None:
    from rich.table import Table

    from metamorph.training.device import pick_device
    from metamorph.training.plan import plan
    from metamorph.training.rehearsal import rehearse

    check_target(config.run_dir, "output_dir", directory=True)
    device, *_ = (pick_device(stage.training.device).type for stage in config.stages)
    model, rehearsal = _empty(config), rehearse(config)
    console.print(f"{config.name}: {config.description}", markup=False)
    console.print(f"would be written to {config.run_dir}", markup=False, soft_wrap=True)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    console.print(f"device {device}, {processes} process{'' if processes == 1 else 'es'}")
    for stage in plan(rehearsal.config, model, processes):
        title = f"stage {stage.name}: {_steps(stage.steps)}"
        parts = Table("part", "parameters", "trained", title=title, title_justify="left", box=None)
        for name, (total, trained) in stage.parameters.items():
            parts.add_row(name, f"{total:,}", f"{trained:,}" if trained else "-")
        console.print(parts)
        for line in [*rehearsal.rows[stage.name], *_facts(stage)]:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _facts(stage: StagePlan) -> list[str]:
    rates = ", ".join(f"{rate:.3g} at step {step}" if step else f"peak {rate:.3g}" for step, rate in stage.learning_rates)
    tokens = f", at most {stage.tokens_per_step:,} tokens" if stage.tokens_per_step else ""
    return [
        f"{stage.sequences_per_step:,} sequences per step in {stage.micro_batches} micro-batches per process{tokens}",
        f"learning rate {rates}",
        f"memory of a process: at most about {stage.memory_bytes / 2**30:,.1f} GiB (weights, gradients, moments, activations)",
    ]


def _empty(config: RunConfig):  # a module of torch, which is not imported here
    from metamorph.recipes.shapes import empty_decoder, empty_model

    if config.model is not None:
        return empty_model(config.model)
    assert config.decoder is not None  # validated
    try:
        return empty_decoder(config.decoder)
    except MetaMorphError as error:
        raise type(error)(f"{error} A decoder's parts must be there for --dry-run too.") from error


def _steps(steps: int | None) -> str:
    return f"{steps:,} steps" if steps else "the data's epochs"
