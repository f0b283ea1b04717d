"""Tiny random models of every family: LLMs with tokenizers of their own kind and their published chat templates, and vision encoders.

llm_directory(name, root), vision_directory(name, root)    directories as a user would have them on disk
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
WIDTH, VISION_WIDTH, IMAGE, PATCH, K, WINDOW = 32, 24, 32, 8, 4, 16
SENTENCES = [
    "A small red star at the top left.\n\n",
    "What is this? Draw it, please!\n",
    "Here is an image based on your request:",
    "blue green 12 user assistant model system",
]


@dataclass(frozen=True)
class Family:
    """An LLM family: which classes, which tokenizer with which special tokens, which chat template."""

    model_type: str
    tokenizer: Callable[[tuple[str, ...]], Any]
    template: str
    specials: tuple[str, ...]  # of the kind that mark turns
    end_of_turn: str
    bos: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


# ---- tokenizers of each kind


@cache
def trained(kind: str) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of a small BPE: over bytes, or over characters with `▁` for a space and byte tokens for the rest."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(byte_fallback=kind == "characters"))
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    core.train_from_iterator(SENTENCES * 4, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def characters_vocabulary(first: tuple[str, ...]) -> tuple[dict[str, int], Any]:
    """The vocabulary over characters, with these tokens and the 256 byte tokens before it, as SentencePiece lays it out."""
    vocabulary, merges = trained("characters")
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(vocabulary, key=vocabulary.__getitem__)]
    return {token: number for number, token in enumerate(tokens)}, merges


def llama3_tokenizer(specials: tuple[str, ...]) -> Any:
    """Bytes, split as Llama 3 splits; writes <|begin_of_text|> before every text unless told otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = trained("bytes")
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    bos = "<|begin_of_text|>"
    begin = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="<|eot_id|>", clean_up_tokenization_spaces=False)


def qwen_tokenizer(specials: tuple[str, ...]) -> Any:
    """Bytes, no beginning of sequence; the thinking tokens are added tokens but not special ones."""
    from transformers import AddedToken, Qwen2Tokenizer

    vocabulary, merges = trained("bytes")
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer


