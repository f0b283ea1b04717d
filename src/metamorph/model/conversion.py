"""Building a MetaMorph from a pretrained LLM and vision encoder, and keeping several models beside one encoder.

Axes: none; whole models.
"""

import difflib
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from metamorph.errors import CheckpointError, ConfigError
from metamorph.media import Resample
from metamorph.model.attention import PACKED_ATTENTION
from metamorph.model.card import origin_of
from metamorph.model.checks import check_encoder, check_language_model, check_reading
from metamorph.model.configuration import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN, MetaMorphConfig
from metamorph.model.modeling import MetaMorph
from metamorph.model.processing import MetaMorphProcessor, check_template
from metamorph.model.vision_encoder import AbsentEncoder, load_vision_model, read_vision_config
from metamorph.places import check_source

CONFIG_CHOICES = (
    "num_visual_tokens",
    "vision_feature_layer",
    "vision_post_layernorm",
    "pooling",
    "normalize_visual_tokens",
    "projector_type",
    "vision_head_type",
    "visual_loss",
    "visual_loss_weight",
)
PROCESSOR_CHOICES = (
    "image_size",
    "image_mean",
    "image_std",
    "image_resample",
    "scaled_jpeg",
    "max_length",
    "chat_template",
    "template_variables",
)

_RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class ImageSettings:
    """How an encoder wants its pixels."""

    image_size: tuple[int, int]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_resample: Resample


def initialize(
    llm: str | Path, vision: str | Path, *, seed: int = 0, with_encoder: bool = True, **choices: Any
) -> tuple[MetaMorph, MetaMorphProcessor]:
    """Join a causal LM and a vision encoder, both from a directory or the hub; projector and vision head are new, random by `seed`.

    `choices` are settings of the config (`num_visual_tokens`, `pooling`, ...) or of the processor (`image_size`, `chat_template`, ...).
    Without `with_encoder` its weights are left out, for work on visual tokens that are ready.

    Raises:
        ConfigError: an unknown setting, with the nearest name; or a model that cannot be joined, such as an encoder without patches.
        AlignmentError: the encoder keeps fewer states than patches.
        CheckpointError: a checkpoint is incomplete, or not in safetensors.
        TemplateError: the LLM's chat template does not show what the assistant says.
    """
    _check_choices(choices)
    tokenizer, language_model = load_language_model(llm)
    check_language_model(language_model)
    encoder = load_vision_model(vision) if with_encoder else AbsentEncoder(read_vision_config(vision))
    ids = add_image_tokens(language_model, tokenizer)
    config = MetaMorphConfig(
        text_config=language_model.config,
        vision_config=encoder.config,
        image_token_id=ids[IMAGE_TOKEN],
        image_start_token_id=ids[IMAGE_START_TOKEN],
        image_end_token_id=ids[IMAGE_END_TOKEN],
        origins={"llm": origin_of(llm), "vision": origin_of(vision)},
        **{name: choices[name] for name in CONFIG_CHOICES if name in choices},
    )
    images = read_image_settings(vision, encoder.config)
    processor = _join_processor(tokenizer, language_model.config, images, config.num_visual_tokens, choices)
    end_of_turn = check_template(processor)
    model = _assemble(config, language_model, encoder, seed)
    model.generation_config.eos_token_id = with_end_of_turn(model.generation_config.eos_token_id, end_of_turn)
    check_reading(model)
    if with_encoder:
        check_encoder(model, processor.image_size)
    return model, processor


def read_processor(llm: str | Path, vision: str | Path, **choices: Any) -> MetaMorphProcessor:
    """The processor that `initialize` would make of these parts, from what is on this machine, without any weights.

    Raises:
        CheckpointError: a file is not here.
        ConfigError, TemplateError: as `initialize`.
    """
    _check_choices(choices)
    for part, what in ((llm, "a causal LM in safetensors"), (vision, "a vision encoder in safetensors")):
        check_source(part, what)
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm, local_files_only=True)
        text, encoder = (AutoConfig.from_pretrained(part, local_files_only=True) for part in (llm, vision))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error} but tokenizer and configs were expected ({llm}, {vision}). Give complete checkpoints.") from error
    _add_tokens(tokenizer)
    images = read_image_settings(vision, getattr(encoder, "vision_config", encoder), local_files_only=True)
    size = choices.get("num_visual_tokens", MetaMorphConfig.num_visual_tokens)
    processor = _join_processor(tokenizer, text.get_text_config(), images, size, choices)
    check_template(processor)
    return processor


