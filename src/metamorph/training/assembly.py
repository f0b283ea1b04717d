"""From settings to the things that are trained and read: model, decoder, stream."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from metamorph.batch import Batch
from metamorph.data.collate import pack, pack_rows, pad
from metamorph.data.example_encoder import ExampleEncoder
from metamorph.data.mixture import ExampleSource, Mixture, WeightedSource, mean_length
from metamorph.data.packing import Packing
from metamorph.data.skipping import BAD, BadRecords
from metamorph.data.stream import BatchStream
from metamorph.data.streamed_mixture import StreamedMixture, StreamedSource, WeightedStream
from metamorph.data.token_store import TokenStore
from metamorph.errors import CheckpointError, ConfigError
from metamorph.losses import LossTerm
from metamorph.messages import ImagePart
from metamorph.training.config import DataConfig, DecoderConfig, ModelConfig, SourceConfig, TrainingConfig, unknown_name
from metamorph.training.device import rank, world_size
from metamorph.training.encoder_cache import CachingEncode, EncoderCache
from metamorph.training.encoding import StoredEncode, open_store
from metamorph.training.stepping import gather_objects

if TYPE_CHECKING:
    from metamorph.decoder import DecoderModel, DecoderStream
    from metamorph.model.configuration import MetaMorphConfig
    from metamorph.model.modeling import MetaMorph
    from metamorph.model.processing import MetaMorphProcessor


def vpit_step(model: MetaMorph, batch: Batch, drawn_token_dropout: float = 0.0) -> dict[str, LossTerm]:
    """The step function of both stages: the text and visual losses of a batch; the loop compares their counts with the collator's."""
    terms = model(**batch.model_inputs(), drawn_token_dropout=drawn_token_dropout).terms
    assert terms is not None  # a batch always has labels
    return terms


def build_model(config: ModelConfig, seed: int, *, with_encoder: bool = True) -> tuple[MetaMorph, MetaMorphProcessor]:
    """Join an LLM and a vision encoder (new parts random by `seed`), or load a saved model.

    Raises:
        CheckpointError, ConfigError, TemplateError: see `initialize` and `load`.
    """
    from metamorph.model.conversion import initialize, load

    check_start(config)
    if config.start is not None:
        return load(config.start, with_encoder=with_encoder)
    assert config.llm is not None and config.vision is not None  # validated
    return initialize(config.llm, config.vision, seed=seed, with_encoder=with_encoder, **config.overrides)


def check_start(config: ModelConfig) -> None:
    """Refuse settings for a model that has its own.

    Raises:
        ConfigError: a saved model and overrides.
    """
    if config.start is not None and config.overrides:
        found = f"overrides of {sorted(config.overrides)} and start={config.start!r}"
        raise ConfigError(f"{found} but a saved model keeps its own settings (ModelConfig). Leave overrides out.")


def build_encoder(data: DataConfig, processor: MetaMorphProcessor) -> ExampleEncoder:
    """From examples to sequences, as the data settings ask for it."""
    return ExampleEncoder(processor, data.max_length, data.too_long)


def build_mixture(data: DataConfig, seed: int, encode: ExampleEncoder | None = None) -> Mixture | StreamedMixture:
    """The order over the rows of all sources. `encode` measures mean lengths, where weights are shares of tokens.

    Raises:
        ConfigError: a source cannot be found or called, or is empty; a mean length is needed, neither stated nor to be measured; streams
            beside other sources, or with settings that need rows by number.
        MetaMorphError: a row on which a length is measured cannot be used.
    """
    found = [_load(config) for config in data.sources]
    if any(isinstance(source, StreamedSource) for source in found):
        return _mixture_of_streams(data, seed, found)
    sources = []
    for config, source in zip(data.sources, found, strict=True):
        weight = config.weight / (_mean_tokens(config, source, data, encode) if data.weight_unit == "tokens" else 1)
        sources.append(
            WeightedSource(source, weight, repeats=config.repeats, loss_weight=config.loss_weight, max_examples=config.max_examples)
        )
    return Mixture(sources, seed=seed, order=data.order, epochs=data.epochs)


def _mixture_of_streams(data: DataConfig, seed: int, found: Sequence[Any]) -> StreamedMixture:
    streams = []
    for config, source in zip(data.sources, found, strict=True):
        if not isinstance(source, StreamedSource):
            refused = f"{source.name} and a stream but their rows come either by number or in streams"
            raise ConfigError(f"{refused} (data.sources). Stream both (metamorph.data.streamed_mixture.stream_source), or download both.")
        if data.order == "epoch" or config.max_examples is not None:
            asked = f"max_examples={config.max_examples}" if data.order != "epoch" else "order='epoch'"
            raise ConfigError(f"{asked} but a stream has no number of rows ({source.name}). Use order: infinite, and set steps.")
        if data.weight_unit == "tokens" and config.mean_tokens is None:
            raise ConfigError(f"no mean_tokens but weight_unit=tokens needs one ({source.name}). A stream is not measured: state it.")
        streams.append(WeightedStream(source, config.weight / (config.mean_tokens or 1), config.loss_weight))
    return StreamedMixture(streams, seed=seed, rank=rank(), world_size=world_size())


