"""What generator-augmented flows promise, measured with exact endpoints (arXiv:2406.09570).

Transport cost c(t) = E||x_hat - z||^2 / D and discrepancy R(t) = E||z - E[z | x_t]||^2 / D, for
independent pairs (IC) and pairs whose image is the exact endpoint of x_0 + t z (GC).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from cm_lightning.objective import (
    L2,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Independent,
    InverseStep,
    MinibatchOT,
    Objective,
    SampleMean,
)
from cm_lightning.sigmas import karras_sigmas
from cm_lightning.types import Batch
from tests.toys import gaussian_endpoint


def couple(coupling, x0, z, t: float, endpoint=None, labels=None):
    n = len(x0)
    level = torch.full((n,), t, dtype=torch.float64)
    u = torch.rand(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    batch = Batch(x0, labels, torch.arange(n))

    def denoise(x, sigma, *, dropout=False):
        assert bool((sigma == t).all())
        return endpoint(x, t)

    return coupling(batch, z, u, level * 2, level, 0, denoise)


def cost(pair) -> float:
    return float((pair.x0 - pair.z).square().mean())


def images(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values), -1, 1, 1)


# --- Gaussian data, s = 0.5 ---


@pytest.mark.parametrize(
    ("t", "c", "r_independent", "r_gc", "growth"),
    [
        (0.2, 0.8786, 0.8621, 0.5916, 1.256),
        (0.5, 0.5429, 0.5, 0.14645, 1.707),
        (1.0, 0.3556, 0.2, 0.02332, 1.716),
        (2.0, 0.2799, 0.0588, 0.002376, 1.457),
        (5.0, 0.2550, 0.0099, 8.2e-5, 1.197),
    ],
)
def test_gaussian_data(t, c, r_independent, r_gc, growth, generator):
    """Least squares of z on x_t gives R, as everything is Gaussian."""
    s, n = 0.5, 1_000_000
    x0 = images(s * torch.randn(n, generator=generator, dtype=torch.float64))
    z = images(torch.randn(n, generator=generator, dtype=torch.float64))

    def endpoint(x, level):
        return s / math.sqrt(s * s + level * level) * x

    def discrepancy(pair):
        x_t = pair.x0 + t * pair.z
        return float(pair.z.square().mean() - (pair.z * x_t).mean() ** 2 / x_t.square().mean())

    independent = couple(Independent(), x0, z, t)
    generated = couple(GeneratorCoupling(1.0), x0, z, t, endpoint)
    assert bool(generated.generated.all())
    assert cost(independent) == pytest.approx(1.25, rel=0.01)
    assert cost(generated) == pytest.approx(c, rel=0.01)
    assert discrepancy(independent) == pytest.approx(r_independent, rel=0.01)
    assert discrepancy(generated) == pytest.approx(r_gc, rel=0.02)
    variance = (generated.x0 + t * generated.z).var()
    assert float(variance / (s * s + t * t)) == pytest.approx(growth, rel=0.01)


@pytest.mark.parametrize(("t", "c"), [(0.2, 0.8786), (1.0, 0.3556), (5.0, 0.2550)])
@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_the_objective_notes_the_cost(t, c, mix, generator):
    """The mean over rows is (1 - mix) (s^2 + 1) + mix c, the independent pair's s^2 + 1."""
    s, n = 0.5, 20_000
    x0 = s * torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    z = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    r = torch.full((n,), t, dtype=torch.float64)
    batch = Batch(x0, None, torch.arange(n))

    def notes(coupling):
        leaves = (ECTMapping(), coupling, Euler(SampleMean()), L2(), InverseStep())
        network = gaussian_endpoint(s)
        return Objective(*leaves).evaluate(network, network, batch, 2 * r, r, z, u).notes

    assert not notes(Independent())
    found = notes(GeneratorCoupling(mix))
    assert torch.equal(found["generated"].bool(), u < mix)
    mean = {name: float(note.mean()) for name, note in found.items()}
    assert mean["independent_cost"] == pytest.approx(1.25, rel=0.01)
    assert mean["transport_cost"] == pytest.approx(1.25 + mix * (c - 1.25), rel=0.01)
    few = batch._replace(x0=x0[:256], index=batch.index[:256])
    batch, z, u, r = few, z[:256], u[:256], r[:256]
    moved = notes(MinibatchOT())
    assert float(moved["transport_cost"].mean()) < float(moved["independent_cost"].mean())
    assert "generated" not in moved


# --- six points in one dimension: the exact endpoint is a quantile map ---

POINTS = np.sort(np.array([-1, -0.6, -0.1, 0.2, 0.25, 0.9]))


def quantile_endpoint(x: torch.Tensor, t: float) -> torch.Tensor:
    cdf = ndtr((x.numpy().reshape(-1, 1) - POINTS) / t).mean(1)
    index = np.minimum((cdf * len(POINTS)).astype(int), len(POINTS) - 1)
    return torch.from_numpy(POINTS[index]).reshape(x.shape)