def _check_choices(choices: dict[str, Any]) -> None:
    known = (*CONFIG_CHOICES, *PROCESSOR_CHOICES)
    for name in set(choices) - set(known):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"setting {name!r} but one of {', '.join(known)} was expected (initialize). Did you mean {nearest!r}?")


def _join_processor(
    tokenizer: PreTrainedTokenizerBase, text: PretrainedConfig, images: ImageSettings, num_visual_tokens: int, choices: dict[str, Any]
) -> MetaMorphProcessor:
    settings = vars(images) | {name: choices[name] for name in PROCESSOR_CHOICES if name in choices}
    settings.setdefault("max_length", getattr(text, "max_position_embeddings", None))
    return MetaMorphProcessor(tokenizer, num_visual_tokens=num_visual_tokens, **settings)


def load_language_model(path: str | Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and causal LM, float32, from safetensors only.

    Raises:
        CheckpointError: files are missing or broken.
    """
    check_source(path, "a causal LM in safetensors")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = "Give the directory of a complete checkpoint."
        raise CheckpointError(f"{error} but a causal LM in safetensors was expected ({path}). {remedy}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{len(missing)} tensors absent, such as {missing[0]}, but a complete causal LM was expected ({path}). Save it again."
        )
    return tokenizer, model


def add_image_tokens(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Add the placeholder, `<image_start>` and `<image_end>`; their rows in both embeddings are the mean of the tokenizer's rows.

    Matrices already long enough keep their size. A token that the tokenizer had keeps its row.
    """
    old = len(tokenizer)
    ids = _add_tokens(tokenizer)
    rows = language_model.get_input_embeddings().weight.shape[0]
    if max(ids.values()) >= rows:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = sorted(number for number in ids.values() if number >= old)
    with torch.no_grad():
        for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            for values in (module.weight, getattr(module, "bias", None)):
                if values is not None:  # a tied matrix is written twice with the same mean: the old rows do not change
                    values[new] = values[: min(old, rows)].mean(dim=0)
    return ids


def _add_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    tokens = (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    numbers: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    return {token: int(number) for token, number in zip(tokens, numbers, strict=True)}


def read_image_settings(vision: str | Path, config: PretrainedConfig, *, local_files_only: bool = False) -> ImageSettings:
    """Size, mean, standard deviation and filter from the encoder's preprocessor settings. Pixels are resized to the size, never cropped.

    What the settings leave open the encoder's `config` says.

    Raises:
        CheckpointError: there are no such settings and the encoder's family has no fixed ones.
    """
    read = partial(_read_json, vision, local_files_only=local_files_only)
    saved = read("preprocessor_config.json") or read("processor_config.json").get("image_processor", {})
    if not saved and not config.model_type.startswith("siglip"):
        raise CheckpointError(f"no preprocessor_config.json but one was expected ({vision}). Copy it from the encoder's repository.")
    size = saved.get("crop_size") if saved.get("do_center_crop") else saved.get("size")
    resample = saved.get("resample", 3)
    if resample not in _RESAMPLE:
        raise ConfigError(f"resample={resample} but one of {_RESAMPLE} was expected ({vision}). Set image_resample.")
    normalized = saved.get("do_normalize", True)
    return ImageSettings(
        image_size=_size(size, config),
        image_mean=tuple(saved.get("image_mean", (0.5, 0.5, 0.5))) if normalized else (0.0, 0.0, 0.0),
        image_std=tuple(saved.get("image_std", (0.5, 0.5, 0.5))) if normalized else (1.0, 1.0, 1.0),
        image_resample=_RESAMPLE[resample],
    )


def save_without_encoder(
    model: MetaMorph,
    processor: MetaMorphProcessor,
    directory: str | Path,
    encoder_reference: str = "../encoder",
    dtype: torch.dtype | None = None,
) -> None:
    """Save a model without its frozen encoder, which `from_pretrained` then reads from `encoder_reference`, relative to `directory`.

    Args:
        model: the model; unchanged afterwards.
        processor: saved beside it.
        directory: where to save.
        encoder_reference: path of the encoder's own checkpoint.
        dtype: of the saved weights, by default the model's.
    """
    tied = set(model.all_tied_weights_keys)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("vision_encoder.") and name not in tied}
    if dtype is not None:
        kept = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
    model.config.vision_encoder_path = encoder_reference
    try:
        model.save_pretrained(directory, state_dict=kept)
    finally:
        model.config.vision_encoder_path = None
    processor.save_pretrained(directory)


def load(directory: str | Path, **kwargs: Any) -> tuple[MetaMorph, MetaMorphProcessor]:
    """Model and processor of one directory, checked against each other.

    Raises:
        CheckpointError: one is missing or incomplete, or they belong to different models.
    """
    model, processor = MetaMorph.from_pretrained(directory, **kwargs), MetaMorphProcessor.from_pretrained(directory)
    config = model.config
    pairs = {
        "num_visual_tokens": (processor.num_visual_tokens, config.num_visual_tokens),
        "image_token_id": (processor.image_token_id, config.image_token_id),
        "image_start_token_id": (processor.image_start_id, config.image_start_token_id),
        "image_end_token_id": (processor.image_end_id, config.image_end_token_id),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise CheckpointError(f"{name} {found} in the processor but {expected} in the model ({directory}). Save both from one model.")
    return model, processor


def _assemble(config: MetaMorphConfig, language_model: PreTrainedModel, encoder: PreTrainedModel | AbsentEncoder, seed: int) -> MetaMorph:
    with torch.device("meta"):  # the pretrained parts take the place of these: nothing is allocated twice
        model = MetaMorph(config)
    model.language_model, model.vision_encoder.encoder = language_model, encoder.requires_grad_(False)
    model.config.text_config, model.config.vision_config = language_model.config, encoder.config
    if language_model.config._attn_implementation == "sdpa" and language_model._supports_attention_backend:
        language_model.set_attn_implementation(PACKED_ATTENTION)
    model.generation_config = language_model.generation_config
    generator = torch.Generator().manual_seed(seed)
    for bridge in (model.projector, model.vision_head):
        bridge.to_empty(device="cpu")
        for layer in bridge.modules():
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                for values in layer.parameters():
                    nn.init.uniform_(values, -bound, bound, generator=generator)
    if config.normalize_visual_tokens:  # a unit vector of v components is read as loudly as one whose components are about 1
        model.projector.layers[0].weight.data.mul_(math.sqrt(config.vision_config.hidden_size))
    return model.eval()


def with_end_of_turn(known: int | list[int] | None, end_of_turn: int) -> list[int]:
    """The ids that end an answer, with the one that the chat template ends a turn with."""
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    return ids if end_of_turn in ids else [*ids, end_of_turn]


def _read_json(path: str | Path, name: str, *, local_files_only: bool) -> dict[str, Any]:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, name, local_files_only=local_files_only, **quiet)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def _size(saved: dict[str, int] | int | None, config: PretrainedConfig) -> tuple[int, int]:
    if isinstance(saved, int):
        return saved, saved
    if saved and "height" in saved:
        return saved["height"], saved["width"]
    if saved and "shortest_edge" in saved:
        return saved["shortest_edge"], saved["shortest_edge"]
    side = getattr(config, "image_size", None)
    if side is None:  # encoders of flexible resolution know only how many patches they were trained with
        side = math.isqrt(config.num_patches) * config.patch_size
    return (side, side) if isinstance(side, int) else (side[0], side[1])
