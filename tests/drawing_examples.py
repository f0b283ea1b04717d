"""A source of tiny conversations with images, named by dotted path in settings of test runs."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from metamorph.errors import RecordError
from metamorph.messages import Example, Message


@dataclass(frozen=True)
class Drawings:
    """Plain coloured squares: asked about, drawn on request, or not there at all, in turns; `colours` different ones."""

    size: int
    colours: int
    name: str = "drawings"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        colour = np.random.default_rng(index % self.colours).integers(0, 256, 3, dtype=np.uint8)
        image = Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy())
        turns = (
            (Message.user(image, "red?"), Message.assistant("yes" if colour[0] > 128 else "no")),
            (Message.user("draw it"), Message.assistant("here: ", image)),
            (Message.user("hello"), Message.assistant("hello to you too")),
        )
        return Example(turns[index % 3], f"drawing-{index}", self.name)


@dataclass(frozen=True)
class OneKind:
    """Conversations of one kind, "talk", "read", "draw" or "chat" (two exchanges), of different lengths.

    Every `broken_every`-th row cannot be read.
    """

    kind: str
    size: int
    broken_every: int

    @property
    def name(self):
        return self.kind

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        place = f"{self.kind}.jsonl:{index + 1}"
        if self.broken_every and index % self.broken_every == 1:
            raise RecordError(f"a broken row but a good one is needed ({place}). Repair it.")
        image = Image.new("RGB", (32, 32), (index * 37 % 256, index * 91 % 256, 60))
        words = "ab " * (index * 5 % 11)
        turns = {
            "talk": (Message.user("say " + words), Message.assistant(words + "yes")),
            "read": (Message.user(image, "what? " + words), Message.assistant("red")),
            "draw": (Message.user("draw " + words), Message.assistant("here", image, image)),
            "chat": (Message.user("say"), Message.assistant("yes"), Message.user("say " + words), Message.assistant(words + "yes")),
        }
        return Example(turns[self.kind], f"{self.kind}-{index}", self.kind, origin=place)


def one_kind(kind: str, size: int = 40, broken_every: int = 0) -> OneKind:
    """The function that settings name."""
    return OneKind(kind, size, broken_every)


def drawings(size: int = 60, colours: int = 60) -> Drawings:
    """The function that settings name."""
    return Drawings(size, colours)


@dataclass(frozen=True)
class Pictures(Drawings):
    """Only rows that hold a picture."""

    def __getitem__(self, index):
        return super().__getitem__(3 * index)


def pictures(size: int = 12, colours: int = 60) -> Pictures:
    """The function that settings of a decoder name."""
    return Pictures(size, colours)


def decoder_batches(encode, size: int, seed: int, *, side: int = 16):
    """Plain pictures of `side` pixels, and the visual tokens of the same at the encoder's 32 pixels."""
    import torch

    from metamorph.decoder import DecoderBatch
    from metamorph.decoder.batches import image_seeds

    def make(step: int) -> DecoderBatch:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        pixels = torch.rand(size, 3, 1, 1, generator=generator) * 2 - 1
        shown, read = (pixels.expand(-1, -1, one, one).contiguous() for one in (side, 32))
        return DecoderBatch(pixels=shown, seeds=image_seeds(seed, step, size), tokens=encode(read))

    return make
