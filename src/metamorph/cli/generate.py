"""`metamorph generate`: ask a model, print what it writes, save what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metamorph.cli import options
from metamorph.cli.terminal import quiet_libraries
from metamorph.errors import CheckpointError, ConfigError
from metamorph.places import CONFIG, check_source, check_target

if TYPE_CHECKING:
    from metamorph.pipeline import MetaMorphPipeline, Reply

DRAWING_PROMPT = "Generate an image of {prompt}"
NOTHING_DRAWN = 3
"""Exit code when an image was asked for with -o and the model drew none."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("generate")(run)


def run(
    prompt: Annotated[str, typer.Argument(help="A question, an instruction, or with -o simply what to draw.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to save the image: star.png, then star-2.png and so on.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to show to the model; may be repeated.")] = None,
    model: options.Model = None,
    decoder: options.Decoder = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, also with -o.")] = False,
    seed: options.Seed = 0,
    temperature: options.Temperature = 0.0,
    max_new_tokens: options.MaxNewTokens = 256,
    steps: options.Steps = 10,
    guidance: options.Guidance = 1.0,
    device: options.Device = None,
    keep_prompt: options.KeepPrompt = False,
    no_metadata: options.NoMetadata = False,
) -> None:
    """Ask a model: it answers with text, an image, or both, as it sees fit.

    With -o a bare description is drawn: `metamorph generate "a small red star at the top left" -o star.png` sends
    "Generate an image of a small red star at the top left". Sent as they are: prompts with --image (questions and edits), with --raw,
    without -o, or that already begin with "generate" or "draw".

    A PNG, JPEG or WebP says in its metadata which model drew it, from which seed and how.
    """
    from metamorph.messages import Message

    if output is not None:
        check_output(output)
    pipeline = load(model, decoder, device, needs_decoder=output is not None)
    words = drawing_prompt(prompt) if output is not None and not raw and not image else prompt
    question = Message.user(*(image or []), words)
    settings = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    reply = pipeline(question, seed=seed, steps=steps, guidance_scale=guidance, keep_prompt=keep_prompt, **settings)
    _show(reply, output, metadata=not no_metadata)


def drawing_prompt(prompt: str) -> str:
    """The instruction that draws a bare description; an instruction stays as it is."""
    first_word = prompt.split(maxsplit=1)[0].lower() if prompt.strip() else ""
    return prompt if first_word in ("generate", "draw") else DRAWING_PROMPT.format(prompt=prompt)


def image_paths(output: Path, count: int) -> list[Path]:
    """`star.png`, `star-2.png`, `star-3.png`, ..."""
    return [output if number == 1 else output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]


def check_output(output: Path, asked_by: str = "-o") -> None:
    """Refuse a path to which no image can be saved, before anything is computed.

    Raises:
        ConfigError: a directory, a suffix that is no image format, or a place that cannot be written.
    """
    from PIL import Image

    if output.is_dir():
        raise ConfigError(f"a directory but a file name is needed ({asked_by} {output}). Add a name such as star.png.")
    formats = Image.registered_extensions()
    if formats.get(output.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"suffix {output.suffix!r} but an image format is needed ({asked_by} {output}). Use .png.")
    check_target(output, asked_by)


def load(model: str | None, decoder: str | None, device: str | None, *, needs_decoder: bool) -> MetaMorphPipeline:
    """The pipeline of a model directory, or of the shipped model.

    Raises:
        CheckpointError: a directory that does not exist, or a decoder that is needed but missing.
        ConfigError: there is no such device.
    """
    quiet_libraries()
    from metamorph.pipeline import MetaMorphPipeline, find_decoder

    if model is None:
        from metamorph.microworld.components import shipped

        model, decoder = str(shipped("metamorph")), decoder or str(shipped("decoder"))
    check_source(model, "a MetaMorph checkpoint", index=CONFIG, owned=True)
    place = decoder or find_decoder(model)
    if needs_decoder and place is None:
        found = "no decoder" if Path(model).is_dir() else "no such directory, and on the hub no decoder,"
        raise CheckpointError(f"{found} but -o needs one ({model}). Give --decoder DIR, or the directory of a model that has one.")
    return MetaMorphPipeline.from_pretrained(model, place or False, device=device)


def _show(reply: Reply, output: Path | None, *, metadata: bool) -> None:
    """Print the text, save the images, say where; leave with `NOTHING_DRAWN` if an image was asked for and there is none."""
    if reply.text:
        typer.echo(reply.text)
    drawn = len(reply.visual_tokens)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, image in zip(image_paths(output, len(reply.images)), reply.images, strict=True):
            image.save(path, metadata=metadata)
            typer.echo(f"saved {path} ({image.width}x{image.height})", err=True)
        if not drawn:
            typer.echo("The model drew no image. Ask for one, for instance: Generate an image of ...", err=True)
            raise typer.Exit(NOTHING_DRAWN)
    elif drawn:
        typer.echo(f"The model drew {drawn} image(s). Give -o star.png to keep them.", err=True)
    if reply.reason != "eos":
        typer.echo(f"The answer was cut ({reply.reason}). Raise --max-new-tokens for a longer one.", err=True)
