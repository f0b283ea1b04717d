"""What is saved with the weights: configuration, model, processor. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from metamorph.model.configuration import MetaMorphConfig
from metamorph.model.conversion import initialize, load, save_without_encoder
from metamorph.model.modeling import MetaMorph, MetaMorphOutput
from metamorph.model.processing import MetaMorphProcessor
from metamorph.model.vision_encoder import VisionEncoder

AutoConfig.register(MetaMorphConfig.model_type, MetaMorphConfig, exist_ok=True)
AutoModel.register(MetaMorphConfig, MetaMorph, exist_ok=True)
AutoModelForCausalLM.register(MetaMorphConfig, MetaMorph, exist_ok=True)
AutoProcessor.register(MetaMorphConfig, MetaMorphProcessor, exist_ok=True)

__all__ = [
    "MetaMorph",
    "MetaMorphConfig",
    "MetaMorphOutput",
    "MetaMorphProcessor",
    "VisionEncoder",
    "initialize",
    "load",
    "save_without_encoder",
]
