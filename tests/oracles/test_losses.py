"""Expected losses in closed form: zero-output network, stop-gradient, dropout sharing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cm_lightning.dropout import DropoutKey
from cm_lightning.objective import (
    EDM,
    L2,
    COut,
    Draw,
    ECTMapping,
    Euler,
    Independent,
    InverseStep,
    Objective,
    PseudoHuber,
    SampleMean,
    SquaredL2,
    Uniform,
    paired_forward,
)
from cm_lightning.regimes import Diffusion
from cm_lightning.types import Batch, Denoiser, expand
from tests.toys import FunctionDenoiser, TinyDenoiser, gaussian_denoiser

CPU = torch.device("cpu")


def batch_of(x0: torch.Tensor) -> Batch:
    return Batch(x0, None, torch.arange(len(x0)))


def draw(n: int, seed: int = 0, nimg: int = 0) -> Draw:
    return Draw(seed=seed, nimg=nimg, start=0, total=n, device=CPU)


def test_zero_output_network_starts_diffusion_at_loss_one():
    """F = 0 and E[x0^2] = sigma_data^2: 1 per number of the image, whatever the noise level."""
    denoiser = FunctionDenoiser(lambda x, t: 0.25 / (t * t + 0.25) * x)
    x0 = torch.randint(0, 2, (4000, 1, 8, 8), generator=torch.Generator().manual_seed(0)) - 0.5
    module = Diffusion(denoiser, total_kimg=1)
    output = module.loss(batch_of(x0), draw(4000))
    assert float(output.loss.mean()) / 64 == pytest.approx(1, abs=0.01)
    low, high = output.t < 0.3, output.t >= 0.3
    assert float(output.loss[low].mean()) / 64 == pytest.approx(1, abs=0.02)
    assert float(output.loss[high].mean()) / 64 == pytest.approx(1, abs=0.02)
    assert torch.equal(output.r, torch.zeros_like(output.t))


def kappa(dimension: int) -> float:
    """Mean norm of a standard normal vector."""
    return math.sqrt(2) * math.exp(math.lgamma((dimension + 1) / 2) - math.lgamma(dimension / 2))


def test_mean_norm_constant():
    assert kappa(3072) == pytest.approx(55.421115, abs=1e-6)


@pytest.mark.parametrize(
    ("t", "r", "norm", "weighted"),
    [
        (1.0, 0.0, 24.785076, 24.785076),
        (3.0, 0.93089, 8.920469, 4.311259),
        (80.0, 40.0, 0.173174, 0.004329),
        (1.0, 0.212117, 17.976936, 22.816759),
        (1.0, 0.987689, 0.137813, 11.194337),
    ],
)
def test_first_ect_loss_from_a_perfect_denoiser(t, r, norm, weighted):
    """Data N(0, 0.25) on 3x32x32 and the exact denoiser: E||.|| = kappa sqrt(v)."""
    n = 400
    g = torch.Generator().manual_seed(1)
    x0, z = (torch.randn(n, 3, 32, 32, generator=g, dtype=torch.float64) for _ in range(2))
    levels = (torch.full((n,), v, dtype=torch.float64) for v in (t, r))
    objective = Objective(ECTMapping(), Independent(), Euler(SampleMean()), L2(), InverseStep())
    perfect = gaussian_denoiser(0.5)
    output = objective.evaluate(perfect, perfect, batch_of(x0 * 0.5), *levels, z, torch.zeros(n))
    # one standard error is about 1 / sqrt(2 n D) = 6e-4 of the value
    assert float(output.distance.mean()) == pytest.approx(norm, rel=3e-3)
    assert float(output.loss.mean()) == pytest.approx(weighted, rel=3e-3)


class OneScalar(Denoiser):
    """f(x, t) = a x."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.sigma_data = 0.5
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        return self.a * x


