"""A source of tiny conversations with images, named by dotted path in settings of test runs."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

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


def drawings(size: int = 60, colours: int = 60) -> Drawings:
    """The function that settings name."""
    return Drawings(size, colours)


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
