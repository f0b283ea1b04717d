"""`metamorph convert`: checkpoints of other code become models of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metamorph.cli.terminal import quiet_libraries
from metamorph.places import check_target


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("convert")(run)


def run(
    from_official: Annotated[Path, typer.Option(help="Folder of a checkpoint of the authors' code: config.json and safetensors.")],
    out: Annotated[Path, typer.Option(help="Directory for the model and, where a tokenizer is known, its processor.")],
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder, where the checkpoint does not hold it: a directory or a name on the hub.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer with chat template; by default the one in the folder.")] = None,
) -> None:
    """Convert a checkpoint of the authors' code: the same numbers under our names, checked against an empty model."""
    check_target(out, "--out", directory=True)
    quiet_libraries()
    from metamorph.model.official import convert_official

    config = convert_official(from_official, out, vision=vision, tokenizer=tokenizer)
    typer.echo(f"{out}: {config.num_visual_tokens} visual tokens per image.")
    if (out / "processor_config.json").is_file():
        typer.echo(f'Next: metamorph generate "What do you see?" --image FILE --model {out}')
    else:
        typer.echo(f"No tokenizer in {from_official}: model only. Give --tokenizer to talk to it.", err=True)
