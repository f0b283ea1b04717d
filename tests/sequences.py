"""Small sources, token sequences and streams for the tests of data; importable, so that worker processes can have them too."""

from dataclasses import dataclass, replace

import torch

from metamorph.batch import IGNORE_INDEX, TokenSequence
from metamorph.data.mixture import Mixture, WeightedSource, shuffled
from metamorph.data.stream import BatchStream
from metamorph.errors import MediaError
from metamorph.messages import Example, Message


@dataclass(frozen=True)
class Numbers:
    """A source whose row i says i."""

    name: str
    length: int

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Example((Message.user(str(index)), Message.assistant("yes")), f"{self.name}-{index}", self.name, weight=2.0)


def sequence(number=0, *, before=2, images=(), after=2, k=2, side=4, width=3, weight=1.0):
    """Text, then images between `<start>` (id 1) and `<end>` (id 2), then text that is a target; values tell whose they are.

    `images` holds "pixels" or "tokens" for the user's and "drawn" for the assistant's images.
    """
    base = 1000 * (number + 1)
    visual = [False] * before
    ids = [base + i for i in range(before)]
    for _ in images:
        ids += [1, *[3] * k, 2]
        visual += [False, *[True] * k, False]
    answer = len(ids)
    ids += [base + answer + i for i in range(after)]
    visual += [False] * after
    labels = [IGNORE_INDEX] * answer + ids[answer:]
    from_pixels = torch.tensor([kind != "tokens" for kind in images], dtype=torch.bool)
    given = any(kind == "tokens" for kind in images)
    return TokenSequence(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        is_visual=torch.tensor(visual),
        pixel_values=base + torch.arange(int(from_pixels.sum())).float().reshape(-1, 1, 1, 1).expand(-1, 3, side, side).clone(),
        visual_tokens=-base - torch.arange(len(images)).float().reshape(-1, 1, 1).expand(-1, k, width).clone() if given else None,
        from_pixels=from_pixels,
        visual_targets=torch.tensor([kind == "drawn" for kind in images], dtype=torch.bool),
        id=f"s{number}",
        source=f"source{number % 2}",
        weight=weight,
    )


def same(a, b):
    """Equality of two sequences in everything that counts; tokens of images that come as pixels do not."""
    for name in ("input_ids", "labels", "is_visual", "pixel_values", "from_pixels", "visual_targets"):
        if not torch.equal(getattr(a, name), getattr(b, name)):
            return False
    if not a.from_pixels.all():
        if a.visual_tokens is None or b.visual_tokens is None:
            return False
        if not torch.equal(a.visual_tokens[~a.from_pixels], b.visual_tokens[~b.from_pixels]):
            return False
    return (a.id, a.source, a.weight) == (b.id, b.source, b.weight)


def encode(example):
    """Sequences of several shapes, from rows of `Numbers`."""
    number = int(example.messages[0].text)
    return sequence(number, before=1 + number % 5, images=("drawn", "pixels")[: number % 3])


def refuse(example):
    """An encoder that dislikes row 3."""
    if example.messages[0].text == "3":
        raise MediaError("a broken image")
    return encode(example)


def refuse_many(example):
    """An encoder that dislikes every row that ends in 3 or 4."""
    if example.messages[0].text[-1] in "34":
        raise MediaError("a broken image")
    return replace(encode(example), id=example.id, source=example.source)


def make_stream(encode=encode, *, length=40, seed=0, order="infinite", epochs=1, **options):
    """Six sequences per step from two sources, the second drawn half as often for its length."""
    rate = {"repeats" if order == "epoch" else "weight": 0.5}
    sources = [WeightedSource(Numbers("a", length)), WeightedSource(Numbers("b", 7), **rate)]
    return BatchStream(Mixture(sources, seed=seed, order=order, epochs=epochs), encode, **{"batch_size": 6, **options})


def realistic_length(number):
    """Lengths as in a mixture of chats and records of many images: 60% of 40 to 120, 30% of 150 to 300, 10% of 900 to 1,200 positions."""
    point = shuffled(number % 1009, 1009, 5) / 1009
    low, high = next(span for share, span in ((0.6, (40, 120)), (0.9, (150, 300)), (1.1, (900, 1200))) if point < share)
    return low + shuffled(number % 997, 997, 9) % (high - low + 1)