def binned_discrepancy(pair, t: float, bins: int = 2000) -> float:
    """E Var(z | x_t) by equal-count bins of x_t, within which z is regressed on x_t linearly."""
    x_t = (pair.x0 + t * pair.z).flatten().numpy()
    order = np.argsort(x_t)
    x = x_t[order].reshape(bins, -1)
    z = pair.z.flatten().numpy()[order].reshape(bins, -1)
    x, z = x - x.mean(1, keepdims=True), z - z.mean(1, keepdims=True)
    slope = (x * z).sum(1) / np.maximum((x * x).sum(1), 1e-300)
    return float(np.square(z - slope[:, None] * x).mean())


@pytest.mark.parametrize(
    ("t", "c", "r_independent", "r_gc", "r_half"),
    [
        (0.1, 1.3157, 0.3455, 0.1363, 0.2557),
        (0.2, 1.0990, 0.7047, 0.4469, 0.5998),
        (0.5, 0.6690, 0.5853, 0.2004, 0.4032),
        (1.0, 0.3936, 0.2730, 0.0447, 0.1658),
        (2.0, 0.2682, 0.0861, 0.00650, 0.0538),
        (5.0, 0.2251, 0.01486, 4.4e-4, 0.0102),
    ],
)
def test_six_points(t, c, r_independent, r_gc, r_half, generator):
    n = 1_000_000
    index = torch.randint(len(POINTS), (n,), generator=generator)
    x0 = images(torch.from_numpy(POINTS)[index])
    z = images(torch.randn(n, generator=generator, dtype=torch.float64))
    independent = couple(Independent(), x0, z, t)
    generated = couple(GeneratorCoupling(1.0), x0, z, t, quantile_endpoint)
    half = couple(GeneratorCoupling(0.5), x0, z, t, quantile_endpoint)
    assert float(half.generated.double().mean()) == pytest.approx(0.5, abs=0.003)
    assert cost(independent) == pytest.approx(1.3804, rel=0.01)
    assert cost(generated) == pytest.approx(c, rel=0.01)
    for pair, expected in ((independent, r_independent), (generated, r_gc), (half, r_half)):
        assert binned_discrepancy(pair, t) == pytest.approx(expected, rel=0.03)


# --- digits: 1,797 points in 64 dimensions ---


def digits() -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data / 8 - 1)


def flow_endpoint(points: torch.Tensor, steps: int):
    """Endpoint of the exact flow of a finite set, by Heun steps down a Karras grid."""

    def mean(x, t):
        square = torch.cdist(x, points).square()
        return (-square / (2 * t * t)).softmax(1) @ points

    def endpoint(x, t):
        flat = x.flatten(1)
        for here, there in torch.stack(
            [(g := karras_sigmas(steps, 0.02, t))[:-1], g[1:]], 1
        ).tolist():
            slope = (flat - mean(flat, here)) / here
            euler = flat + (there - here) * slope
            flat = flat + (there - here) * (slope + (euler - mean(euler, there)) / there) / 2
        return mean(flat, 0.02).reshape(x.shape)

    return endpoint


def test_digits_are_cheaper_to_reach_than_by_minibatch_transport(generator):
    """At large t: GC < transport over 512 < over 128 < IC, as in the measured table."""
    points = digits()
    n = 1024
    index = torch.randint(len(points), (n,), generator=generator)
    x0 = images(points[index])
    z = images(torch.randn(n, 64, generator=generator, dtype=torch.float64))
    endpoint = flow_endpoint(points, 24)
    independent = cost(couple(Independent(), x0, z, 80.0))
    transport = {
        size: np.mean(
            [
                cost(couple(MinibatchOT(), x0[i : i + size], z[i : i + size], 80.0))
                for i in range(0, n, size)
            ]
        )
        for size in (128, 512)
    }
    generated = {
        t: cost(couple(GeneratorCoupling(1.0), x0, z, t, endpoint)) for t in (0.5, 2.0, 80.0)
    }
    assert independent == pytest.approx(1.727, rel=0.01)
    assert transport[128] == pytest.approx(1.426, rel=0.02)
    assert transport[512] == pytest.approx(1.384, rel=0.02)
    assert generated == pytest.approx({0.5: 1.707, 2.0: 1.414, 80.0: 1.345}, rel=0.02)
    assert generated[80.0] < transport[512] < transport[128] < independent


def test_transport_is_optimal_and_stays_within_classes(generator):
    x0 = images(torch.randn(40, 3, generator=generator, dtype=torch.float64))
    z = images(torch.randn(40, 3, generator=generator, dtype=torch.float64))
    labels = torch.arange(40) % 2
    free = couple(MinibatchOT(), x0, z, 1.0)
    assert free.generated is None
    assert torch.equal(free.x0, x0)
    assert sorted(free.z.flatten(1).tolist()) == sorted(z.flatten(1).tolist())
    swapped = free.z.clone()
    for i in range(40):  # no exchange of two noises is better
        for j in range(i):
            a, b = x0[i] - x0[j], swapped[i] - swapped[j]
            assert float((a * b).sum()) >= -1e-12
    within = couple(MinibatchOT(), x0, z, 1.0, labels=labels)
    for label in (0, 1):
        rows = labels == label
        ours = within.z[rows].flatten(1).tolist()
        assert sorted(ours) == sorted(z[rows].flatten(1).tolist())
    assert cost(free) <= cost(within) < cost(couple(Independent(), x0, z, 1.0))
