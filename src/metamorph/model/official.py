"""Checkpoints in the layout of the authors' released code become checkpoints of ours: names and settings change, no number does.

Their layout: `config.json` with the LLM's settings at the top level and the multimodal ones beside them, and safetensors in which
everything hangs under a Llama model (`model.layers`, `model.mm_projector`, `model.vision_tower.vision_tower`, `vision_head`, `lm_head`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase, SiglipVisionConfig

from metamorph.errors import CheckpointError, ConfigError
from metamorph.model.configuration import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN, MetaMorphConfig
from metamorph.model.conversion import read_image_settings, with_end_of_turn
from metamorph.model.modeling import MetaMorph
from metamorph.model.processing import MetaMorphProcessor, check_template
from metamorph.model.vision_encoder import load_vision_model
from metamorph.places import check_source

ENCODER = "vision_encoder.encoder."
_PREFIXES = {  # the longest that fits is replaced; the first four are not the LLM's
    "model.vision_tower.vision_tower.vision_model.": ENCODER,  # as older transformers nested it
    "model.vision_tower.vision_tower.": ENCODER,
    "model.mm_projector.": "projector.layers.",
    "vision_head.": "vision_head.layers.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_EXPECTED = {  # settings of which our model has one value only: what else they could be changes the computation
    "mm_vision_select_feature": "patch",
    "image_token_reduction": "interpolation",
    "apply_softmax": False,
    "mm_use_im_start_end": True,
}
_TOGETHER = "Do config.json and weights belong together?"
_HEADS = {"mlp2x_gelu": "mlp", "mlp": "mlp", "linear": "linear"}


def convert_official(
    directory: str | Path, out: str | Path, *, vision: str | Path | None = None, tokenizer: str | Path | None = None
) -> MetaMorphConfig:
    """Write the checkpoint of the authors' code in `directory` as one that `MetaMorph.from_pretrained(out)` loads, in the same precision.

    Args:
        directory: `config.json` and safetensors (one file, or shards with their index).
        out: gets config, weights, generation settings and, where a tokenizer is known, the processor.
        vision: the encoder, if the checkpoint holds no weights or no sizes of it: a directory or a name on the hub.
        tokenizer: by default the one in `directory`, if there is one.

    Raises:
        CheckpointError: a file or tensor is missing, unknown, or of another shape.
        ConfigError: a setting that our model does not have.
        TemplateError: the tokenizer's chat template does not show what the assistant says.
    """
    directory, out = Path(directory), Path(out)
    settings = _read_settings(directory)
    tensors = _rename(_read_tensors(directory), settings)
    encoder = None if vision is None else load_vision_model(vision)
    if encoder is not None and not any(name.startswith(ENCODER) for name in tensors):
        tensors |= {ENCODER + name: value for name, value in encoder.state_dict().items()}
    words = _read_tokenizer(tokenizer or directory, required=tokenizer is not None)
    vision_config = _vision_config(settings, tensors, directory) if encoder is None else encoder.config
    config = _config(settings, vision_config, words, directory)
    _check_tensors(config, tensors, directory)
    generation = _generation_config(directory, config)
    if words is not None:
        side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
        # An encoder inside the checkpoint is a SigLIP, whose pixels are the processor's default.
        images = {"image_size": (side, side)} if vision is None or encoder is None else vars(read_image_settings(vision, encoder.config))
        processor = MetaMorphProcessor(words, config.num_visual_tokens, max_length=length, **images)
        generation.eos_token_id = with_end_of_turn(generation.eos_token_id, check_template(processor))
        processor.save_pretrained(out)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    generation.save_pretrained(out)
    save_torch_state_dict(dict(tensors), out)
    return config


def _generation_config(directory: Path, config: MetaMorphConfig) -> GenerationConfig:
    """The settings saved with the checkpoint, among them all ids that end an answer; else those of the LLM's config."""
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(config.text_config)


