"""Training from streams: rows that cannot be asked for by number, mixed by weight; each rank reads and encodes its own share.

A process reads its rows in one order and notes after each where it stands, so that a run resumes exactly, with as many ranks as before;
worker processes get rows that were read and do the rest: opening images, encoding, collating. Streams have no end here: an epoch of one
follows the other, each shuffled anew, on each rank when its own share has ended. A row that cannot be used leaves its step one sequence
shorter, for there is none to take its place; it has no number, and is known again in another epoch by what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from metamorph.data.faults import Fault
from metamorph.data.mixture import Order, Share, pick
from metamorph.data.records import RecordSettings, to_example
from metamorph.data.references import Roots
from metamorph.data.rows import FaultyRows, RawRow
from metamorph.data.skipping import BAD, BadRecord, encoded
from metamorph.data.source import FileSource, VideoOpener, check_settings
from metamorph.data.streaming import StreamedRows, stream_rows
from metamorph.data.video import VideoSampling, raise_or_log
from metamorph.errors import CheckpointError, ConfigError, RecordError
from metamorph.messages import Example

Item = TypeVar("Item")


@dataclass(frozen=True)
class StreamedSource:
    """What of a stream is read, and how its rows become examples. Nothing is opened before `rows` or `head` is asked for."""

    path: str | tuple[str, ...]
    name: str
    settings: RecordSettings
    split: str = "train"
    config: str | None = None
    block: int = 1000
    """Rows that are shuffled among themselves, and held in memory."""

    def rows(self, seed: int | None, rank: int = 0, world_size: int = 1) -> StreamedRows:
        """A rank's share of the rows; raises as `stream_rows`."""
        options = {"name": self.name, "split": self.split, "config": self.config, "block": self.block}
        return stream_rows(self.path, seed=seed, rank=rank, world_size=world_size, **options)

    def example(self, raw: RawRow) -> Example:
        """A row as an example.

        Raises:
            RecordError, MediaError: it is broken.
        """
        example = to_example(raw, self.settings, raise_or_log)
        assert example is not None, "a fault that leaves no example is an error, and errors raise"
        return example

    def head(self, number: int) -> FileSource:
        """The first rows, held in memory: what can be looked at and checked of a stream."""
        few = replace(self, block=max(1, min(self.block, number)))  # a whole block would be read for the first of its rows
        return FileSource(FirstRows(tuple(islice(few.rows(None), number)), self.name, self.settings.roots.folder), self.settings)


class FirstRows(FaultyRows):
    """Rows that were read from a stream, with random access."""

    def __init__(self, rows: Sequence[RawRow], name: str, root: Path | None) -> None:
        self._rows, self.name, self.root = rows, name, root

    def __len__(self) -> int:
        """How many were read."""
        return len(self._rows)

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """Row `index`."""
        self.check_index(index, self.name)
        return self._rows[index]

    def faults(self) -> Iterator[Fault]:
        """None: what is wrong with a stream stops it."""
        yield from ()


