"""Tiny random diffusion models on disk, file by file as the published ones are laid out: Stable Diffusion 1.5, and Sana.

The parts are real classes with random weights; the JSON files have the fields that the published ones have, which are those of the
library's versions of their day.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = b"\x80\x02not to be read."

PNDM: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def save_stable_diffusion(root: Path, *, sample_size: int = 8, context_width: int = 32) -> Path:
    """Stable Diffusion 1.5 in small: images of 8 x `sample_size` pixels. Beside the weights lie others that must not be read."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 2,
        "block_out_channels": [8, 16, 16, 16],
        "center_input_sample": False,
        "cross_attention_dim": context_width,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": sample_size,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    vae: dict[str, Any] = {  # no scaling_factor: it is the library's default, 0.18215
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 8 * sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    _save(root / "unet", unet, UNet2DConditionModel.from_config(unet).state_dict(), "non_ema")
    # the published VAE has the names that attention had in those days
    old = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    state = AutoencoderKL.from_config(vae).state_dict()
    for new, name in old:
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    _save(root / "vae", vae, state)
    _write(root / "scheduler/scheduler_config.json", PNDM)
    _save_clip(root, context_width)
    _write(
        root / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.6.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned-emaonly.ckpt"):
        (root / name).write_bytes(PICKLE)
    (root / "v1-inference.yaml").write_text("model: {}\n")
    return root


def save_sana(root: Path, *, sample_size: int = 8, context_width: int = 16, scheduler: str = "dpm") -> Path:
    """Sana in small, with its DPM-Solver (or "euler"), both with flow shift 3; an autoencoder to an eighth of an image, 8 channels."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=context_width,
        sample_size=sample_size,
    ).save_pretrained(root / "transformer")
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).save_pretrained(root / "vae")
    own = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    steps = DPMSolverMultistepScheduler(**own) if scheduler == "dpm" else FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps.save_pretrained(root / "scheduler")
    sizes = {"vocab_size": 16, "hidden_size": context_width, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    Gemma2Model(Gemma2Config(**sizes, **heads)).save_pretrained(root / "text_encoder")
    _write(root / "tokenizer/tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    _write(
        root / "model_index.json",
        {
            "_class_name": "SanaPipeline",
            "_diffusers_version": "0.32.0.dev0",
            "scheduler": ["diffusers", type(steps).__name__],
            "text_encoder": ["transformers", "Gemma2Model"],
            "tokenizer": ["transformers", "GemmaTokenizerFast"],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderDC"],
        },
    )
    return root


def _save(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], *variants: str) -> None:
    """Config and weights; beside them half-precision and other variants with other values, and pickles."""
    _write(folder / "config.json", config)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
    for variant in ("fp16", *variants):
        other = {name: (value + 1).half() for name, value in state.items()}
        save_file(other, folder / WEIGHTS.replace(".safetensors", f".{variant}.safetensors"), {"format": "pt"})
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"):
        (folder / name).write_bytes(PICKLE)


def _save_clip(root: Path, width: int) -> None:
    """What a decoder does not need: text encoder and tokenizer, safety checker and its feature extractor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = {letter: number for number, letter in enumerate(["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"])}
    tokens = {"vocab_size": len(vocabulary), "bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 5}
    CLIPTextModel(CLIPTextConfig(**sizes, **tokens)).save_pretrained(root / "text_encoder")
    _write(root / "tokenizer/vocab.json", vocabulary)
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    _write(root / "tokenizer/tokenizer_config.json", {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    vision = sizes | {"image_size": 32, "patch_size": 16}
    checker = CLIPConfig(text_config=sizes | tokens, vision_config=vision, projection_dim=8)
    StableDiffusionSafetyChecker(checker).save_pretrained(root / "safety_checker")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root / "feature_extractor")
    settings = root / "feature_extractor/preprocessor_config.json"
    _write(settings, json.loads(settings.read_text()) | {"image_processor_type": "CLIPImageProcessor"})
    for folder in ("text_encoder", "safety_checker"):
        (root / folder / "model.fp16.safetensors").write_bytes((root / folder / "model.safetensors").read_bytes())
        (root / folder / "pytorch_model.bin").write_bytes(PICKLE)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
