"""The decoder's own data: visual tokens with the errors of prediction."""

import numpy as np
import torch
from torch.nn import functional as F

from metamorph.microworld.diffusion import RegressionErrors, decoder_batches

K, V = 16, 12
SPREAD = torch.logspace(0, -3, V)  # standard deviations of the directions


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Tokens around a common mean that vary much in the first directions and little in the last."""
    generator = torch.Generator().manual_seed(int(((pixels + 1) * 127.5).round().long().sum()))
    return F.normalize(1.0 + torch.randn(len(pixels), K, V, generator=generator) * SPREAD, dim=-1)


def test_errors_keep_what_varies_most_and_lose_what_varies_least():
    errors = RegressionErrors(encode, blend=0.0, rate=1.0, num_pictures=64)
    tokens = encode(torch.ones(200, 3, 4, 4))
    spoiled = errors(tokens, np.random.default_rng(0))
    torch.testing.assert_close(spoiled.norm(dim=-1), torch.ones(200, K))
    before, after = ((one - errors.mean).flatten(0, 1) @ errors.directions for one in (tokens, spoiled))
    shares = (before * after).sum(0) / before.square().sum(0)  # by rising variance
    assert shares[-1] > 0.9 and shares[1] < 0.4 and shares[1:-1].diff().min() > -0.05


def test_cells_of_other_pictures_are_blended_in_whole():
    errors = RegressionErrors(encode, ridge=(-30.0, -29.0), rate=1.0, num_pictures=64)
    tokens = torch.eye(V)[:8].repeat_interleave(K, 0).view(8, K, V)  # each picture its own direction
    own = (
        (errors(tokens, np.random.default_rng(1)) * tokens).sum(-1).view(8, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(8, 4, 4)
    )  # picture, cell
    torch.testing.assert_close(own, own[:, :, :1].expand_as(own))
    assert own.min() > 0.8
    blended = own[own[:, :, 0].min(1).values < 0.999]  # not those that were drawn as their own partners
    assert len(blended) > 3 and (blended[:, :, 0].std(1) > 0.001).all()


def test_some_pictures_keep_their_true_tokens():
    errors, tokens = RegressionErrors(encode, rate=0.3, num_pictures=64), encode(torch.ones(200, 3, 4, 4))
    kept = (errors(tokens, np.random.default_rng(2)) == tokens).flatten(1).all(1).float().mean()
    assert 0.6 < kept < 0.8


def test_errors_follow_from_the_number_of_the_batch():
    make = decoder_batches(encode, 3, regression_errors=True)
    one, same, other = (make(step).tokens for step in (5, 5, 6))
    assert one is not None and same is not None and torch.equal(one, same) and not torch.equal(one, other)
