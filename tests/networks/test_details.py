"""Details of networks and optimizers that no other test would miss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cm_lightning.ema import WarmupEMA
from cm_lightning.networks import ADMUNet, EDM2UNet
from cm_lightning.networks.edm2 import MPFourier
from cm_lightning.optim import GradientGuard


def test_dropout_of_low_resolutions():
    sizes = {"model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8]}
    unet = ADMUNet(16, dropout=0.4, dropout_resolution=8, adaptive=False, **sizes)
    found = {
        (n.split("x")[0], b.dropout.p)
        for n, b in [*unet.enc.items(), *unet.dec.items()]
        if hasattr(b, "dropout")
    }
    assert found == {("16", 0.0), ("8", 0.4)}


@pytest.mark.parametrize("unet", [ADMUNet, EDM2UNet])
def test_embeddings_are_fp32_under_autocast(unet):
    torch.manual_seed(0)
    net = unet(8, 1, 1, label_dim=3, model_channels=64, channel_mult=[1], num_blocks=1)
    noise, rows = torch.randn(4), torch.eye(3)[[0, 1, 2, 0]]
    more = (None,) if unet is ADMUNet else ()
    plain = net._embed(noise, rows, *more)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net._embed(noise, rows, *more)
    assert mixed.dtype is torch.float32
    assert torch.equal(plain, mixed)


def test_phases_cover_the_circle():
    torch.manual_seed(0)
    layer = MPFourier(4096)
    assert 6.2 < float(layer.phases.max()) <= 2 * math.pi
    assert float(layer.freqs.std()) == pytest.approx(2 * math.pi, rel=0.05)


def test_activations_are_clipped():
    torch.manual_seed(0)
    net = EDM2UNet(8, 1, 1, model_channels=64, channel_mult=[1], num_blocks=1)
    block = net.dec["8x8_in1"].eval()
    x = torch.full((1, 64, 8, 8), 1e4)
    assert float(block(x, torch.zeros(1, 64)).detach().abs().max()) == 256


def test_warmup_by_hand():
    profile = WarmupEMA(0.9999, 2 / 3, 5)
    assert profile.beta(0, 64) == 0
    assert profile.beta(64 * 100, 64) == pytest.approx((1 - 101 ** (-2 / 3)) ** 0.2, rel=1e-12)
    assert profile.beta(64 * 10**9, 64) == pytest.approx(0.9999**0.2, rel=1e-12)


def test_the_norm_is_euclidean():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert float(GradientGuard()([p, q], None).norm) == 5
