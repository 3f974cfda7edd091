"""Converged ECT stages on Gaussian data, trained through the real trainer and training step.

On data N(0, 0.25) the best f is a(t) x; its recursion along t -> r(t) -> ... -> 0 is known, so the
learned numbers can be compared with a table. A stage s at q = 2 is stage 0 at q = 2^(s+1).
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import pytest
import torch
from torch import nn

from cm_lightning.networks import EDMPrecond
from cm_lightning.objective import ECTMapping, PseudoHuber, SquaredL2, Uniform
from cm_lightning.optim import LearningRate
from cm_lightning.regimes import ECT
from cm_lightning.types import Batch

S = 0.5
TABLE = {  # stage: a(0.3), a(0.821), a(2), a(5), a(80), chain length from 80
    0: (0.735294, 0.270551, 0.079960, 0.059503, 0.00373089, 7),
    1: (0.735294, 0.353483, 0.166515, 0.062097, 0.00423748, 15),
    2: (0.812925, 0.458490, 0.209514, 0.085754, 0.00538453, 52),
    3: (0.838694, 0.492627, 0.227447, 0.093205, 0.00585328, 117),
}


def chain(start: float, mapping: ECTMapping) -> list[float]:
    """Levels start, r(start), r(r(start)), ... until 0 or the first one below 1e-9."""
    levels = [start]
    while levels[-1] >= 1e-9:
        r = float(mapping.r(torch.tensor(levels[-1], dtype=torch.float64), 0))
        if r == 0:
            break
        levels.append(r)
    return levels


@pytest.mark.parametrize("stage", TABLE)
def test_recursion_of_the_mapping(stage):
    """a_t = a_r (s^2 + t r) / (s^2 + t^2) along the mapping's chain gives the table."""
    mapping = ECTMapping(q=2 ** (stage + 1))
    assert len(chain(80.0, mapping)) == TABLE[stage][5]
    for t, expected in zip((0.3, 0.821, 2.0, 5.0, 80.0), TABLE[stage], strict=False):
        levels = [*chain(t, mapping), 0.0]
        a = 1.0
        for upper, lower in zip(reversed(levels[:-1]), reversed(levels[1:]), strict=True):
            a *= (S**2 + upper * lower) / (S**2 + upper**2)
        assert a == pytest.approx(expected, abs=6e-7)


@dataclass(frozen=True)
class OnChain(ECTMapping):
    """ECT's mapping with t drawn from given levels only."""

    levels: tuple[float, ...] = ()

    def sample(self, n, nimg, device, generator, edges=None):
        number = torch.randint(len(self.levels), (n,), generator=generator)
        t = torch.tensor(self.levels, dtype=torch.float64)[number]
        return t, self.r(t, self.stage(nimg))


class Scales(nn.Module):
    """F(x, c_noise) = b(level) x, one number per level."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("labels", torch.tensor(levels).log() / 4)
        self.b = nn.Parameter(torch.zeros(len(levels)))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        nearest = (noise_labels[:, None] - self.labels).abs().argmin(1)
        return self.b[nearest][:, None, None, None] * x


class Gaussian(torch.utils.data.IterableDataset):
    """Endless batches of N(0, 0.25) images."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            x0 = S * torch.randn(1024, 1, 4, 4, generator=generator)
            yield Batch(x0, None, torch.arange(1024))


@pytest.mark.parametrize(
    ("stage", "distance"),
    [
        pytest.param(0, SquaredL2(), marks=pytest.mark.slow),
        (0, PseudoHuber(3.0)),
        (1, SquaredL2()),
    ],
)
def test_training_converges_to_the_stage(stage, distance):
    mapping = ECTMapping(q=2 ** (stage + 1))
    starts = (0.3, 0.821, 2.0, 5.0, 80.0)
    levels = tuple(sorted({level for t in starts for level in chain(t, mapping)}))
    denoiser = EDMPrecond(Scales(levels))
    module = ECT(
        denoiser,
        total_kimg=1024 * 1500 / 1000,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.9, 0.999)),
        learning_rate=LearningRate(cooldown_kimg=1024 * 1300 / 1000),
        discretization=OnChain(q=2 ** (stage + 1), stages=1, levels=levels),
        distance=distance,
        weighting=Uniform(),
    )
    L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(Gaussian(), batch_size=None))
    with torch.no_grad():
        for t, expected in zip(starts, TABLE[stage], strict=False):
            a = float(denoiser(torch.ones(1, 1, 4, 4), torch.tensor([t]))[0, 0, 0, 0])
            assert a == pytest.approx(expected, rel=0.02)
