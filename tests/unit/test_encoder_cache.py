"""The cache of encoder outputs: each image is encoded once, results are the encoder's own, another encoder's are never used."""

import pytest
import torch
from tests.sequences import sequence

from metamorph.data.collate import pad
from metamorph.errors import ConfigError
from metamorph.training.encoder_cache import EncoderCache, encoder_fingerprint, use_visual_tokens


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


def test_an_image_is_encoded_once(tmp_path):
    encoder = Encoder()
    cache = EncoderCache(encoder, "a", capacity=10)
    pixels = images(1.0, 2.0, 1.0)
    assert torch.equal(cache(pixels), Encoder()(pixels))
    cache(images(2.0, 3.0))
    assert encoder.seen == 3 and (cache.hits, cache.misses) == (2, 3)


def test_memory_is_bounded_and_disk_outlives_it(tmp_path):
    forgetful = Encoder()
    cache = EncoderCache(forgetful, "a", capacity=1)
    for value in (1.0, 2.0, 1.0):
        cache(images(value))
    assert forgetful.seen == 3
    EncoderCache(Encoder(), "a", capacity=0, directory=tmp_path)(images(1.0, 2.0))
    later = Encoder()
    again = EncoderCache(later, "a", capacity=0, directory=tmp_path)
    assert torch.equal(again(images(2.0)), Encoder()(images(2.0))) and later.seen == 0
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"cut short")
    assert torch.equal(again(images(1.0, 2.0)), Encoder()(images(1.0, 2.0))) and later.seen == 1
    other = Encoder(3.0)
    EncoderCache(other, "b", capacity=0, directory=tmp_path)(images(1.0))
    assert other.seen == 1
    with pytest.raises(ConfigError, match="at least one image must be kept"):
        EncoderCache(other, "a", capacity=0)


def test_the_fingerprint_knows_weights_and_settings():
    settings = {"pooling": "area"}
    same = encoder_fingerprint(Encoder(), settings)
    assert same == encoder_fingerprint(Encoder(), dict(settings))
    assert len({same, encoder_fingerprint(Encoder(1.5), settings), encoder_fingerprint(Encoder(), {"pooling": "bilinear"})}) == 3


@pytest.mark.parametrize("kinds", [("pixels",), ("tokens", "pixels", "drawn"), ()])
def test_sequences_and_batches_get_tokens_for_pixels(kinds):
    cache = EncoderCache(Encoder(), "a", capacity=10)
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
