"""Encoding the images of a whole data set once, over any number of processes, and training on the result without the encoder.

Rows are read in rounds. In a round each process hashes the images of its share of the rows; all exchange the hashes, and each encodes those
that it saw first and nobody has encoded before. So every image is encoded once, whatever rows name it, and whoever stops goes on later.

Axes: n images of a batch, k visual tokens per image, v vision width.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from metamorph.batch import TokenSequence
from metamorph.data.broken_images import BrokenImages
from metamorph.data.examining import examine
from metamorph.data.faults import Fault, from_error
from metamorph.data.mixture import ExampleSource
from metamorph.data.token_store import (
    KeySet,
    ShardWriter,
    StoreType,
    TokenSpec,
    TokenStore,
    build_index,
    prepare_store,
    stored_keys,
)
from metamorph.errors import ConfigError, DataError
from metamorph.media import image_hash
from metamorph.messages import Example, ImagePart, ImageSource
from metamorph.training.config import ModelConfig
from metamorph.training.device import rank, world_size
from metamorph.training.stepping import gather_objects

if TYPE_CHECKING:
    from metamorph.model.encoder_files import EncoderFiles
    from metamorph.model.processing import MetaMorphProcessor


FAULTS = "faults.txt"
FAULTS_KEPT = 1000  # in memory: a data set may be broken by the million


@dataclass(frozen=True)
class StoredEncode:
    """A stream's `encode` whose images come from a store; nothing is decoded, and no pixels are prepared. It can be pickled."""

    encode: Callable[[Example], TokenSequence]
    store: TokenStore

    def __call__(self, example: Example) -> TokenSequence:
        """The example as a sequence without pixels.

        Raises:
            MediaError: an image was broken when the data were encoded.
            ConfigError: an image was never encoded.
        """
        return self.encode(self.store.replace_images(example))


@dataclass
class EncodingProgress:
    """How far all processes together have come."""

    rows: int
    """Rows to read in all."""
    done: int = 0
    images: int = 0
    """Images that rows name."""
    unique: int = 0
    """Different ones among them."""
    encoded: int = 0
    """Those of them that were not in the store before."""
    broken: int = 0
    """Rows, and images of rows, that could not be read."""
    faults: list[str] = field(default_factory=list)
    """The first of them, each in a line that begins with its place; all are in the store's faults.txt."""
    bytes: int = 0
    """Size of the store, once it is finished."""
    seconds: float = 0.0


def encoder_of(config: ModelConfig) -> EncoderFiles:
    """The vision encoder of a model's settings, in its files.

    Raises:
        CheckpointError, ConfigError, TemplateError: as `encoder_of_model` and `encoder_of_parts`.
    """
    from metamorph.model.encoder_files import encoder_of_model, encoder_of_parts

    if config.start is not None:
        return encoder_of_model(config.start)
    assert config.llm is not None and config.vision is not None  # validated
    return encoder_of_parts(config.llm, config.vision, **config.overrides)


def open_store(directory: Path, config: ModelConfig) -> TokenStore:
    """The store that training reads, if it was made with the model's encoder, settings and preprocessing.

    Raises:
        ConfigError: it was not, with both fingerprints; or there is no finished store.
    """
    store = TokenStore(directory)
    store.spec.check(spec_of(encoder_of(config)), str(directory))
    return store


def spec_of(files: EncoderFiles) -> TokenSpec:
    """What visual tokens of this encoder are; its weights are read once, and not kept."""
    return describe_tokens(files.config, files.processor, files.fingerprint())


def describe_tokens(config: Any, processor: MetaMorphProcessor, fingerprint: str) -> TokenSpec:
    """What visual tokens are by a model's config, its processor, and its encoder's fingerprint."""
    from metamorph.model.encoder_files import preprocessing_of
    from metamorph.model.vision_encoder import TOKEN_SETTINGS

    settings = {name: getattr(config, name) for name in TOKEN_SETTINGS}
    shape = (config.num_visual_tokens, config.vision_config.hidden_size)
    return TokenSpec(fingerprint, settings, preprocessing_of(processor), *shape)


