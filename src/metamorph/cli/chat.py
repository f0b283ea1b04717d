"""`metamorph chat`: talk with a model in the terminal; what it draws is saved as it comes, and read again from its own tokens."""

from __future__ import annotations

import glob
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metamorph.cli import options
from metamorph.cli.generate import check_output, load
from metamorph.cli.terminal import quiet_libraries
from metamorph.errors import MetaMorphError

if TYPE_CHECKING:
    from PIL import Image

    from metamorph.messages import ImagePart, Message
    from metamorph.pipeline import MetaMorphPipeline, PipelineEvent
    from metamorph.provenance import Drawing

HELP = """\
/image PATH    attach an image to your next message (several are fine, one line each; PATH may have spaces)
/save NAME.png save the last drawing under a name of your own
/seed N        the seed of the next answers; same seed, same answer
/reset         forget the conversation
/help          this text
/quit          leave, as Ctrl-D does
Ctrl-C stops an answer; the conversation then stands as before the question. Anything else is said to the model."""

COMMANDS = ("/image", "/save", "/seed", "/reset", "/help", "/quit")
PREVIEW_WIDTH = 32
"""Characters; a character shows two pixels, one above the other."""


@dataclass
class Chat:
    """A conversation and what belongs to it."""

    pipeline: MetaMorphPipeline
    folder: Path
    seed: int
    settings: dict[str, Any]
    metadata: bool = True
    previews: bool = False
    messages: list[Message] = field(default_factory=list)
    attached: list[ImagePart] = field(default_factory=list)  # to the next message
    last: Drawing | None = None
    num_saved: int = 0

    def say(self, line: str) -> bool:
        """Do what a line asks for; False to leave. What is refused is said in one line, and nothing is lost.

        Ctrl-C while it answers stops the answer only.
        """
        try:
            if line.startswith("/"):
                return self._command(line)
            if line.strip() or self.attached:
                self._ask(line.strip())
        except (MetaMorphError, OSError) as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
        except KeyboardInterrupt:
            typer.echo("\nStopped; the question is forgotten.", err=True)
        return True

    def _ask(self, text: str) -> None:
        """Put the question, show the answer while it comes, keep both if it was not stopped."""
        from metamorph.messages import Message
        from metamorph.model.events import message_of
        from metamorph.pipeline import Picture

        question = Message.user(*self.attached, *([text] if text else []))
        events: list[Any] = []
        for event in self.pipeline.stream([*self.messages, question], seed=self.seed, **self.settings):
            self._show(event)
            if not isinstance(event, Picture):  # the message keeps what was said, visual tokens; pixels were only shown
                events.append(event)
        answer = message_of(events)
        if not answer.parts:
            typer.echo("The model said nothing; the question is forgotten.", err=True)
            return
        self.messages += [question, answer]
        self.attached = []

    def _show(self, event: PipelineEvent) -> None:
        from metamorph.model.events import End, ImageEnd, TextDelta
        from metamorph.pipeline import Picture

        if isinstance(event, TextDelta):
            typer.echo(event.text, nl=False)
            sys.stdout.flush()
        elif isinstance(event, Picture):
            self._keep(event.image)
        elif isinstance(event, ImageEnd) and self.pipeline.decoder is None:
            typer.echo("\n[drew an image, but there is no decoder to show it: --decoder DIR]")
        elif isinstance(event, End):
            typer.echo()
            if event.reason != "eos":
                typer.echo(f"The answer was cut ({event.reason}). Raise --max-new-tokens, or /reset for a new conversation.", err=True)

    def _keep(self, drawing: Drawing) -> None:
        """Save a drawing under the next free name, and show it if the terminal can."""
        self.last = drawing
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._next_path()
        drawing.save(path, metadata=self.metadata)
        typer.echo(f"\n[saved {path}]")
        if self.previews:
            for row in preview(drawing):
                typer.echo(row)

    def _next_path(self) -> Path:
        while True:
            self.num_saved += 1
            path = self.folder / f"drawing-{self.num_saved}.png"
            if not path.exists():
                return path

    def _command(self, line: str) -> bool:
        name, argument = split_command(line)
        if name not in COMMANDS or bool(argument) != (name in ("/image", "/save", "/seed")):
            typer.echo(f"{line!r} is no command. /help lists them; begin with a space to say it to the model.", err=True)
        elif name == "/image":
            self._attach(existing_path(argument))
        elif name == "/save":
            self._save(Path(os.path.expanduser(argument)))
        elif name == "/seed":
            self._reseed(argument)
        elif name == "/reset":
            self.messages, self.attached = [], []
            typer.echo("A new conversation.")
        elif name == "/help":
            typer.echo(HELP)
        return name != "/quit"

    def _attach(self, path: Path) -> None:
        from metamorph.media import open_image
        from metamorph.messages import ImagePart

        image = open_image(path)
        self.attached.append(ImagePart(image))
        count = len(self.attached)
        typer.echo(f"[{path.name}: {image.width} x {image.height}, with your next message{f'; {count} images' if count > 1 else ''}]")

    def _save(self, path: Path) -> None:
        if self.last is None:
            typer.echo("Nothing was drawn yet. Ask for a picture, for instance: Draw a red star.", err=True)
            return
        check_output(path, "/save")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last.save(path, metadata=self.metadata)
        typer.echo(f"[saved {path}]")

    def _reseed(self, number: str) -> None:
        try:
            self.seed = int(number)
        except ValueError:
            typer.echo(f"{number!r} but a whole number is needed (/seed). The seed stays {self.seed}.", err=True)


