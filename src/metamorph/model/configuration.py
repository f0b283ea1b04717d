"""The settings saved with a model: two nested Hugging Face configs, what a visual token is, the heads, the losses and the special ids."""

import math
from typing import Any, ClassVar, Literal, no_type_check

from transformers import AutoConfig, PretrainedConfig

from metamorph.errors import ConfigError
from metamorph.losses import VisualLossName

HeadType = Literal["mlp", "linear"]
Pooling = Literal["bilinear", "area"]

IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "<image_start>"
IMAGE_END_TOKEN = "<image_end>"


@no_type_check  # transformers writes this class's __init__, which takes more than the fields; values are checked in `_check`
class MetaMorphConfig(PretrainedConfig):
    """Any causal LM config and any vision config, and what joins them. Defaults are the paper's.

    Raises:
        ConfigError: a nested config is missing, or a value is outside its range.
    """

    model_type = "metamorph"
    sub_configs: ClassVar = {"text_config": AutoConfig, "vision_config": AutoConfig}  # pyright: ignore[reportAssignmentType]

    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "last_hidden_state", "terms", "text_loss", "visual_loss"]

    text_config: dict[str, Any] | PretrainedConfig | None = None
    vision_config: dict[str, Any] | PretrainedConfig | None = None
    # What a visual token is: read only by VisionEncoder.
    num_visual_tokens: int = 64  # per image: a square number
    vision_feature_layer: int = -1  # index into the encoder's hidden states; -1 is the output of the last block
    vision_post_layernorm: bool = False  # apply the encoder's last layer norm to those states
    pooling: Pooling = "bilinear"  # of the patch grid: bilinear without antialias (the paper), or the mean over areas
    normalize_visual_tokens: bool = True  # L2, after pooling
    # The heads and the loss between them.
    projector_type: HeadType = "mlp"
    vision_head_type: HeadType = "mlp"
    visual_loss: VisualLossName = "cosine"
    visual_loss_weight: float = 1.0
    # Special tokens, and where the encoder's weights are if they are not in the checkpoint (relative to it).
    image_token_id: int | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    vision_encoder_path: str | None = None
    origins: dict[str, dict[str, str]] | None = None  # {"llm": {"name": ..., "license": ...}, "vision": ...}: what the model card says
    tie_word_embeddings: bool = False  # the text config's: transformers and PEFT look for it here

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn nested dictionaries into configs of their own type and check the values."""
        self.text_config = _nested("text_config", self.text_config)
        vision = _nested("vision_config", self.vision_config)
        self.vision_config = getattr(vision, "vision_config", vision)  # of a two-tower model only the vision tower
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check()

    @property
    def token_grid(self) -> int:
        """Side of the square grid of visual tokens."""
        return math.isqrt(self.num_visual_tokens)

    def _check(self) -> None:
        if self.num_visual_tokens < 1 or self.token_grid**2 != self.num_visual_tokens:
            raise ConfigError(
                f"num_visual_tokens={self.num_visual_tokens} but a square number was expected (MetaMorphConfig). Use a square such as 64."
            )
        allowed = {
            "pooling": ("bilinear", "area"),
            "projector_type": ("mlp", "linear"),
            "vision_head_type": ("mlp", "linear"),
            "visual_loss": ("cosine", "l1", "mse"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} but one of {', '.join(values)} was expected (MetaMorphConfig). Correct it."
                )
        if self.visual_loss_weight < 0:
            raise ConfigError(
                f"visual_loss_weight={self.visual_loss_weight} but a number >= 0 was expected (MetaMorphConfig). Use 0 to switch it off."
            )


def _nested(name: str, value: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, dict) or "model_type" not in value:
        found = "nothing" if value is None else f"{type(value).__name__} without model_type"
        raise ConfigError(f"{found} but a model config was expected ({name} of MetaMorphConfig). Give the config of a Hugging Face model.")
    value = dict(value)
    return AutoConfig.for_model(value.pop("model_type"), **value)
