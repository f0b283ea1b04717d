"""The one door to diffusers: everything the decoder takes from it, and a clear message where it is not installed."""

try:
    from diffusers import (
        AutoencoderDC,
        AutoencoderKL,
        DDIMScheduler,
        DiffusionPipeline,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaTransformer2DModel,
        UNet2DConditionModel,
    )
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "diffusers":
        raise
    raise ImportError(
        "no diffusers but the decoder (visual tokens to pixels) needs it. Install it: pip install 'diffusers>=0.42,<0.43'"
    ) from error

Autoencoder = AutoencoderKL | AutoencoderDC
Denoiser = UNet2DConditionModel | SanaTransformer2DModel
Scheduler = DDIMScheduler | FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler

__all__ = [
    "Autoencoder",
    "AutoencoderDC",
    "AutoencoderKL",
    "ConfigMixin",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "Denoiser",
    "DiffusionPipeline",
    "FlowMatchEulerDiscreteScheduler",
    "ModelMixin",
    "SanaTransformer2DModel",
    "Scheduler",
    "UNet2DConditionModel",
    "register_to_config",
]
