"""The cache of encoder outputs: each image is encoded once, and results are the encoder's own."""

import pytest
import torch
from tests.sequences import sequence

from metamorph.data.collate import pad
from metamorph.errors import ConfigError
from metamorph.training.encoder_cache import EncoderCache, use_visual_tokens


class Encoder(torch.nn.Module):
    """Two visual tokens of width 3: means over colour channels, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]) * weight)
        self.seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        return (pixels.mean((2, 3))[:, None] * self.weight[:, None]).detach()


def images(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_an_image_is_encoded_once():
    encoder = Encoder()
    cache = EncoderCache(encoder, 10)
    pixels = images(1.0, 2.0, 1.0)
    assert torch.equal(cache(pixels), Encoder()(pixels))
    cache(images(2.0, 3.0))
    assert encoder.seen == 3 and (cache.hits, cache.misses) == (2, 3)


def test_memory_is_bounded():
    forgetful = Encoder()
    cache = EncoderCache(forgetful, 1)
    for value in (1.0, 2.0, 1.0):
        cache(images(value))
    assert forgetful.seen == 3
    with pytest.raises(ConfigError, match="at least one image must be kept"):
        EncoderCache(forgetful, 0)


@pytest.mark.parametrize("kinds", [("pixels",), ("tokens", "pixels", "drawn"), ()])
def test_sequences_and_batches_get_tokens_for_pixels(kinds):
    cache = EncoderCache(Encoder(), 10)
    before = sequence(images=kinds)
    after = use_visual_tokens(before, cache)
    assert not len(after.pixel_values) and not after.from_pixels.any()
    if kinds:
        expected = Encoder()(before.pixel_values)
        assert torch.equal(after.visual_tokens[before.from_pixels], expected)
        if not before.from_pixels.all():
            assert torch.equal(after.visual_tokens[~before.from_pixels], before.visual_tokens[~before.from_pixels])
    batch = use_visual_tokens(pad([before, sequence(1, images=("pixels",))]), cache)
    assert not len(batch.pixel_values) and len(batch.visual_tokens) == len(kinds) + 1
