"""MetaMorph: one autoregressive model that understands and draws images, trained by Visual-Predictive Instruction Tuning.

The names below are the public surface. They are resolved on first use: `import metamorph` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metamorph.decoder.pipeline import VisualDecoderPipeline
    from metamorph.errors import MetaMorphError
    from metamorph.messages import Example, ImagePart, Message, TextPart, VideoPart
    from metamorph.model.configuration import MetaMorphConfig
    from metamorph.model.modeling import MetaMorph
    from metamorph.model.processing import MetaMorphProcessor
    from metamorph.pipeline import MetaMorphPipeline
    from metamorph.training.config import RunConfig

__version__ = "0.1.0"

_HOME = {
    "Message": "metamorph.messages",
    "TextPart": "metamorph.messages",
    "ImagePart": "metamorph.messages",
    "VideoPart": "metamorph.messages",
    "Example": "metamorph.messages",
    "MetaMorphConfig": "metamorph.model.configuration",
    "MetaMorph": "metamorph.model.modeling",
    "MetaMorphProcessor": "metamorph.model.processing",
    "MetaMorphPipeline": "metamorph.pipeline",
    "VisualDecoderPipeline": "metamorph.decoder.pipeline",
    "RunConfig": "metamorph.training.config",
    "MetaMorphError": "metamorph.errors",
}

__all__ = [
    "Example",
    "ImagePart",
    "Message",
    "MetaMorph",
    "MetaMorphConfig",
    "MetaMorphError",
    "MetaMorphPipeline",
    "MetaMorphProcessor",
    "RunConfig",
    "TextPart",
    "VideoPart",
    "VisualDecoderPipeline",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access is an ordinary lookup
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted(__all__)