def encode_images(
    sources: Sequence[ExampleSource],
    encode: Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n k v"]],
    prepare: Callable[[ImagePart], Float[np.ndarray, "3 h w"]],
    spec: TokenSpec,
    directory: Path,
    *,
    dtype: StoreType = "bfloat16",
    batch_size: int = 32,
    round_size: int = 512,
    threads: int = 4,
    writing: Mapping[str, float] | None = None,
    on_round: Callable[[EncodingProgress], Any] | None = None,
) -> EncodingProgress:
    """Encode every image of these sources that the store does not hold yet, and finish the store.

    Args:
        sources: rows with images; the same on every process.
        encode: the frozen encoder, on its device.
        prepare: an image as the encoder reads it.
        spec: what the tokens are.
        directory: the store, new or to go on with; the same for all processes.
        dtype: of the stored numbers.
        batch_size: images that are encoded at once.
        round_size: rows that each process reads between two exchanges.
        threads: that read and decode, in each process.
        writing: settings of `ShardWriter`.
        on_round: called after each round, on the first process only.

    Returns:
        The counts. Rows and images that are broken are listed in the store's faults.txt, anew each time; all others are encoded.
        Training passes over the images that do not decode, if it may, or names them: the store remembers them (`BrokenImages`).

    Raises:
        ConfigError: the store there is of another encoder, preprocessing or dtype.
    """
    began = time.monotonic()
    _prepare_on_first(directory, spec, dtype)
    writer = ShardWriter(directory, dtype, **(writing or {}))  # pyright: ignore[reportArgumentType]
    progress = EncodingProgress(sum(len(source) for source in sources))
    with ThreadPoolExecutor(threads, thread_name_prefix="metamorph-encode") as pool:
        known, broken = KeySet(stored_keys(directory)), BrokenImages(directory)
        job = _Job(_Rows(sources), encode, prepare, writer, pool, batch_size, known, KeySet(), broken, progress)
        try:
            for start in range(0, progress.rows, round_size * world_size()):
                job.round(range(start + rank(), min(start + round_size * world_size(), progress.rows), world_size()))
                progress.seconds = time.monotonic() - began
                if rank() == 0 and on_round is not None:
                    on_round(progress)
        finally:
            writer.flush()  # whatever stopped it: what was encoded is kept
            pool.shutdown(cancel_futures=True)
    _wait()
    if rank() == 0:
        build_index(directory)
    _wait()
    progress.bytes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    progress.seconds = time.monotonic() - began
    return progress


@dataclass(frozen=True)
class _Rows:
    """All rows of all sources under one numbering."""

    sources: Sequence[ExampleSource]

    def find(self, number: int) -> tuple[ExampleSource, int]:
        """The source of a row, and the row's number there."""
        ends = list(accumulate(len(source) for source in self.sources))
        source = bisect_right(ends, number)
        return self.sources[source], number - (ends[source - 1] if source else 0)


class _Image(NamedTuple):
    key: bytes
    image: ImageSource
    number: int
    """In its row, from 1."""


