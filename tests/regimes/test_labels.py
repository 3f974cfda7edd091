"""Every network of a regime, and every sampler, is told the labels of its rows."""

from __future__ import annotations

import pytest
import torch

from cm_lightning.networks import ConsistencyPrecond, EDMPrecond, Precond
from cm_lightning.objective import L2, Draw
from cm_lightning.regimes import CD, CT, ECT, GC, ICT, SCT, Diffusion
from cm_lightning.sampling import (
    EulerSampler,
    GuidedDenoiser,
    HeunSampler,
    MultistepSampler,
    PhasedSampler,
    multistep,
)
from cm_lightning.types import Batch, References
from tests.regimes.test_waiting import network, teacher

LABELS = torch.tensor([3, 0, 7, 3, 9, 1])
REGIMES = {
    "diffusion": (Diffusion, {}),
    "cd": (CD, {"distance": L2()}),
    "ct": (CT, {"distance": L2()}),
    "ict": (ICT, {}),
    "ect": (ECT, {}),
    "sct": (SCT, {}),
    "gc": (GC, {}),
}


class Heard:
    """Keeps the labels that networks are called with."""

    def __init__(self, monkeypatch) -> None:
        self.labels = []

        real = Precond.forward

        def forward(module, x, sigma, labels=None, **told):
            self.labels.append(labels)
            return real(module, x, sigma, labels, **told)

        monkeypatch.setattr(Precond, "forward", forward)

    def check(self, calls: int) -> None:
        assert len(self.labels) >= calls
        for labels in self.labels:
            assert labels is not None
            assert torch.equal(labels, LABELS)
        self.labels.clear()


@pytest.mark.parametrize("name", REGIMES)
def test_networks_in_training(name, monkeypatch, tmp_path):
    regime, options = REGIMES[name]
    if name == "cd":
        options = options | {"teacher": teacher(tmp_path)}

    precond = EDMPrecond if name in ("diffusion", "ect", "sct") else ConsistencyPrecond
    module = regime(network(precond, label_dropout=0.0), total_kimg=1, **options)
    x0 = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    references = References(x0, LABELS, torch.arange(6))
    heard = Heard(monkeypatch)
    batch = Batch(x0, LABELS, torch.arange(6), references)
    module.loss(batch, Draw(0, 0, 0, 6, torch.device("cpu")))
    heard.check(1 if name == "diffusion" else 2)


SAMPLERS = (
    MultistepSampler((80.0, 1.0)),
    PhasedSampler((0.0, 1.0, 80.0)),
    EulerSampler(2),
    HeunSampler(2),
)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_networks_in_sampling(sampler, monkeypatch):
    heard = Heard(monkeypatch)
    noise = torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler(network().eval(), noise, LABELS)
    heard.check(sampler.nfe)


def test_a_guided_network_and_the_one_that_guides_it(monkeypatch):
    heard = Heard(monkeypatch)
    noise = torch.randn(1, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    multistep(GuidedDenoiser(network(), network(), 2.0).eval(), noise, [80.0], LABELS)
    heard.check(2)