def stream_source(
    path: str | Path | Sequence[str | Path],
    image_root: str | None = None,
    name: str = "",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    needs_answer: bool = True,
    allow_urls: bool = False,
    fps: float = 1.0,
    max_frames: int = 45,
    min_frames: int = 1,
    damaged_videos: str = "refuse",
    seed: int = 0,
    split: str = "train",
    config: str | None = None,
    block: int = 1000,
) -> StreamedSource:
    """A data set as a stream, for recipes: what is too large to be downloaded. It needs `order: infinite` and a number of steps.

    Args:
        path: `hf://datasets/OWNER/NAME[@REVISION][:CONFIG][/SPLIT]`, a local folder laid out as a data set of the hub, or a list of
            Parquet files.
        image_root: the folder to which media paths in rows are relative; by default rows hold their images' bytes, or URLs.
        name: how tables and errors call the source; by default the path.
        format: as `open_source`; by default each row's fields tell it.
        columns: our name of a field -> its name in the rows.
        needs_answer: refuse rows in which the assistant says nothing.
        allow_urls: fetch images that are named by a URL.
        fps: frames per second that are taken of a video (paper, section 5: 1).
        max_frames: of a video, the first ones (paper: 45).
        min_frames: refuse videos that give fewer.
        damaged_videos: `refuse` videos that break off, or `shorten` them to the frames before the break, with a warning in the log.
        seed: of the wording of requests where rows are pairs; the order of the rows follows the run's.
        split: which part, where the path does not say.
        config: which configuration, where the path does not say.
        block: rows that are shuffled among themselves, and held in memory.

    Raises:
        ConfigError: no path or a single file, an unknown format or field, no such image root, or settings of videos that are out of range.
    """
    check_settings("stream_source", format, columns or {}, image_root)
    path = str(path) if isinstance(path, Path) else path
    if not path or (isinstance(path, str) and path.endswith(".parquet") and not Path(path).is_dir()):
        raise ConfigError(f"path {path!r} but a data set, or a list of Parquet files, is needed (stream_source). Write path: [FILE, ...].")
    fetch = None
    if allow_urls:
        from metamorph.data.fetch import fetch_image as fetch
    paths = path if isinstance(path, str) else tuple(map(str, path))
    named = name or (paths if isinstance(paths, str) else Path(paths[0]).stem)
    settings = RecordSettings(
        roots=Roots(None if image_root is None else Path(image_root), fetch),
        source=named,
        format=format,  # pyright: ignore[reportArgumentType]  # one of FORMATS
        columns=dict(columns or {}),
        needs_answer=needs_answer,
        open_video=VideoOpener(VideoSampling(fps=fps, max_frames=max_frames, damaged_videos=damaged_videos), min_frames),
        seed=seed,
    )
    return StreamedSource(paths, named, settings, split, config, block)


@dataclass(frozen=True)
class WeightedStream:
    """A stream and how often it is drawn."""

    source: StreamedSource
    weight: float = 1.0
    """Its share of all draws, relative to the other streams' weights."""
    loss_weight: float = 1.0
    """Multiplies the loss weight of its examples."""


class StreamedDraw(NamedTuple):
    """A row that was read."""

    source: int
    number: int
    """Which row of the source, were those that all ranks have read laid out in turn: no two draws of a source have the same."""
    row: RawRow
    after: dict[str, Any]
    """The state of the source's rows behind it."""

    def reference(self) -> list[Any]:
        """By which `reread` finds it again; plain JSON values."""
        return [self.source, self.number, self.after]


class StreamedPlace(NamedTuple):
    """A place in a rank's order, and the state there."""

    position: int
    state: dict[str, Any]