def smollm3_tokenizer(specials: tuple[str, ...]) -> Any:
    """Llama 3's kind, with ChatML's tokens and no beginning of sequence in conversations."""
    from tokenizers import AddedToken

    tokenizer = llama3_tokenizer(("<|begin_of_text|>", "<|end_of_text|>", *specials))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def gemma_tokenizer(specials: tuple[str, ...]) -> Any:
    """Characters, no space before a text, byte fallback; writes <bos>."""
    from transformers import AddedToken, GemmaTokenizer

    vocabulary, merges = characters_vocabulary(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    return tokenizer


def mistral_tokenizer(specials: tuple[str, ...]) -> Any:
    """Characters, a space before the first word of every text, byte fallback; writes <s>."""
    from transformers import AddedToken, LlamaTokenizer

    vocabulary, merges = characters_vocabulary(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    return tokenizer


# ---- the families

LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
GEMMA_TOKENS, CHATML_TOKENS = ("<start_of_turn>", "<end_of_turn>"), ("<|im_start|>", "<|im_end|>")
TIED, SLIDING = {"tie_word_embeddings": True}, {"sliding_window": WINDOW}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "query_pre_attn_scalar": 8}

LLMS = {
    "llama": Family("llama", llama3_tokenizer, "llama", LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>"),
    "qwen3": Family("qwen3", qwen_tokenizer, "qwen3", CHATML_TOKENS, "<|im_end|>", settings=TIED | {"head_dim": 8}),
    "gemma": Family("gemma", gemma_tokenizer, "gemma", GEMMA_TOKENS, "<end_of_turn>", "<bos>", TIED | {"head_dim": 8}),
    "gemma2": Family(
        "gemma2",
        gemma_tokenizer,
        "gemma",
        GEMMA_TOKENS,
        "<end_of_turn>",
        "<bos>",
        TIED | SLIDING | ALTERNATING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": Family("gemma3_text", gemma_tokenizer, "gemma3", GEMMA_TOKENS, "<end_of_turn>", "<bos>", TIED | SLIDING | ALTERNATING),
    "mistral": Family("mistral", mistral_tokenizer, "mistral", ("[INST]", "[/INST]"), "</s>", "<s>", SLIDING),
    "smollm3": Family("smollm3", smollm3_tokenizer, "smollm3", CHATML_TOKENS, "<|im_end|>", settings=TIED | {"no_rope_layers": [1, 0]}),
    # Not asked for by name, but of a kind of its own: it multiplies what it reads inside, and divides its logits.
    "granite": Family(
        "granite",
        llama3_tokenizer,
        "llama",
        LLAMA3_TOKENS,
        "<|eot_id|>",
        "<|begin_of_text|>",
        TIED | {"embedding_multiplier": 12.0, "logits_scaling": 8.0},
    ),
}


def template(name: str) -> str:
    """A published chat template; see the README beside them."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def llm_directory(name: str, root: Path, **changes: Any) -> Path:
    """Save a tiny random LLM of a family, with its tokenizer; its weights are large, so that what is said depends on the past."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = LLMS[name]
    tokenizer = family.tokenizer(family.specials)
    tokenizer.chat_template = template(family.template)
    config = AutoConfig.for_model(
        family.model_type,
        **{
            "vocab_size": len(tokenizer) + 5,  # longer than the tokenizer, as published matrices are
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | family.settings
        | changes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    return root / name


# ---- vision encoders

_SIZES = {"hidden_size": VISION_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = _SIZES | {"image_size": IMAGE, "patch_size": PATCH}
_SQUARE_MLP = _SQUARE | {"intermediate_size": 48}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_CROP = {"do_center_crop": True, "crop_size": {"height": IMAGE, "width": IMAGE}}


@dataclass(frozen=True)
class Vision:
    """A vision family: its config, and the preprocessor settings in the shape in which that family publishes them."""

    model_type: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    two_towers: str | None = None  # model type of the checkpoint that also holds a text tower


VISIONS = {
    "siglip": Vision("siglip_vision_model", _SQUARE_MLP, _HALF | {"size": {"height": IMAGE, "width": IMAGE}, "resample": 3}, "siglip"),
    "siglip2": Vision(
        "siglip2_vision_model",
        _SIZES | {"intermediate_size": 48, "num_patches": (IMAGE // PATCH) ** 2, "patch_size": PATCH},
        _HALF | {"max_num_patches": (IMAGE // PATCH) ** 2, "patch_size": PATCH, "resample": 2},
        "siglip2",
    ),
    "clip": Vision("clip_vision_model", _SQUARE_MLP, _CLIP | _CROP | {"size": {"shortest_edge": IMAGE}}, "clip"),
    "dinov2": Vision("dinov2", _SQUARE, _IMAGENET | _CROP | {"size": {"shortest_edge": IMAGE + 8}}),
    "dinov2_registers": Vision(
        "dinov2_with_registers", _SQUARE | {"num_register_tokens": 3}, _IMAGENET | _CROP | {"size": {"shortest_edge": IMAGE + 8}}
    ),
}


def vision_directory(name: str, root: Path, *, two_towers: bool = False, **changes: Any) -> Path:
    """Save a tiny random vision encoder of a family, alone or with its text tower, and its preprocessor settings."""
    from transformers import AutoConfig, AutoModel

    vision = VISIONS[name]
    torch.manual_seed(1)
    config = AutoConfig.for_model(vision.model_type, **vision.config | changes)
    if two_towers:
        assert vision.two_towers is not None
        text = {"vocab_size": 64, "hidden_size": VISION_WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(vision.two_towers, text_config=text, vision_config=config.to_dict(), projection_dim=VISION_WIDTH)
    directory = root / (name + ("_two_towers" if two_towers else ""))
    AutoModel.from_config(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(vision.preprocessor))
    return directory
