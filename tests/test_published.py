"""The step that benchmarks compare with computes what ours computes."""

from __future__ import annotations

import copy

import pytest
import torch

from cm_lightning.bench import published
from cm_lightning.bench.common import build_network
from cm_lightning.bench.published import AttentionWeights, PublishedStep
from cm_lightning.ema import update_average
from cm_lightning.networks import ADMUNet, EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.objective import (
    L2,
    ECTMapping,
    Euler,
    Independent,
    InverseStep,
    Objective,
    SampleMean,
)
from cm_lightning.optim import GradientGuard
from cm_lightning.types import Batch


def network(kind: str):
    torch.manual_seed(0)
    if kind == "small":
        return build_network("small")
    shape = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4}
    shape |= {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}
    if kind == "edm2":
        return EDM2Precond(EDM2UNet(**shape, dropout=0.0))
    backbone = ADMUNet if kind == "adm" else SongUNet
    return EDMPrecond(backbone(**shape, dropout=0.0))


@pytest.mark.parametrize("kind", ["small", "song", "adm", "edm2"])
def test_losses_weights_and_averages_of_three_steps_are_ours(kind):
    ours = network(kind)
    with torch.no_grad():
        for p in ours.parameters():  # away from the zero output that networks start with
            p.add_(0.05 * torch.randn_like(p))
    labels = torch.tensor([0, 3, 1, 2, 2, 0]) if ours.num_classes else None

    def sgd(parameters):
        return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=1e-3)

    stage = 1
    theirs = PublishedStep(ours, sgd, stage=stage, rate=0.9)
    for p in ours.parameters():
        p.requires_grad_(True)
    optimizer, average = sgd(ours.parameters()), copy.deepcopy(list(ours.parameters()))
    mapping, guard, stats = ECTMapping(), GradientGuard(), None
    objective = Objective(mapping, Independent(), Euler(SampleMean()), L2(), InverseStep())
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randint(0, 256, (6, *ours.image_shape), dtype=torch.uint8, generator=rng)
        x0 = images / 127.5 - 1
        t = torch.tensor([0.01, 0.1, 0.5, 2.0, 20.0, 70.0])
        z = torch.randn(x0.shape, generator=rng)
        r = mapping.r(t.double(), stage)
        assert (r == 0).any()
        assert (r > 0).any()
        batch = Batch(x0, labels, torch.arange(6))
        output = objective.evaluate(ours, ours, batch, t.double(), r, z, torch.zeros(6))
        optimizer.zero_grad()
        output.loss.mean().backward()
        stats = guard(list(ours.parameters()), stats)
        optimizer.step()
        update_average(average, list(ours.parameters()), 0.9)
        found = theirs(images, labels, t, z)
        torch.testing.assert_close(found, output.loss.mean().detach(), rtol=1e-5, atol=0)
    for p, q, kept, mean in zip(
        ours.parameters(),
        theirs.network.parameters(),
        theirs.average.parameters(),
        average,
        strict=True,
    ):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept, mean, rtol=1e-4, atol=1e-6, check_stride=False)


def test_derivative_of_the_attention_weights():
    q, k = torch.randn(2, 2, 3, 5, dtype=torch.float64).unbind(0)
    grads = []
    for function in (
        AttentionWeights.apply,
        lambda q, k: (q.transpose(1, 2) @ k / 3**0.5).softmax(-1),
    ):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        (function(a, b) * torch.arange(50.0, dtype=torch.float64).reshape(2, 5, 5)).sum().backward()
        grads.append((a.grad, b.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # theirs in fp32


def test_dropout_masks_are_shared_by_both_passes(monkeypatch):
    small = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    losses = []
    for shared in (True, False):
        noisy = EDMPrecond(SongUNet(8, 1, 1, dropout=0.5, **small))
        with torch.no_grad():
            for p in noisy.parameters():
                p.add_(0.05 * torch.randn_like(p))
        step = PublishedStep(noisy, lambda p: torch.optim.SGD(p, lr=0.0), stage=12)
        if not shared:
            monkeypatch.setattr(published, "_set_generator_state", lambda *a: None)
        losses.append(float(step(images, None, torch.ones(8))))
    assert losses[0] < 0.02 * losses[1]  # t - r is 4e-4: other masks would be all there is to see