def split_command(line: str) -> tuple[str, str]:
    """A command's name and the rest of its line as one argument: a path may have spaces and backslashes. Quotation marks around it go."""
    name, argument = [*line.strip().split(maxsplit=1), ""][:2]
    quoted = len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\""
    return name, argument[1:-1] if quoted else argument


def existing_path(text: str) -> Path:
    """The path as it is written; if only the shell's spelling of it exists, as terminals paste a file that is dropped on them, that one."""
    path, shells = (Path(os.path.expanduser(one)) for one in (text, re.sub(r"\\(.)", r"\1", text)))
    return shells if shells.exists() and not path.exists() else path


def completions(line: str) -> list[str]:
    """The lines that the tab key may make of a line: names of commands, then paths where a command takes one."""
    name, space, rest = line.partition(" ")
    if not space:
        return [f"{command} " for command in COMMANDS if command.startswith(line)]
    paths = sorted(glob.glob(f"{glob.escape(rest)}*")) if name in ("/image", "/save") else []
    return [f"{name} {path}" for path in paths]


def preview(image: Image.Image, width: int = PREVIEW_WIDTH) -> Iterator[str]:
    """A picture as lines of half blocks in 24-bit colours: the upper pixel in front, the lower one behind."""
    height = max(2, round(width * image.height / image.width / 2) * 2)
    pixels: Any = image.convert("RGB").resize((width, height)).load()
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            upper, lower = (";".join(map(str, pixels[x, row])) for row in (y, y + 1))
            cells.append(f"\x1b[38;2;{upper};48;2;{lower}m\N{UPPER HALF BLOCK}")
        yield "".join(cells) + "\x1b[0m"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("chat")(run)


def run(
    model: options.Model = None,
    decoder: options.Decoder = None,
    folder: Annotated[Path, typer.Option(help="Where drawings are saved as they come.")] = Path("drawings"),
    image: Annotated[list[Path] | None, typer.Option(help="An image for the first message; may be repeated.")] = None,
    seed: options.Seed = 0,
    temperature: options.Temperature = 0.0,
    max_new_tokens: options.MaxNewTokens = 256,
    steps: options.Steps = 10,
    guidance: options.Guidance = 1.0,
    device: options.Device = None,
    keep_prompt: options.KeepPrompt = False,
    no_metadata: options.NoMetadata = False,
) -> None:
    """Talk with a model: it answers with text and images, and reads again what it drew. /help lists the commands.

    Lines may also come from a file or a pipe, one message each: metamorph chat < messages.txt
    """
    quiet_libraries()
    from metamorph.model.state import DecodingOptions

    decoding = DecodingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
    chat = Chat(
        pipeline=load(model, decoder, device, needs_decoder=False),
        folder=folder,
        seed=seed,
        settings={"options": decoding, "steps": steps, "guidance_scale": guidance, "keep_prompt": keep_prompt},
        metadata=not no_metadata,
        previews=_shows_colours(),
    )
    for path in image or []:
        chat.say(f'/image "{path}"')
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 must not end the chat
    interactive = sys.stdin.isatty()
    if interactive:
        _complete_paths()
        typer.echo("Ask, or ask for a picture. /help lists the commands, Ctrl-D leaves.", err=True)
    for line in _lines(interactive):
        if not chat.say(line):
            break


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, or what comes through a pipe, line by line until its end."""
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:  # at the prompt: forget the half-typed line
            typer.echo()
            continue
        if not interactive and not line:
            return
        yield line.rstrip()


def _shows_colours() -> bool:
    """Whether stdout is a terminal with 24-bit colours, as rich finds."""
    from rich.console import Console

    return Console().color_system == "truecolor"


def _complete_paths() -> None:
    """Complete commands and paths with the tab key, where the interpreter has readline."""
    try:
        import readline
    except ImportError:  # Windows
        return

    def complete(line: str, state: int) -> str | None:
        found = completions(line)
        return found[state] if state < len(found) else None

    readline.set_completer_delims("")  # whole lines: a path may have spaces
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
