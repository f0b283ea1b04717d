"""In which order examples are drawn from several sources: a pure function of the seed, with a state of a few numbers.

Shuffling is a keyed permutation computed index by index, so that sixteen million rows cost no memory and any position can be resumed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from metamorph.errors import CheckpointError, ConfigError
from metamorph.messages import Example


@runtime_checkable
class ExampleSource(Protocol):
    """Rows that are examples; `source[i]` gives the same example whenever and wherever it is asked."""

    @property
    def name(self) -> str:
        """How errors and tables call the source."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


Order: TypeAlias = Literal["epoch", "infinite"]


@dataclass(frozen=True)
class WeightedSource:
    """A source and how often it is drawn."""

    source: ExampleSource
    weight: float = 1.0
    """Its share of all draws, relative to the other sources' weights (order "infinite")."""
    repeats: float = 1.0
    """Passes over it in each epoch: 1 = every row once, 0.5 = a random half, another one each epoch (order "epoch")."""
    loss_weight: float = 1.0
    """Multiplies the loss weight of its examples."""
    max_examples: int | None = None
    """Only so many of its rows, the same in every pass: a random subset, chosen by the mixture's seed."""


@dataclass(frozen=True)
class Subset:
    """So many rows of a source, in an order of their own: a random choice that depends on `key` only and takes no memory."""

    whole: ExampleSource
    size: int
    key: int

    @property
    def name(self) -> str:
        """The source's."""
        return self.whole.name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        """Row `index` of the subset.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} but 0 to {self.size - 1} exist (subset of {self.name})")
        return self.whole[self.row(index)]

    def row(self, index: int) -> int:
        """Which row of the whole source this is."""
        return shuffled(index, len(self.whole), self.key)


class Draw(NamedTuple):
    """One example by number: which source, and which row of it."""

    source: int
    index: int

    def reference(self) -> list[int]:
        """By which `reread` finds it again; plain JSON values."""
        return list(self)


class Share(NamedTuple):
    """What one rank reads in a step: its draws, of which the last `blanks` are there for their shape only."""

    draws: Sequence[Any]
    blanks: int


class Place(NamedTuple):
    """A place in the order of a mixture: draws made, in all and of each source."""

    position: int
    counts: tuple[int, ...]


class Mixture:
    """An order over the rows of several sources, deterministic in `seed`.

    `order="epoch"`, the paper's: all sources concatenated and shuffled, each as often as its `repeats` say. It ends after `epochs`.
    `order="infinite"`: each draw picks a source at random in proportion to the weights; within a source, rows come in shuffled passes,
    each row once per pass. It never ends.

    Raises:
        ConfigError: no sources, two of one name, an empty source, or a number that is not above 0.
    """

    is_of_one_rank = False  # all ranks follow the same order, each a part of it

    def __init__(
        self,
        sources: Sequence[WeightedSource],
        *,
        seed: int,
        order: Order = "epoch",
        epochs: int = 1,
    ) -> None:
        _check(sources, epochs)
        self.seed, self.order, self.epochs = seed, order, epochs
        self.sources = tuple(_capped(entry, _key(seed, number, _CAP)) for number, entry in enumerate(sources))
        self._lengths = [len(entry.source) for entry in self.sources]
        self._cumulative = list(accumulate(entry.weight for entry in sources))
        self._ends = list(accumulate(max(1, round(entry.repeats * n)) for entry, n in zip(sources, self._lengths, strict=True)))
        self._position = 0
        self._counts = [0] * len(sources)

    @property
    def epoch_length(self) -> int:
        """Examples per epoch, were the order "epoch"; from it follows the number of steps."""
        return self._ends[-1]

    def draw(self, number: int) -> list[Draw]:
        """The next `number` draws; fewer, in the end none, when the last epoch ends."""
        if self.order == "epoch":
            number = min(number, self.epochs * self.epoch_length - self._position)
        return [self._next() for _ in range(number)]

    def share(self, number: int, rank: int, world_size: int) -> Share:
        """A rank's part of the next `number` draws: every `world_size`-th. Ranks at the end of the line may come short by one draw."""
        draws = self.draw(number)
        own = draws[rank::world_size]
        blanks = -(-len(draws) // world_size) - len(own)
        return Share(own + draws[:blanks], blanks)

    def reread(self, references: Sequence[Sequence[int]]) -> Iterator[Draw]:
        """Draws that were made before."""
        return (Draw(*reference) for reference in references)

    def example(self, draw: Draw) -> Example:
        """The drawn example, its weight multiplied by its source's `loss_weight`."""
        entry = self.sources[draw.source]
        example = entry.source[draw.index]
        return example if entry.loss_weight == 1.0 else replace(example, weight=example.weight * entry.loss_weight)

    def row(self, draw: Draw) -> int:
        """Which row of the whole source was drawn, its cap aside."""
        source = self.sources[draw.source].source
        return source.row(draw.index) if isinstance(source, Subset) else draw.index

    @property
    def place(self) -> Place:
        """Where the order stands."""
        return Place(self._position, tuple(self._counts))

    def state_dict(self, place: Place | None = None) -> dict[str, Any]:
        """Where the order stands (or stood, at `place`), and of what it is the order; plain JSON values."""
        position, counts = place or self.place
        return {"position": position, "counts": list(counts), "mixture": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another mixture of the same sources, weights, seed and order stood.

        Raises:
            CheckpointError: it was another mixture.
        """
        ours, theirs = self._fingerprint(), state["mixture"]
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"a state of {name} {theirs.get(name)} but this mixture has {ours.get(name)} (resuming the data order). "
                    "Resume with the same data, or start a new run."
                )
        self._position, self._counts = state["position"], list(state["counts"])

    def _fingerprint(self) -> dict[str, Any]:
        named = "repeats" if self.order == "epoch" else "weights"
        rates = [entry.repeats if self.order == "epoch" else entry.weight for entry in self.sources]
        caps = [entry.max_examples for entry in self.sources]
        facts = {"sources": [entry.source.name for entry in self.sources], "lengths": [_whole_length(entry) for entry in self.sources]}
        facts |= {named: rates, "seed": self.seed, "order": self.order}
        return facts | {"max_examples": caps} if any(caps) else facts

    def _next(self) -> Draw:
        position, self._position = self._position, self._position + 1
        if self.order == "epoch":
            return self._of_epoch(*divmod(position, self.epoch_length))
        source = pick(self._cumulative, self.seed, position)
        count, self._counts[source] = self._counts[source], self._counts[source] + 1
        passes, offset = divmod(count, self._lengths[source])
        return Draw(source, shuffled(offset, self._lengths[source], _key(self.seed, source, passes)))

    def _of_epoch(self, epoch: int, offset: int) -> Draw:
        place = shuffled(offset, self.epoch_length, _key(self.seed, epoch))
        source = bisect_right(self._ends, place)
        copy, row = divmod(place - (self._ends[source - 1] if source else 0), self._lengths[source])
        return Draw(source, shuffled(row, self._lengths[source], _key(self.seed, epoch, source, copy)))


def mean_length(
    source: ExampleSource, encode: Callable[[Example], Sized], sample: int, *, leave_out: tuple[type[Exception], ...] = ()
) -> float:
    """Mean positions of a source's examples, from `sample` rows (all, if there are no more) chosen at random, the same ones each time.

    Rows that raise an error of `leave_out` do not count.

    Raises:
        MetaMorphError: as `encode`, of a row that cannot be used.
        ConfigError: no row of the sample can be used.
    """
    lengths = []
    for index in range(min(sample, len(source))):
        try:
            lengths.append(len(encode(source[shuffled(index, len(source), _key(len(source)))])))
        except leave_out:
            continue
    if not lengths:
        raise ConfigError(f"0 usable rows of {sample} but a mean length is needed (source {source.name}). State mean_tokens.")
    return sum(lengths) / len(lengths)


def pick(cumulative: Sequence[float], *key: int) -> int:
    """One of several by chance, which `key` decides, in proportion to weights that are given as their running sums."""
    point = _mix(_key(*key)) / 2**64 * cumulative[-1]
    return min(bisect_right(cumulative, point), len(cumulative) - 1)


def shuffled(index: int, size: int, key: int) -> int:
    """The image of `index` under a permutation of range(size) chosen by `key` (a Feistel cipher that walks until it lands inside)."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(right + key + turn * _GOLDEN) & mask)
        index = (left << half) | right
        if index < size:
            return index


_CAP = 0xCA9  # keeps the key of a source's subset apart from those of its passes
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def _mix(value: int) -> int:
    """A well-mixed 64-bit hash of a number (the finaliser of SplitMix64)."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _key(*numbers: int) -> int:
    """One key from several numbers, in which their order counts."""
    key = _GOLDEN
    for number in numbers:
        key = _mix(key + _mix(number + _GOLDEN))
    return key


def _capped(entry: WeightedSource, key: int) -> WeightedSource:
    """The same with the rows that its cap leaves."""
    if entry.max_examples is None or entry.max_examples >= len(entry.source):
        return entry
    return replace(entry, source=Subset(entry.source, entry.max_examples, key))


def _whole_length(entry: WeightedSource) -> int:
    return len(entry.source.whole) if isinstance(entry.source, Subset) else len(entry.source)


def _check(sources: Sequence[WeightedSource], epochs: int) -> None:
    if not sources:
        raise ConfigError("0 sources but at least 1 is needed (mixture). Name a source.")
    if epochs < 1:
        raise ConfigError(f"{epochs} epochs but at least 1 is needed (mixture). Raise the number.")
    names = [entry.source.name for entry in sources]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        found = f"{names.count(repeated)} sources called {repeated!r}"
        raise ConfigError(f"{found} but losses and bad rows are told by name (mixture). Give each its own, such as kwargs: {{name: ...}}.")
    for entry in sources:
        place = f"source {entry.source.name}"
        if len(entry.source) == 0:
            raise ConfigError(f"0 examples but at least 1 is needed ({place}). Fill the source or leave it out.")
        for name in ("weight", "repeats", "loss_weight", "max_examples"):
            value = getattr(entry, name)
            if value is None or 0 < value < float("inf") or (name == "loss_weight" and value == 0):
                continue
            raise ConfigError(f"{name} {value} but a number above 0 is needed ({place}). Leave the source out instead.")