@pytest.mark.parametrize("c", [None, 0.3])
def test_no_gradient_flows_through_the_target(c):
    """d/da of the squared distance is 2 a <x_t - x_r, x_t>; Huber divides by the root."""
    g = torch.Generator().manual_seed(2)
    x0, z = (torch.randn(8, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t, r = torch.full((8,), 2.0).double(), torch.full((8,), 1.5).double()
    net, a = OneScalar(0.7), 0.7
    distance = SquaredL2() if c is None else PseudoHuber(c)
    objective = Objective(ECTMapping(), Independent(), Euler(SampleMean()), distance, Uniform())
    output = objective.evaluate(net, net, batch_of(x0), t, r, z, torch.zeros(8))
    output.loss.sum().backward()
    x_t, x_r = x0 + 2 * z, x0 + 1.5 * z
    inner = (a * (x_t - x_r) * x_t).flatten(1).sum(1)
    if c is None:
        expected = 2 * inner
    else:
        squared = (a * (x_t - x_r)).square().flatten(1).sum(1)
        expected = inner / (squared + c * c).sqrt()
    assert float(net.a.grad) == pytest.approx(float(expected.sum()), rel=1e-12)


def test_both_passes_share_one_dropout_mask():
    net = TinyDenoiser(dropout=0.5).train()
    x = torch.randn(16, 1, 8, 8)
    t = torch.rand(16).double() + 0.5
    state = torch.get_rng_state()
    a, b = paired_forward(net, net, x, t, x, t, None, dropout=DropoutKey(5))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(paired_forward(net, net, x, t, x, t, None, dropout=DropoutKey(6))[0], a)
    loss = PseudoHuber(0.01)(a, b)
    loss.sum().backward()
    assert float(loss.detach().sum()) == 0
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_gradients_survive_bf16_autocast():
    """The pass without gradient comes first: its cached casts must not cut the second one off."""
    torch.manual_seed(0)
    net = TinyDenoiser()
    x0 = torch.randn(64, 1, 8, 8) * 0.5
    objective = Objective(
        ECTMapping(q=8), Independent(), Euler(SampleMean()), SquaredL2(), Uniform()
    )
    gradients = []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = objective(net, net, batch_of(x0), draw(64))
        output.loss.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    exact, rounded = gradients
    assert float(exact.norm()) > 0
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


def test_l2_has_a_finite_gradient_at_zero():
    a = torch.ones(2, 3, requires_grad=True)
    L2()(a, torch.ones(2, 3)).sum().backward()
    assert torch.equal(a.grad, torch.zeros(2, 3))


def test_where_r_is_zero_the_target_is_the_image_and_the_network_is_not_asked():
    seen = []
    net = FunctionDenoiser(lambda x, t: seen.append(t.min().item()) or x * t.log())
    x_t, x_r = torch.randn(2, 3, 1, 4, 4)
    t, r = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.5, 0.0])
    _, goal = paired_forward(net, net, x_t, t, x_r, r, None, DropoutKey(0))
    assert torch.equal(goal[0], x_r[0])
    assert torch.equal(goal[2], x_r[2])
    assert min(seen) > 0
    assert goal.isfinite().all()


def test_euler_from_the_sample_keeps_the_noise(generator):
    x0, z = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.01, 0.5, 2.0, 30.0, 80.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.3, 1.0, 29.0, 0.0], dtype=torch.float64)
    x_r = Euler(SampleMean())(x0 + expand(t, x0) * z, t, r, batch_of(x0))
    torch.testing.assert_close(x_r, x0 + expand(r, x0) * z, rtol=0, atol=1e-12)
    assert torch.equal(x_r[0], x0[0])


def test_euler_error_is_second_order_on_gaussian_data():
    exact = gaussian_denoiser(0.5)

    class Exact(SampleMean):
        def __call__(self, x_t, t, batch):
            return exact(x_t, t)

    def flow(x, t, r):
        return ((0.25 + r * r) / (0.25 + t * t)) ** 0.5 * x

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for h in (0.1, 0.05):
        t, r = torch.tensor([1.0]).double(), torch.tensor([1.0 - h]).double()
        errors.append(float((Euler(Exact())(x, t, r, batch_of(x)) - flow(x, t, r)).abs()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_distances_by_hand():
    a, b = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    assert float(SquaredL2()(a, b)) == 25
    assert float(L2()(a, b)) == 5
    assert float(PseudoHuber(12.0)(a, b)) == pytest.approx(1.0)  # sqrt(25 + 144) - 12
    assert PseudoHuber("ict").width(3072) == pytest.approx(0.0299298, abs=1e-7)
    assert PseudoHuber("ict").width(12288) == pytest.approx(0.0598597, abs=1e-7)


def test_distances_are_computed_in_full_precision():
    a = torch.full((1, 10_000), 1.0, dtype=torch.bfloat16)
    assert float(SquaredL2()(a, torch.zeros_like(a))) == 10_000
    assert SquaredL2()(a, a).dtype is torch.float32


def test_weights_by_hand():
    t, r = torch.tensor([2.0]).double(), torch.tensor([1.5]).double()
    assert float(InverseStep()(t, r, 0.5)) == 2
    assert float(COut()(t, r, 0.5)) == 4.25
    assert float(EDM()(t, r, 0.5)) == pytest.approx((4 + 0.25) / (2 * 0.5) ** 2)


def test_noise_of_an_image_does_not_depend_on_how_the_batch_is_split():
    net = FunctionDenoiser(lambda x, t: x / (1 + t * t))
    x0 = torch.randn(12, 1, 4, 4)
    objective = Objective(ECTMapping(), Independent(), Euler(SampleMean()), L2(), InverseStep())
    whole = objective(net, net, batch_of(x0), Draw(1, 960, 0, 12, CPU))
    parts = [
        objective(net, net, batch_of(x0[i : i + 4]), Draw(1, 960, i, 12, CPU)).loss
        for i in (0, 4, 8)
    ]
    assert torch.equal(whole.loss, torch.cat(parts))
    other = objective(net, net, batch_of(x0), Draw(1, 972, 0, 12, CPU))
    assert not torch.equal(whole.loss, other.loss)
