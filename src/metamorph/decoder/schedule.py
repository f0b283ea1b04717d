"""Schedules: what a noisy sample is at each time, what a denoiser then predicts, and the steps from noise to a sample.

Axes: n images, p sample channels, s side of the sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metamorph.decoder.library import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, Scheduler
from metamorph.errors import ConfigError

Prediction = Literal["flow", "epsilon", "v_prediction", "sample"]


def build_scheduler(prediction: Prediction, *, time_shift: float = 1.0) -> Scheduler:
    """What samples a denoiser trained with `prediction`: Euler steps along a flow (`time_shift` > 1: more of them on noise), or DDIM."""
    if prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=time_shift)
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction,
        timestep_spacing="trailing",  # begins at pure noise, which matters with few steps
        rescale_betas_zero_snr=prediction != "epsilon",  # epsilon says nothing about the image at zero signal
    )


def load_scheduler(path: str | Path, *, latent: bool) -> Scheduler:
    """The scheduler in scheduler/ of a saved diffusion model: its own for a flow; DDIM with the same betas for any that has betas.

    Latents are not bounded as pixels are, so they are never clipped, though DDIM's default would where the file does not say.

    Raises:
        OSError: there is none.
        ConfigError: it is a flow of another kind, or has no betas.
    """
    settings: Any = DDIMScheduler.load_config(path, subfolder="scheduler")
    name, flow = str(settings["_class_name"]), settings.get("prediction_type") == "flow_prediction"
    known: dict[str, Any] = {kind.__name__: kind for kind in (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler)}
    if name == "FlowMatchEulerDiscreteScheduler" or (name == "DPMSolverMultistepScheduler" and flow):
        return known[name].from_pretrained(path, subfolder="scheduler")
    if flow or settings.get("use_flow_sigmas") or "beta_schedule" not in settings:
        raise ConfigError(
            f"{name} but one with betas, or {' or '.join(known)} for a flow, is known ({path}, scheduler). Save it with one of these."
        )
    ddim: Any = DDIMScheduler
    return ddim.from_pretrained(path, subfolder="scheduler", **({"clip_sample": False} if latent else {}))


def prediction_of(scheduler: Scheduler) -> Prediction:
    """What a denoiser sampled by `scheduler` must predict.

    Raises:
        ConfigError: a prediction type that is not known.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    found = scheduler.config["prediction_type"]
    if found == "flow_prediction" and scheduler.config.get("use_flow_sigmas"):
        return "flow"
    if found not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"prediction_type={found!r} but epsilon, v_prediction or sample is needed (decoder scheduler). Choose another scheduler."
        )
    return found


def time_shift_of(scheduler: Scheduler) -> float:
    """How far the scheduler's steps are moved toward noise; 1 = not at all."""
    return float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)


def noised(
    scheduler: Scheduler, clean: Float[Tensor, "n p s s"], noise: Float[Tensor, "n p s s"], time: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n p s s"], Tensor, Float[Tensor, "n p s s"]]:
    """Samples at `time`, the timesteps that the denoiser is told, and what it must predict."""
    num_timesteps = scheduler.config["num_train_timesteps"]
    prediction = prediction_of(scheduler)
    if prediction == "flow":
        level = time[:, None, None, None].to(clean.dtype)
        return (1 - level) * clean + level * noise, time * num_timesteps, noise - clean
    timesteps = (time * num_timesteps).long().clamp(max=num_timesteps - 1)
    noisy = scheduler.add_noise(clean, noise, timesteps)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if prediction == "v_prediction":
        return noisy, timesteps, scheduler.get_velocity(clean, noise, timesteps)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return noisy, timesteps, clean if prediction == "sample" else noise


def begin(scheduler: Scheduler, num_steps: int, device: torch.device) -> float:
    """Lay out the steps from noise to a sample; returns the scale of the noise to begin with."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # equal steps from pure noise to the image, then shifted by the scheduler; its own default shifts the last one twice
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist(), device=device)  # pyright: ignore[reportArgumentType]
        return 1.0
    scheduler.set_timesteps(num_steps, device=device)  # pyright: ignore[reportArgumentType]
    return float(scheduler.init_noise_sigma)
