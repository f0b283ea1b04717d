"""The one door to diffusers: everything the decoder takes from it, and a clear message where it is not installed."""

try:
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "diffusers":
        raise
    raise ImportError(
        "no diffusers but the decoder (visual tokens to pixels) needs it. Install it with: pip install 'metamorph[decoder]'"
    ) from error

Scheduler = DDIMScheduler | FlowMatchEulerDiscreteScheduler

__all__ = [
    "AutoencoderKL",
    "ConfigMixin",
    "DDIMScheduler",
    "DiffusionPipeline",
    "FlowMatchEulerDiscreteScheduler",
    "ModelMixin",
    "Scheduler",
    "UNet2DConditionModel",
    "register_to_config",
]