class StreamedMixture:
    """One rank's order over the rows of streams: each draw picks a stream at random by weight and takes its next row. It never ends.

    Args:
        sources: at least one, of different names.
        seed: of the picks and of the streams' own orders.
        rank: this process, of `world_size`.
        world_size: number of processes that share the streams.

    Raises:
        ConfigError: no sources, two of one name, or a weight that is not above 0.
        RecordError, HubError: one cannot be opened.
    """

    order: Order = "infinite"
    is_of_one_rank = True

    def __init__(self, sources: Sequence[WeightedStream], *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        names = [entry.source.name for entry in sources]
        if not sources or len(set(names)) < len(names):
            raise ConfigError(f"streams {names} but at least 1, each with a name of its own, is needed (mixture). Give each a name.")
        if bad := next((entry for entry in sources if not 0 < entry.weight < float("inf")), None):
            raise ConfigError(
                f"weight {bad.weight} but a number above 0 is needed (source {bad.source.name}). Leave the source out instead."
            )
        self.sources, self.seed, self.rank, self.world_size = tuple(sources), seed, rank, world_size
        self._rows = [entry.source.rows(seed, rank, world_size) for entry in sources]
        self._iterators: list[Iterator[RawRow]] = [iter(()) for _ in sources]
        self._cumulative = list(accumulate(entry.weight for entry in sources))
        self._counts = [0] * len(sources)

    def draw(self, number: int) -> list[StreamedDraw]:
        """The next rows of this rank.

        Raises:
            RecordError: a stream has no rows for it, or cannot be read further.
            HubError: the hub does not answer.
        """
        return [self._next() for _ in range(number)]

    def share(self, number: int, rank: int, world_size: int) -> Share:
        """This rank's part of the next `number` rows of all ranks together."""
        return Share(self.draw(number // world_size), 0)

    def reread(self, references: Sequence[Sequence[Any]]) -> Iterator[StreamedDraw]:
        """Rows that this rank has read before, in the given order. The blocks in which they stood are read once more."""
        again = [entry.source.rows(self.seed, self.rank, self.world_size) for entry in self.sources] if references else []
        blocks: dict[tuple[int, int, int], list[RawRow]] = {}
        for source, number, after in references:
            key = (source, after["epoch"], after["block"])
            if key not in blocks:
                again[source].load_state_dict({**after, "taken": 0})
                blocks[key] = list(islice(again[source], self.sources[source].source.block))
            yield StreamedDraw(source, number, blocks[key][after["taken"] - 1], after)

    @property
    def place(self) -> StreamedPlace:
        """Where this rank stands."""
        return StreamedPlace(sum(self._counts), self.state_dict())

    def state_dict(self, place: StreamedPlace | None = None) -> dict[str, Any]:
        """Where this rank stands (or stood, at `place`), and in what; plain JSON values."""
        if place is not None:
            return place.state
        return {"counts": list(self._counts), "rows": [rows.state_dict() for rows in self._rows], "mixture": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the row at which a state was taken.

        Raises:
            CheckpointError: it belongs to other streams, weights, seed, rank or number of ranks.
        """
        ours, theirs = self._fingerprint(), state["mixture"]
        if ours != theirs:
            found, expected = (
                ", ".join(f"{name} {one.get(name)}" for name in ours if ours[name] != theirs.get(name)) for one in (theirs, ours)
            )
            remedy = "Resume with the same data on as many processes, or start a new run."
            raise CheckpointError(f"a state of {found} but this mixture has {expected} (resuming the data order). {remedy}")
        for rows, one in zip(self._rows, state["rows"], strict=True):
            rows.load_state_dict(one)
        self._counts = list(state["counts"])
        self._iterators = [iter(()) for _ in self._rows]

    def _fingerprint(self) -> dict[str, Any]:
        facts = {"sources": [entry.source.name for entry in self.sources], "weights": [entry.weight for entry in self.sources]}
        facts["splits"] = [[entry.source.config, entry.source.split] for entry in self.sources]
        facts["shards"] = [rows.num_shards for rows in self._rows]
        return facts | {"seed": self.seed, "order": "streams", "rank": self.rank, "world_size": self.world_size}

    def _next(self) -> StreamedDraw:
        source = pick(self._cumulative, self.seed, sum(self._counts) * self.world_size + self.rank)
        for _ in range(3):  # an epoch may end here; and one that a state left behind its last row ends at once
            row = next(self._iterators[source], None)
            if row is not None:
                count, self._counts[source] = self._counts[source], self._counts[source] + 1
                number = count * self.world_size + self.rank
                return StreamedDraw(source, number, row, self._rows[source].state_dict())
            self._iterators[source] = iter(self._rows[source])
        place = f"{self.sources[source].source.name}, rank {self.rank} of {self.world_size}"
        raise RecordError(f"a stream of 0 rows but at least 1 is needed ({place}). Leave it out, or use fewer processes.")


@dataclass(frozen=True)
class StreamReader(Generic[Item]):
    """From a row that was read to what a batch is made of. Goes to worker processes as a whole, the streams stay."""

    sources: tuple[WeightedStream, ...]
    encode: Callable[[Example], Item]
    skip: int | None = None
    """Leave out bad rows; None = refuse the first as it is."""

    def read(self, draw: StreamedDraw) -> tuple[Item | None, tuple[BadRecord, ...]]:
        """The row; or None and what is wrong with it.

        Raises:
            MetaMorphError: it cannot be used; the message names it.
        """
        entry = self.sources[draw.source]
        try:
            example = entry.source.example(draw.row)
            return encoded(replace(example, weight=example.weight * entry.loss_weight), self.encode), ()
        except BAD as error:
            if self.skip is None:
                raise
            return None, (BadRecord(entry.source.name, _known_by(draw.row), str(error)),)


def _known_by(row: RawRow) -> int:
    """A number that is the same for a row wherever and in whichever epoch it is read."""
    return int.from_bytes(hashlib.blake2b(repr(sorted(row.values.items())).encode(), digest_size=7).digest(), "big")
