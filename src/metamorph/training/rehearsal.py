"""The data of a run, opened as the run opens them, and the first rows of each source encoded: what a dry run says of them, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from metamorph.data.example_encoder import ExampleEncoder
from metamorph.data.mixture import Mixture
from metamorph.data.skipping import BAD, encoded
from metamorph.data.streamed_mixture import StreamedMixture, StreamedSource
from metamorph.data.token_store import TokenStore
from metamorph.errors import CheckpointError, MetaMorphError
from metamorph.training.assembly import TokenEncoder, build_decoder_stream, build_encoder, build_mixture, check_start, resolve_steps
from metamorph.training.config import DataConfig, DecoderConfig, ModelConfig, RunConfig, StageConfig
from metamorph.training.encoding import StoredEncode, open_store

if TYPE_CHECKING:
    from metamorph.model.processing import MetaMorphProcessor

FIRST = 3
"""Rows of each source that are encoded."""


@dataclass(frozen=True)
class Rehearsal:
    """What was found."""

    config: RunConfig
    """The run's, with the number of steps that its data give, where they could be opened."""
    rows: dict[str, list[str]]
    """Stage -> a sentence for each of its sources."""


def rehearse(config: RunConfig) -> Rehearsal:
    """Open every source, count its rows, and encode the first ones.

    Where parts of the model are names on the hub that were never fetched, as much is done as can be, and the sentences say what was not.

    Raises:
        MetaMorphError: what the run itself would raise.
    """
    if config.decoder is not None:
        return Rehearsal(config, {stage.name: [_first_batch(config.decoder, stage)] for stage in config.stages})
    assert config.model is not None  # validated
    processor, why_not = find_processor(config.model)
    rows: dict[str, list[str]] = {}
    steps: dict[str, int] = {}
    for number, stage in enumerate(config.stages):
        data = stage.data or config.data
        assert data is not None  # validated
        encode = None if processor is None else build_encoder(data, processor)
        try:
            mixture = build_mixture(data, stage.training.seed, encode)
        except MetaMorphError as error:
            if processor is not None:
                raise
            rows[stage.name] = [_not_opened(error, why_not)]
            continue
        reading, passed_over = _reading(data, config.model, encode), BAD if data.on_bad_record == "skip" else ()
        rows[stage.name] = [_told(mixture, source, reading, why_not, passed_over) for source in range(len(mixture.sources))]
        steps[f"stages.{number}.training.steps"] = resolve_steps(stage.training, mixture).steps
    return Rehearsal(config.with_overrides(steps), rows)


def _reading(data: DataConfig, model: ModelConfig, encode: ExampleEncoder | None) -> Callable[[Any], Any] | None:
    """How the run would encode rows: with pictures from the store, where it names one; None where there is no processor.

    Raises:
        ConfigError: the store is not finished, or of another encoder, which is compared where the encoder's files are in a directory here.
    """
    if data.encoded is None:
        return encode
    here = (place := model.start or model.vision) is not None and Path(place).is_dir()
    store = open_store(Path(data.encoded), model) if here else TokenStore(Path(data.encoded))
    return None if encode is None else StoredEncode(encode, store)


def find_processor(model: ModelConfig) -> tuple[MetaMorphProcessor | None, str]:
    """The processor that the run would use, from this machine alone; or why there is none."""
    from metamorph.model.conversion import read_processor
    from metamorph.model.processing import MetaMorphProcessor

    check_start(model)
    try:
        if model.start is not None:
            return MetaMorphProcessor.from_pretrained(model.start, local_files_only=True), ""
        assert model.llm is not None and model.vision is not None  # validated
        return read_processor(model.llm, model.vision, **model.overrides), ""
    except CheckpointError:
        if not (away := _away(model.start, model.llm, model.vision)):
            raise
        return None, away


def _away(*parts: str | None) -> str:
    """Which parts would have to be fetched first."""
    names = [part for part in parts if part is not None and not Path(part).is_dir()]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not on this machine" if names else ""


def _not_opened(error: Exception, why_not: str) -> str:
    return f"rows not opened: {error} Nor could they be encoded: {why_not}."


def _told(
    mixture: Mixture | StreamedMixture,
    number: int,
    encode: Callable[[Any], Any] | None,
    why_not: str,
    passed_over: tuple[type[MetaMorphError], ...],
) -> str:
    """A sentence on one source; its first rows are read, and encoded where that is possible."""
    source = mixture.sources[number].source
    is_stream = isinstance(source, StreamedSource)
    counted = f"{source.name}: {'a stream' if is_stream else f'{len(source):,} rows'}"
    if encode is None:
        return f"{counted}, not encoded: {why_not}"
    rows = source.head(FIRST) if is_stream else source
    lengths: list[int] = []
    bad: list[str] = []
    for index in range(min(FIRST, len(rows))):
        try:
            lengths.append(len(encoded(rows[index], encode)))
        except passed_over as error:
            bad.append(str(error))
    unusable = f"{len(bad)} of the first {len(bad) + len(lengths)} cannot be used and would be skipped: {'; '.join(bad)}"
    usable = f"the first {len(lengths)} were encoded: at most {max(lengths, default=0)} positions"
    return f"{counted}; {unusable if bad else usable}"


@dataclass(frozen=True)
class _Blank(TokenEncoder):
    """Prepares pixels as the frozen encoder wants them, and gives visual tokens of the right shape in its place: no weights are read."""

    shape: tuple[int, int] = (0, 0)

    def __call__(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k v"]:
        """Zeros."""
        return torch.zeros(len(pixels), *self.shape)


def _first_batch(decoder: DecoderConfig, stage: StageConfig) -> str:
    """A sentence on the batches of a decoder's run, of which the first is made, with few images."""
    from metamorph.model.configuration import MetaMorphConfig
    from metamorph.model.processing import MetaMorphProcessor

    away = _away(decoder.encoder, decoder.base)
    try:
        settings: Any = MetaMorphConfig.from_pretrained(decoder.encoder, local_files_only=True)
        processor = MetaMorphProcessor.from_pretrained(decoder.encoder, local_files_only=True)
        model: Any = None
        blank = _Blank(model, processor, (settings.num_visual_tokens, settings.vision_config.hidden_size))
        few = stage.training.model_copy(update={"batch_size": FIRST, "micro_batch_size": None})
        (batch,) = next(build_decoder_stream(decoder, few, blank))
    except (MetaMorphError, OSError) as error:
        if not away:
            raise
        return _not_opened(error, away)
    height, width = batch.pixels.shape[-2:]
    return f"{decoder.batches.source}: the first {len(batch)} images were prepared, {height} x {width} pixels"
