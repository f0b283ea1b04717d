"""Images of ordinary example sources as batches for the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metamorph.data.mixture import shuffled
from metamorph.data.token_store import TokenStore
from metamorph.errors import MediaError
from metamorph.media import open_image, preprocess
from metamorph.training.assembly import TokenEncoder, load_source
from metamorph.training.config import SourceConfig
from metamorph.training.encoding import describe_tokens

if TYPE_CHECKING:
    from metamorph.decoder import DecoderBatch


def image_batches(
    encode: TokenEncoder,
    size: int,
    seed: int,
    *,
    source: str,
    kwargs: dict[str, Any],
    image_size: int,
    encoded: str | None = None,
) -> Callable[[int], DecoderBatch]:
    """From a step's number to its batch: the first image of each example, without its words, in shuffled passes over the source.

    Args:
        encode: the frozen encoder, which reads each image as its own processor prepares it.
        size: images per batch.
        seed: of the order and the noise.
        source: dotted path of a function that returns an ExampleSource.
        kwargs: its arguments.
        image_size: side of what the decoder draws.
        encoded: a store of visual tokens that holds every image (`metamorph data encode`); the encoder then has nothing to do.

    Raises:
        ConfigError: the store is of another encoder, or an image is not in it.
    """
    from metamorph.decoder.batches import DecoderBatch, image_seeds

    examples = load_source(SourceConfig(source=source, kwargs=kwargs))
    half = (0.5, 0.5, 0.5)
    store = None
    if encoded is not None:
        assert encode.processor is not None, "the decoder's encoder comes with a processor"
        store = TokenStore(Path(encoded))
        store.spec.check(describe_tokens(encode.model.config, encode.processor, encode.model.vision_encoder.fingerprint()), encoded)

    def make(step: int) -> DecoderBatch:
        numbers = range(step * size, (step + 1) * size)
        chosen = [examples[shuffled(n % len(examples), len(examples), hash((seed, n // len(examples))))] for n in numbers]
        drawn, read = [], []
        for example in chosen:
            parts = [part.image for message in example.messages for part in message.images if part.image is not None]
            if not parts:
                raise MediaError(f"0 images but at least 1 is needed ({example.id}). Leave examples without images out of the source.")
            image = open_image(parts[0])
            drawn.append(torch.from_numpy(preprocess(image, (image_size, image_size), half, half)))
            read.append(encode.prepare(image) if store is None else store.of_image(parts[0], example.place))
        ids = tuple(example.id for example in chosen)
        tokens = encode(torch.stack(read)) if store is None else torch.stack(read)
        return DecoderBatch(pixels=torch.stack(drawn), seeds=image_seeds(seed, step, size), tokens=tokens, ids=ids)

    return make
