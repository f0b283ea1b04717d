"""Options that several commands have, most of them `metamorph chat` and `metamorph generate`: one wording, one meaning."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Model: TypeAlias = Annotated[str | None, typer.Option(help="Directory of a model; by default the one that comes with the package.")]
Decoder: TypeAlias = Annotated[
    str | None, typer.Option(help="Directory of a decoder; by default `decoder` in the model's directory, or the shipped one.")
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the first that is there.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Same seed, same answers.")]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0 takes the likeliest token; higher values vary the answers.")]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="Longest answer, visual tokens included.")]
Steps: TypeAlias = Annotated[int, typer.Option(min=1, help="Denoising steps per image.")]
Guidance: TypeAlias = Annotated[float, typer.Option(help="Guidance scale of the decoder; 1 is without.")]
KeepPrompt: TypeAlias = Annotated[bool, typer.Option("--keep-prompt", help="Image files hold what was asked, not only its hash.")]
NoMetadata: TypeAlias = Annotated[bool, typer.Option("--no-metadata", help="Image files do not say how they were made.")]
