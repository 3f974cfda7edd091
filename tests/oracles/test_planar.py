"""Orderings that the methods promise, on two-dimensional data through the real training loop."""

from __future__ import annotations

import copy

import pytest
import torch

from cm_lightning.callbacks import EMACallback
from cm_lightning.ema import ConstantEMA
from cm_lightning.objective import (
    L2,
    DoublingGrid,
    Draw,
    ECTMapping,
    GeneratorCoupling,
    SquaredL2,
)
from cm_lightning.optim import LearningRate
from cm_lightning.regimes import ECT, GC, ICT, SCT, Diffusion
from tests.planar import Endless, blobs, denoiser, energy_distance, one_step, train


def trained(module, seed: int, batch: int) -> float:
    """Energy distance of one-step samples of the averaged network."""
    ema = EMACallback([ConstantEMA(0.999)])
    train(module, batch, seed, [ema])
    with ema.lend(module.denoiser, "ema_0.999"):
        return energy_distance(one_step(module.denoiser), blobs())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gc_is_ahead_of_ict_at_equal_steps(seed):
    kimg = 256 * 3
    common = {
        "optimizer": lambda p: torch.optim.Adam(p, lr=1e-3),
        "learning_rate": LearningRate(cooldown_kimg=kimg / 2),
        "discretization": DoublingGrid(s1=160),
        "seed": seed,
    }
    plain = ICT(denoiser(seed, boundary=True), kimg, **common)
    mixed = GC(denoiser(seed, boundary=True), kimg, coupling=GeneratorCoupling(0.5), **common)
    assert trained(mixed, seed, 256) < 0.8 * trained(plain, seed, 256)


@pytest.fixture(scope="module")
def pretrained():
    """A diffusion model of the blobs, 1,500 steps."""
    module = Diffusion(
        denoiser(0),
        512 * 1.5,
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3),
        learning_rate=LearningRate(cooldown_kimg=512),
    )
    train(module, 512, 0)
    return module.denoiser


def gradient_noise(module, batches: int = 150) -> float:
    """Trace of the covariance of the gradient over batches of 64."""
    data, gradients = iter(Endless(64, 7)), []
    for number in range(batches):
        module.zero_grad()
        draw = Draw(seed=11, nimg=64 * number, start=0, total=64, device=torch.device("cpu"))
        module.loss(next(data), draw).loss.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.denoiser.parameters()]))
    return float(torch.stack(gradients).var(0).sum())


@pytest.mark.parametrize(
    ("distance", "stage", "low", "high"),
    [(SquaredL2(), 0, 0, 0.4), (SquaredL2(), 3, 0, 0.4), (L2(), 3, 0.85, 1.15)],
)
def test_gradient_noise_of_sct_relative_to_ect(pretrained, distance, stage, low, high):
    """With all references: at most 0.4 for the squared norm, no gain for the unsquared one."""
    leaves = {
        "discretization": ECTMapping(q=2.0 ** (stage + 1), stages=1),
        "distance": distance,
    }
    ect = ECT(copy.deepcopy(pretrained), 1.0, **leaves)
    sct = SCT(copy.deepcopy(pretrained), 1.0, **leaves)
    assert low < gradient_noise(sct) / gradient_noise(ect) < high


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_sct_is_ahead_of_ect_under_the_squared_norm(pretrained, seed):
    kimg = 64 * 4.0
    values = {}
    for regime in (ECT, SCT):
        module = regime(
            copy.deepcopy(pretrained),
            kimg,
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
            learning_rate=LearningRate(cooldown_kimg=kimg),
            discretization=ECTMapping(kimg_per_stage=kimg / 8),
            distance=SquaredL2(),
            seed=seed,
        )
        values[regime.__name__] = trained(module, seed, 64)
    assert values["SCT"] < 0.6 * values["ECT"]
