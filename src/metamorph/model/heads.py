"""The two bridges: projector (vision width to LLM width) and vision head (LLM width to vision width).

Axes: d LLM width, v vision width, q visual targets.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from metamorph.losses import LossTerm, visual_loss
from metamorph.model.configuration import HeadType, MetaMorphConfig
from metamorph.model.vision_encoder import MIN_NORM


class Projector(nn.Module):
    """Visual tokens to embeddings of the LLM: Linear, GELU, Linear as in the authors' code, or one Linear."""

    def __init__(self, config: MetaMorphConfig) -> None:
        super().__init__()
        width_in, width_out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.layers = bridge(config.projector_type, width_in, width_out, width_out)

    def forward(self, visual_tokens: Float[Tensor, "... v"]) -> Float[Tensor, "... d"]:
        """Project, in the precision of the weights."""
        return self.layers(visual_tokens.to(self.layers[0].weight.dtype))


class VisionHead(nn.Module):
    """Hidden states to visual tokens by regression. Another head needs only these two methods: `loss` and `predict`."""

    def __init__(self, config: MetaMorphConfig) -> None:
        super().__init__()
        width_in, width_out = config.text_config.hidden_size, config.vision_config.hidden_size
        self.layers = bridge(config.vision_head_type, width_in, width_in, width_out)
        self.normalize = config.normalize_visual_tokens
        self.loss_function = visual_loss(config.visual_loss)

    def forward(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """The predicted visual tokens, float32, of norm 1 if visual tokens are."""
        tokens = self.layers(hidden.to(self.layers[0].weight.dtype)).float()
        return F.normalize(tokens, dim=-1, eps=MIN_NORM) if self.normalize else tokens

    def predict(self, hidden: Float[Tensor, "... d"], generator: Generator | None = None) -> Float[Tensor, "... v"]:
        """The next visual tokens. Regression draws nothing from `generator`; heads that sample do."""
        return self(hidden)

    def loss(self, hidden: Float[Tensor, "q d"], target: Float[Tensor, "q v"], weights: Float[Tensor, " q"] | None = None) -> LossTerm:
        """The visual loss, summed over targets."""
        return self.loss_function(self(hidden), target, weights)


def bridge(kind: HeadType, width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear ("mlp") or one Linear ("linear"), with biases."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(width_in, width_out))
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))
