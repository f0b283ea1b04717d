"""The decoder: visual tokens become pixels. Its names are resolved on first use, for they need the optional library diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metamorph.decoder.averaging import WeightAverage
    from metamorph.decoder.batches import DecoderBatch, DecoderStream
    from metamorph.decoder.conditioning import VisualConditioner
    from metamorph.decoder.denoiser import build_denoiser, build_dit, microworld_denoiser, widen_input
    from metamorph.decoder.objective import DecoderModel, Objective, decoder_step, sketch_step
    from metamorph.decoder.pipeline import VisualDecoderPipeline
    from metamorph.decoder.schedule import build_scheduler
    from metamorph.decoder.starts import from_base, from_pretrained_diffusion, from_sana, from_stable_diffusion

_HOME = {
    "DecoderBatch": "batches",
    "DecoderModel": "objective",
    "DecoderStream": "batches",
    "Objective": "objective",
    "VisualConditioner": "conditioning",
    "VisualDecoderPipeline": "pipeline",
    "WeightAverage": "averaging",
    "build_denoiser": "denoiser",
    "build_dit": "denoiser",
    "build_scheduler": "schedule",
    "decoder_step": "objective",
    "from_base": "starts",
    "from_pretrained_diffusion": "starts",
    "from_sana": "starts",
    "from_stable_diffusion": "starts",
    "microworld_denoiser": "denoiser",
    "sketch_step": "objective",
    "widen_input": "denoiser",
}

__all__ = [
    "DecoderBatch",
    "DecoderModel",
    "DecoderStream",
    "Objective",
    "VisualConditioner",
    "VisualDecoderPipeline",
    "WeightAverage",
    "build_denoiser",
    "build_dit",
    "build_scheduler",
    "decoder_step",
    "from_base",
    "from_pretrained_diffusion",
    "from_sana",
    "from_stable_diffusion",
    "microworld_denoiser",
    "sketch_step",
    "widen_input",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
