"""The two preconditionings: limits, coefficients, what the backbone is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cm_lightning.networks import ConsistencyPrecond, EDMPrecond, SongUNet
from cm_lightning.types import InputError


class Echo(nn.Module):
    """Remembers what it was given."""

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        self.seen = (x, noise_labels)
        return torch.ones_like(x)


def test_identity_at_sigma_min_is_exact_for_a_random_network():
    torch.manual_seed(0)
    backbone = SongUNet(8, 1, 1, model_channels=32, channel_mult=[1], num_blocks=1)
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(4, 1, 8, 8)
    for sigma_min in (0.002, 0.05):
        denoiser = ConsistencyPrecond(backbone, sigma_min=sigma_min)
        level = torch.full((4,), sigma_min, dtype=torch.float64)
        assert torch.equal(denoiser(x, level), x)
        assert torch.equal(denoiser(x, level.float()), x)
        assert not torch.allclose(denoiser(x, 2 * level), x, atol=1e-4)


@pytest.mark.parametrize(
    ("sigma", "edm", "consistency", "c_in"),
    [
        (1.0, (0.2, 0.4472135955), (0.2006414105, 0.4463191683), 0.8944271910),
        (0.002, (0.9999840003, 0.0019999840), (1.0, 0.0), None),
        (80.0, (3.906097e-5, 0.4999902347), (3.906293e-5, 0.4999777349), None),
    ],
)
def test_published_coefficients(sigma, edm, consistency, c_in):
    level = torch.tensor([sigma], dtype=torch.float64)
    for precond, expected in ((EDMPrecond(Echo()), edm), (ConsistencyPrecond(Echo()), consistency)):
        c_skip, c_out, c, _ = precond.coefficients(level)
        assert (float(c_skip), float(c_out)) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if c_in is not None:
            assert float(c) == pytest.approx(c_in, abs=1e-10)


@pytest.mark.parametrize("precond", [EDMPrecond, ConsistencyPrecond])
def test_the_noise_input_is_scaled(precond):
    echo, x = Echo(), torch.randn(2, 1, 4, 4)
    sigma = torch.tensor([0.5, 3.0])
    for scale in (1.0, 1000.0):
        precond(echo, noise_scale=scale)(x, sigma)
        torch.testing.assert_close(echo.seen[1], scale * sigma.log() / 4)
        torch.testing.assert_close(echo.seen[0], x / (sigma**2 + 0.25).sqrt().reshape(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("precond", "arguments"),
    [
        (EDMPrecond, {"sigma_data": 0}),
        (EDMPrecond, {"noise_scale": 0}),
        (ConsistencyPrecond, {"sigma_data": -1}),
        (ConsistencyPrecond, {"sigma_min": -0.1}),
    ],
)
def test_bad_arguments_are_named(precond, arguments):
    with pytest.raises(InputError, match=f"{precond.__name__}: {next(iter(arguments))}"):
        precond(Echo(), **arguments)
