"""Whether two pretrained models can be joined: found out once, before anything is trained.

An LLM is run without its own class around it: embeddings go in, states come out, and the text head is applied to those that matter.
A family that treats its inputs or logits in a way of its own must be known to `MetaMorph`, or it would silently become another model.

Axes: n images, h and w pixels.
"""

import torch
from transformers import PreTrainedModel

from metamorph.errors import AlignmentError, ConfigError
from metamorph.model.modeling import MetaMorph

PROBE_LENGTH = 4
TOLERANCE = 1e-4
"""Largest difference between logits, relative to the largest logit; the same products in another order differ by less."""


def check_language_model(language_model: PreTrainedModel) -> None:
    """Refuse what is not a causal LM over a cache of keys and values.

    Raises:
        ConfigError: it also reads other things than text, or keeps a recurrent state.
    """
    name, config = type(language_model).__name__, language_model.config
    if config.get_text_config() is not config:
        raise ConfigError(
            f"{name}, which is made of several models, but a causal LM was expected (LLM). Save its language model by itself."
        )
    if getattr(language_model, "_is_stateful", False):
        raise ConfigError(f"{name}, which keeps a recurrent state, but attention over a cache was expected (LLM). Use another family.")


@torch.no_grad()
def check_reading(model: MetaMorph) -> None:
    """Read a few tokens with the LLM itself and with the model that contains it, and compare the logits.

    Raises:
        ConfigError: they differ.
    """
    language_model = model.language_model
    name = type(language_model).__name__
    ids = torch.arange(PROBE_LENGTH)[None] + 1
    expected = language_model(input_ids=ids, use_cache=False).logits
    try:
        found = model(ids).logits
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{name} fails ({error}) but a causal LM that reads embeddings was expected (LLM). Use another family."
        ) from error
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:
        raise ConfigError(
            f"logits that differ by {difference:.2g} from those of {name} but at most {TOLERANCE * largest:.2g} was expected (LLM). "
            "This family changes its inputs or logits in a way that MetaMorph does not know: use another one."
        )


def check_encoder(model: MetaMorph, image_size: tuple[int, int]) -> None:
    """Encode a black image of the size that the processor prepares.

    Raises:
        ConfigError: the encoder cannot read it.
        AlignmentError: it keeps fewer states than patches.
    """
    height, width = image_size
    patch = model.vision_encoder.patch_size
    encoder = type(model.vision_encoder.encoder).__name__
    if min(image_size) < patch:
        raise ConfigError(
            f"images of {height} x {width} pixels but at least one patch of {patch} was expected ({encoder}). Set image_size."
        )
    try:
        model.encode_images(torch.zeros(1, 3, height, width))
    except AlignmentError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{encoder} fails ({error}) but an encoder of images of {height} x {width} pixels was expected. Set image_size to its own."
        ) from error