def _read_settings(directory: Path) -> dict[str, Any]:
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no readable config.json but the authors' layout was expected ({directory}): {error}. Give the folder of a checkpoint."
        ) from error
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_image_tokens", "mm_projector_type")
    if missing := [name for name in needed if name not in settings]:
        raise CheckpointError(
            f"no setting {', '.join(missing)} but the authors' layout was expected ({directory / 'config.json'}). "
            "Give a checkpoint of their code; for other models there is `metamorph init`."
        )
    for name, value in _EXPECTED.items():
        if settings.get(name, value) != value:
            raise ConfigError(
                f"{name}={settings[name]!r} but only {value!r} can be converted ({directory / 'config.json'}). Train it anew."
            )
    return settings


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """All weights: of the shards that an index names, of model.safetensors, or of the one file that holds an LLM's embeddings."""
    index = directory / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [directory / name for name in names]
        elif (directory / "model.safetensors").is_file():
            files = [directory / "model.safetensors"]
        else:
            files = [path for path in sorted(directory.glob("*.safetensors")) if "model.embed_tokens.weight" in _names(path)]
        if len(files) != 1 and not index.is_file():
            found = f"{len(files)} safetensors files with model.embed_tokens.weight"
            raise CheckpointError(f"{found} but 1 was expected ({directory}). Name the weights model.safetensors, or add an index.")
        return {name: value for path in files for name, value in load_file(path).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{error} but readable safetensors were expected ({directory}). Copy the checkpoint again.") from error


def _names(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def _rename(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise CheckpointError(
                f"a tensor {name} but names that begin with {', '.join(_PREFIXES)} were expected (weights). "
                "Is this a checkpoint of the authors' code?"
            )
        rest = name[len(prefix) :]
        linear = rest in ("weight", "bias") and prefix in ("model.mm_projector.", "vision_head.")  # a single layer has no number there
        renamed[_PREFIXES[prefix] + ("0." if linear else "") + rest] = value
    if settings.get("tie_word_embeddings"):
        renamed.pop("language_model.lm_head.weight", None)
    return renamed


def _read_tokenizer(place: str | Path, *, required: bool) -> PreTrainedTokenizerBase | None:
    if not required and not any((Path(place) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    check_source(place, "a tokenizer")
    try:
        words = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error} but a tokenizer was expected ({place}). Give --tokenizer the LLM's directory.") from error
    added = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN)]
    words.add_tokens(added, special_tokens=True)  # those that it has keep their ids
    return words


def _vision_config(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: Path) -> SiglipVisionConfig:
    sizes, tower = settings.get("siglip_config"), any(name.startswith(ENCODER) for name in tensors)
    if sizes is None or not tower:
        lacking = "weights" if sizes is not None else "sizes (siglip_config)"
        encoder = settings.get("mm_vision_tower", "its encoder")
        raise CheckpointError(
            f"no {lacking} of the vision encoder {encoder} but both are needed ({directory}). "
            "Give --vision, such as google/siglip-so400m-patch14-384."
        )
    head = any(name.startswith(f"{ENCODER}head.") for name in tensors)
    return SiglipVisionConfig(**{**sizes, "vision_use_head": head})


def _config(
    settings: Mapping[str, Any], vision_config: SiglipVisionConfig, words: PreTrainedTokenizerBase | None, directory: Path
) -> MetaMorphConfig:
    rope = {"rope_type": "default", **(settings.get("rope_scaling") or {}), "rope_theta": settings.get("rope_theta", 10000.0)}
    known = set(LlamaConfig().to_dict()) - {"model_type", "rope_parameters", "architectures", "transformers_version", "dtype"}
    text = LlamaConfig(**{name: value for name, value in settings.items() if name in known}, rope_parameters=rope)
    ids: dict[str, Any] = {
        "image_start_token_id": settings.get("image_start_token_id"),
        "image_end_token_id": settings.get("image_end_token_id"),
    }
    if words is not None:
        found = {"image_start_token_id": IMAGE_START_TOKEN, "image_end_token_id": IMAGE_END_TOKEN}
        for name, token in found.items():
            number = words.convert_tokens_to_ids(token)
            if ids[name] not in (None, number):
                raise CheckpointError(f"{token} is {number} in the tokenizer but {ids[name]} in config.json ({directory}). Use its own.")
            ids[name] = number
    if None in ids.values():
        raise CheckpointError(f"ids {ids} but two numbers were expected ({directory}). Add them to config.json, or give --tokenizer.")
    if not all(isinstance(number, int) and 0 <= number < text.vocab_size for number in ids.values()):
        found = f"ids {ids} but two below {text.vocab_size}, the rows of the embedding, were expected ({directory})"
        raise CheckpointError(f"{found}. Give --tokenizer the checkpoint's own.")
    # A place in a sequence where a visual token stands; it is never read or said, and has no row in either matrix.
    placeholder = text.vocab_size if words is None else words.convert_tokens_to_ids(IMAGE_TOKEN)
    projector, head = settings["mm_projector_type"], settings.get("vision_head_type", "mlp")
    if projector not in _HEADS or head not in _HEADS:
        raise ConfigError(f"heads {projector!r} and {head!r} but one of {', '.join(_HEADS)} was expected ({directory}). Train it anew.")
    normalized = settings.get("normalize_vision", True)
    return MetaMorphConfig(
        text_config=text,
        vision_config=vision_config,
        num_visual_tokens=settings["num_image_tokens"],
        vision_feature_layer=settings.get("mm_vision_select_layer", -1),
        normalize_visual_tokens=normalized,
        projector_type=_HEADS[projector],
        vision_head_type=_HEADS[head],
        visual_loss="cosine" if normalized else "l1",  # what their code calls mse is the mean absolute error
        visual_loss_weight=settings.get("vision_coef", 1.0) if settings.get("use_vision_ar", True) else 0.0,
        image_token_id=placeholder,
        architectures=["MetaMorph"],
        **ids,
    )


def _check_tensors(config: MetaMorphConfig, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Compare names and shapes with an empty model of these settings."""
    with torch.device("meta"):
        model = MetaMorph(config)
    tied = set(model.all_tied_weights_keys)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        sample = (missing or unknown)[0]
        found = f"{len(missing)} tensors absent and {len(unknown)} unknown, such as {sample} (our name),"
        raise CheckpointError(f"{found} but the weights of the whole model were expected ({directory}). {_TOGETHER}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{name} of shape {tuple(tensors[name].shape)} but {shape} was expected ({directory}). {_TOGETHER}")