def _mean_tokens(config: SourceConfig, source: ExampleSource, data: DataConfig, encode: ExampleEncoder | None) -> float:
    if config.mean_tokens is not None:
        return config.mean_tokens
    if encode is None:
        raise ConfigError(f"no mean_tokens but weight_unit=tokens needs one (source {source.name}). State it, or give a processor.")
    return mean_length(source, encode, data.token_sample, leave_out=BAD if data.on_bad_record == "skip" else ())


def resolve_steps(training: TrainingConfig, mixture: Mixture | StreamedMixture) -> TrainingConfig:
    """The settings with the number of steps that the epochs of the data give, where none is set; a last, smaller step included.

    Raises:
        ConfigError: more steps are set than there are.
    """
    if isinstance(mixture, StreamedMixture) or mixture.order != "epoch":
        return training
    available = -(-mixture.epochs * mixture.epoch_length // training.batch_size)
    if training.steps > available:
        epochs = f"{mixture.epochs} epoch{'s' * (mixture.epochs > 1)} of {mixture.epoch_length} examples, {training.batch_size} a step"
        raise ConfigError(f"{training.steps} steps but at most {available} ({epochs}). Raise epochs, or use order: infinite.")
    return training if training.steps else training.model_copy(update={"steps": available})


def build_stream(
    data: DataConfig,
    training: TrainingConfig,
    mixture: Mixture | StreamedMixture,
    processor: MetaMorphProcessor,
    cache: EncoderCache | TokenStore | None = None,
    *,
    run_dir: Path | None = None,
    stage: str = "",
) -> BatchStream:
    """This process's share of the mixture's batches. Rows that are skipped are listed in `run_dir`, under the name of the stage.

    Raises:
        ConfigError: settings contradict each other.
    """
    if isinstance(cache, EncoderCache) and data.workers:
        raise ConfigError(f"workers={data.workers} with an encoder cache but it lives in one process (data). Set workers=0.")
    encode: Callable[..., Any] = build_encoder(data, processor)
    if cache is not None:
        encode = CachingEncode(encode, cache) if isinstance(cache, EncoderCache) else StoredEncode(encode, cache)
    by_rows, skips = data.batch_unit == "rows", data.on_bad_record == "skip"
    listing = run_dir / "bad_records.jsonl" if run_dir is not None and rank() == 0 else None
    return BatchStream(
        mixture,
        encode,
        batch_size=training.batch_size,
        collate=pack_rows if by_rows else partial(pack, max_length=data.max_length) if data.pack else pad,
        micro_batch_size=training.micro_batch_size,
        rank=rank(),
        world_size=world_size(),
        workers=data.workers,
        group_by_length=data.group_by_length,
        packing=Packing(data.max_length, data.look_ahead) if by_rows else None,
        bad_records=BadRecords(data.max_bad_records, listing, stage) if skips else None,
        gather=gather_objects,
    )


def build_cache(data: DataConfig, model: MetaMorph, config: ModelConfig) -> EncoderCache | TokenStore | None:
    """Where visual tokens come from by the data settings, if not from the encoder each time: its outputs in memory, or a store.

    Raises:
        ConfigError: the store is not finished, or of another encoder.
    """
    if data.encoded is not None:
        return open_store(Path(data.encoded), config)
    return EncoderCache(TokenEncoder(model), data.cached_images) if data.cached_images else None


@dataclass(frozen=True)
class TokenEncoder:
    """A frozen model's way from pixels to visual tokens, both on the CPU, where batches are made; in between they are where the encoder is.

    `prepare`, where there is a processor, makes the pixels of an image, with the size, filter and scale that the encoder was trained on.
    """

    model: MetaMorph
    processor: MetaMorphProcessor | None = None

    def __call__(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k v"]:
        """Visual tokens."""
        return self.model.encode_images(pixels).cpu()

    def prepare(self, image: Image) -> Float[Tensor, "3 h w"]:
        """Pixels as the encoder reads them."""
        assert self.processor is not None, "only pixels that are ready can be encoded without a processor"
        return torch.from_numpy(self.processor.prepare_image(ImagePart(image)))


def build_decoder(config: DecoderConfig, seed: int) -> tuple[DecoderModel, TokenEncoder]:
    """The decoder at its start (new parts random by `seed`, on every process the same), and the encoder whose visual tokens condition it.

    Raises:
        CheckpointError: one of them is not there.
        ConfigError: a setting is unknown, or the parts do not fit together.
    """
    from metamorph.model.conversion import load

    model, processor = load(config.encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = start_decoder(config, cast("MetaMorphConfig", model.config))
    return decoder, TokenEncoder(model.eval(), processor)


def start_decoder(config: DecoderConfig, encoder: MetaMorphConfig, *, weights: bool = True) -> DecoderModel:
    """The decoder at its start, for visual tokens as this encoder makes them; without `weights` only its shape, on the meta device.

    Raises:
        CheckpointError: the base is not there.
        ConfigError: a setting is unknown, or the parts do not fit together.
    """
    from metamorph.decoder import DecoderModel, Objective, from_base, from_pretrained_diffusion
    from metamorph.decoder.library import UNet2DConditionModel
    from metamorph.decoder.parts import load_module
    from metamorph.decoder.schedule import load_scheduler

    start = from_pretrained_diffusion if config.latent else from_base
    own = ("path", "base", "visual_width", "num_visual_tokens", "weights", "objective")
    _check_names(config.conditioner, [name for name in inspect.signature(start).parameters if name not in own], "decoder.conditioner")
    _check_names(config.objective, [field.name for field in fields(Objective)], "decoder.objective")
    vision: Any = encoder.vision_config
    sizes = {"visual_width": vision.hidden_size, "num_visual_tokens": encoder.num_visual_tokens}
    if config.latent:
        decoder = from_pretrained_diffusion(config.base, weights=weights, **sizes, **config.conditioner)
    else:
        unet = load_module(UNet2DConditionModel, config.base, "unet", weights=weights)
        try:
            base = DecoderModel(unet, load_scheduler(config.base, latent=False))
        except OSError as error:
            raise CheckpointError(f"{error} but a saved scheduler was expected ({config.base}). Give the base of a decoder.") from error
        with torch.device("cpu" if weights else "meta"):
            decoder = from_base(base, **sizes, **config.conditioner)
    decoder.objective = replace(decoder.objective, **config.objective)
    return decoder


def build_decoder_stream(config: DecoderConfig, training: TrainingConfig, encoder: TokenEncoder) -> DecoderStream:
    """This process's share of the decoder's batches: pixels, and the visual tokens of the frozen encoder.

    Raises:
        ConfigError: the function that makes them cannot be found or called.
    """
    from metamorph.decoder import DecoderStream

    share = training.batch_size // world_size()
    micro = training.micro_batch_size or share
    if share % micro or training.batch_size % world_size():
        sizes = f"batch_size {training.batch_size}, {world_size()} processes and micro_batch_size {training.micro_batch_size}"
        raise ConfigError(f"{sizes} but they must divide (decoder). Choose multiples.")
    call = partial(_call, config.batches, encode=encoder, size=micro)
    parts = share // micro
    makers = [call(seed=(training.seed * world_size() + rank()) * parts + part) for part in range(parts)]
    return DecoderStream(lambda step: [make(step) for make in makers])


def load_source(config: SourceConfig, first: int = 0) -> ExampleSource:
    """Call what the dotted path names. Of a stream only its `first` rows, if any, are given, for they alone can be asked for by number.

    Raises:
        ConfigError: it cannot be found or called with these arguments, or does not return an ExampleSource; or it is a stream, and no
            first rows are enough.
    """
    source = _load(config)
    if not isinstance(source, StreamedSource):
        return source
    if not first:
        raise ConfigError(f"a stream but rows by number are needed ({source.name}). Download it: metamorph.data.source.open_source.")
    return source.head(first)


def _load(config: SourceConfig) -> Any:
    source = _call(config)
    if not isinstance(source, ExampleSource | StreamedSource):
        raise ConfigError(
            f"{type(source).__name__} but an ExampleSource was expected ({config.source}). Return one with name, len and [i]."
        )
    return source


def load_object(path: str) -> Any:
    """What a dotted path names.

    Raises:
        ConfigError: there is no such module or name; with the nearest.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{path!r} but a dotted path such as package.module.function was expected: {error}. Check the spelling."
        ) from None
    if not hasattr(module, name):
        raise ConfigError(unknown_name(name, [known for known in dir(module) if not known.startswith("_")], f"name in {module_name}"))
    return getattr(module, name)


def _call(config: SourceConfig, **given: Any) -> Any:
    function = load_object(config.source)
    signature = inspect.signature(function)
    if not any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values()):
        _check_names(config.kwargs, [name for name in signature.parameters if name not in given], f"{config.source} kwargs", "argument")
    try:
        signature.bind(**given, **config.kwargs)
    except TypeError as error:
        must = f"they must fit {config.source}{signature}"
        raise ConfigError(f"arguments {sorted(config.kwargs)} but {must}: {error}. Correct kwargs.") from None
    return function(**given, **config.kwargs)


def _check_names(settings: Mapping[str, Any], known: list[str], section: str, what: str = "setting") -> None:
    for name in settings:
        if name not in known:
            raise ConfigError(f"{unknown_name(name, known, what)} ({section})")