@dataclass(frozen=True)
class _Seen:
    """One row's images, or what is wrong."""

    place: str = ""
    images: tuple[_Image, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass
class _Job:
    rows: _Rows
    encode: Callable[[Tensor], Tensor]
    prepare: Callable[[ImagePart], np.ndarray]
    writer: ShardWriter
    pool: ThreadPoolExecutor
    batch_size: int
    known: KeySet
    """Hashes of images in the store."""
    seen: KeySet
    """Hashes of images of these rows, as far as they were read."""
    broken: BrokenImages
    progress: EncodingProgress

    def round(self, numbers: Iterable[int]) -> None:
        rows = list(self.pool.map(self.look, numbers))
        mine: dict[bytes, ImageSource] = {}
        for row in rows:
            for key, image, _ in row.images:
                mine.setdefault(key, image)
        shares = gather_objects(list(mine))
        owners = {key: owner for owner in range(len(shares) - 1, -1, -1) for key in shares[owner]}  # whoever saw it first
        new = [(key, image) for key, image in mine.items() if owners[key] == rank() and key not in self.known]
        failed = self.encode_new(new)
        counts = (len(rows), sum(len(row.images) for row in rows), len(new) - len(failed))
        told = gather_objects((failed, [fault for row in rows for fault in row.faults], counts))
        broken = {key: error for failures, _, _ in told for key, error in failures.items()}
        named = [str(_named(broken[key], row.place, image, number)) for row in rows for key, image, number in row.images if key in broken]
        for key in owners:
            if key not in broken:
                self.known.add(key)
                self.seen.add(key)
        done, images, encoded = (sum(column) for column in zip(*(counts for _, _, counts in told), strict=True))
        progress = self.progress
        progress.done, progress.images, progress.encoded = progress.done + done, progress.images + images, progress.encoded + encoded
        progress.unique = len(self.seen)
        faults = [fault for _, own, _ in told for fault in own]
        faults += [fault for own in (gather_objects(named) if broken else []) for fault in own]
        progress.broken += len(faults)
        progress.faults += faults[: FAULTS_KEPT - len(progress.faults)]
        if faults and rank() == 0:
            self.broken.add(broken)
            with (self.writer.directory / FAULTS).open("a", encoding="utf-8") as listing:
                listing.writelines(f"{' '.join(fault.splitlines())}\n" for fault in faults)

    def look(self, number: int) -> _Seen:
        """Read a row and hash its images."""
        example = _read(*self.rows.find(number))
        if isinstance(example, str):
            return _Seen(faults=(example,))
        images, faults = [], []
        for position, part in enumerate((part for message in example.messages for part in message.images), start=1):
            if part.image is None:
                continue
            try:
                images.append(_Image(image_hash(part.image), part.image, position))
            except DataError as error:
                faults.append(str(_named(_fault(error), example.place, part.image, position)))
        return _Seen(example.place, tuple(images), tuple(faults))

    def encode_new(self, new: Sequence[tuple[bytes, ImageSource]]) -> dict[bytes, Fault]:
        """Encode and keep images; returns those that do not decode, and why."""
        failed: dict[bytes, Fault] = {}
        keys: list[bytes] = []
        pixels: list[Tensor] = []
        for key, result in self.prepared(new):
            if isinstance(result, Fault):
                failed[key] = result
                continue
            keys.append(key)
            pixels.append(torch.from_numpy(result))
            if len(keys) == self.batch_size:
                self.writer.add(keys, self.encode(torch.stack(pixels)))
                keys, pixels = [], []
        if keys:
            self.writer.add(keys, self.encode(torch.stack(pixels)))
        return failed

    def prepared(self, new: Sequence[tuple[bytes, ImageSource]]) -> Iterator[tuple[bytes, np.ndarray | Fault]]:
        """Pixels in order, made by threads that are a few batches ahead."""
        waiting: deque[tuple[bytes, Future]] = deque()
        for key, image in new:
            waiting.append((key, self.pool.submit(self.pixels, image)))
            if len(waiting) > 2 * self.batch_size:
                first, result = waiting.popleft()
                yield first, result.result()
        for key, result in waiting:
            yield key, result.result()

    def pixels(self, image: ImageSource) -> np.ndarray | Fault:
        try:
            return self.prepare(ImagePart(image))
        except DataError as error:
            return _fault(error)


def _read(source: ExampleSource, index: int) -> Example | str:
    """A row, or the first thing that is wrong with it, as `metamorph data check` says it."""
    faults: list[Fault] = []
    try:
        example = examine(source, index, faults.append)
    except DataError as error:
        return f"{source.name} row {index}: {error}"
    wrong = [fault for fault in faults if fault.severity == "error"]
    if wrong:
        return str(wrong[0])
    assert example is not None, "a fault that leaves no example is an error"
    return example


def _fault(error: DataError) -> Fault:
    """What is wrong with an image, whatever row and name it has."""
    return from_error(error, "image-broken", place="")


def _named(fault: Fault, place: str, image: ImageSource, number: int) -> Fault:
    """A fault of an image in its row."""
    found = f"{fault.found} in {str(image)!r}" if isinstance(image, Path) else fault.found
    return replace(fault, place=place, field=f"image {number}", found=found)


def _prepare_on_first(directory: Path, spec: TokenSpec, dtype: StoreType) -> None:
    """One process looks after the directory; what it refuses all refuse, so that none waits for it."""
    refused = None
    if rank() == 0:
        try:
            prepare_store(directory, spec, dtype)
            (directory / FAULTS).unlink(missing_ok=True)
        except ConfigError as error:
            refused = str(error)
    if (refused := gather_objects(refused)[0]) is not None:
        raise ConfigError(refused)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
