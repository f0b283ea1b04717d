"""`metamorph push`: publish a model's directory on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("push")(run)


def run(
    directory: Annotated[Path, typer.Argument(help="Directory of a model; a decoder in its folder `decoder` goes with it.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="For you alone, if the repository is new.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Upload MetaMorph",
) -> None:
    """Upload model, processor, decoder and card in one commit, and no other file. Log in before: hf auth login.

    A card that you wrote, here or on the hub, stays as it is. One that metamorph wrote tells of training and results only if it is about
    these weights.
    """
    from metamorph.model.hub import push_directory

    typer.echo(push_directory(directory, repo_id, private=private or None, commit_message=message))
