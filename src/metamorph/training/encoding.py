"""Encoding the images of a whole data set once, over any number of processes, and training on the result without the encoder.

Rows are read in rounds. In a round each process hashes the images of its share of the rows; all exchange the hashes, and each encodes those
that it saw first and nobody has encoded before. So every image is encoded once, whatever rows name it, and whoever stops goes on later.

Axes: n images of a batch, k visual tokens per image, v vision width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from metamorph.batch import TokenSequence
from metamorph.data.broken_images import BrokenImages
from metamorph.data.mixture import ExampleSource
from metamorph.data.token_store import (
    KeySet,
    ShardWriter,
    StoreType,
    TokenSpec,
    TokenStore,
    build_index,
    only_writer,
    prepare_store,
    stored_keys,
)
from metamorph.errors import ConfigError
from metamorph.messages import Example, ImagePart
from metamorph.training.config import ModelConfig
from metamorph.training.device import rank, world_size
from metamorph.training.encoding_rounds import FAULTS, HELD_BYTES, Budget, EncodingProgress, Numbered, Rounds
from metamorph.training.stepping import gather_objects

if TYPE_CHECKING:
    from metamorph.model.encoder_files import EncoderFiles
    from metamorph.model.processing import MetaMorphProcessor


@dataclass(frozen=True)
class StoredEncode:
    """A stream's `encode` whose images come from a store, found by a hash of their bytes; no pixels are prepared. It can be pickled.

    Images in files are not decoded. What has no bytes of its own, a frame of a video or a crop, is made as ever to be found by its pixels.
    """

    encode: Callable[[Example], TokenSequence]
    store: TokenStore

    def __call__(self, example: Example) -> TokenSequence:
        """The example as a sequence without pixels.

        Raises:
            MediaError: an image was broken when the data were encoded.
            ConfigError: an image was never encoded.
        """
        return self.encode(self.store.replace_images(example))


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
    held_bytes: int = HELD_BYTES,
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
        held_bytes: of images that came with their rows, so many are kept by each process; rows of others are read twice.
        writing: settings of `ShardWriter`.
        on_round: called after each round, on the first process only.

    Returns:
        The counts. Rows and images that are broken are listed in the store's faults.txt, anew each time; all others are encoded.
        Training passes over the images that do not decode, if it may, or names them: the store remembers them (`BrokenImages`).

    Raises:
        ConfigError: the store there is of another encoder, preprocessing or dtype; or another job writes to it.
    """
    began = time.monotonic()
    with _held_by_first(directory, spec, dtype), ThreadPoolExecutor(threads, thread_name_prefix="metamorph-encode") as pool:
        writer = ShardWriter(directory, dtype, **(writing or {}))  # pyright: ignore[reportArgumentType]
        progress = EncodingProgress(sum(len(source) for source in sources))
        known, broken = KeySet(stored_keys(directory)), BrokenImages(directory)
        rounds = Rounds(Numbered(sources), encode, prepare, writer, pool, batch_size, known, broken, progress, Budget(held_bytes))
        try:
            for start in range(0, progress.rows, round_size * world_size()):
                rounds.round(range(start + rank(), min(start + round_size * world_size(), progress.rows), world_size()))
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


@contextmanager
def _held_by_first(directory: Path, spec: TokenSpec, dtype: StoreType) -> Iterator[None]:
    """One process looks after the directory and holds it; what it refuses all refuse, so that none waits for it."""
    refused = None
    with ExitStack() as held:
        if rank() == 0:
            try:
                held.enter_context(only_writer(directory))
                prepare_store(directory, spec, dtype)
                (directory / FAULTS).unlink(missing_ok=True)
            except ConfigError as error:
                refused = str(error)
        if (refused := gather_objects(refused)[0]) is not None:
            raise ConfigError(refused)
        yield


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
