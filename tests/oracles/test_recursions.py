"""Fixed points of CT and CD in closed form, through the real training objective.

On data N(0, s^2) the best f at every level is a(t) x. Four images of one pixel, x0 = +-s with noise
+-1, have exactly the second moments of that law, so the squared loss of a linear model on them is
its expectation and the best a follows from two evaluations, free of sampling error.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.stats import norm

from cm_lightning.objective import (
    ECTMapping,
    Euler,
    Heun,
    Independent,
    KarrasGrid,
    Objective,
    PseudoHuber,
    SampleMean,
    SquaredL2,
    TeacherMean,
    Uniform,
)
from cm_lightning.types import Batch, expand
from tests.toys import FunctionDenoiser, gaussian_denoiser

S = 0.5
EXACT = 6.249927932e-3  # a(80) of the exact consistency function, down to 0.002
X0 = torch.tensor([S, S, -S, -S], dtype=torch.float64).reshape(4, 1, 1, 1)
Z = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
BATCH = Batch(X0, None, torch.arange(4))

RATIOS = {  # a(80) / exact
    3: (0.195318, 4.09463),
    11: (0.752777, 1.174619),
    18: (0.846086, 1.055278),
    21: (0.867560, 1.039196),
    40: (0.929727, 1.009782),
    81: (0.965101, 1.002260),
    201: (0.985891, 1.000356),
    321: (0.991159, 1.000138),
}


class Line(FunctionDenoiser):
    """f(x, t) = a x with one parameter."""

    def __init__(self, a: float) -> None:
        super().__init__(None)
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        return self.a * x


def full(value) -> torch.Tensor:
    return torch.full((4,), float(value), dtype=torch.float64)


def slope(objective: Objective, a: float, below: float, t, r) -> float:
    """Derivative of the mean loss by a."""
    online = Line(a)
    output = objective.evaluate(online, Line(below), BATCH, full(t), full(r), Z, full(0))
    output.loss.mean().backward()
    return float(online.a.grad)


def converged(objective: Objective) -> float:
    """a(80), each level trained to its optimum against the level below."""
    levels = objective.discretization.levels(0)
    a = 1.0
    for r, t in itertools.pairwise(levels):
        at_zero = slope(objective, 0.0, a, t, r)
        a = -at_zero / (slope(objective, 1.0, a, t, r) - at_zero)  # the slope is linear in a
    return a


SOLVERS = {
    "ct": Euler(SampleMean()),
    "cd-euler": Euler(TeacherMean(gaussian_denoiser(S))),
    "cd-heun": Heun(TeacherMean(gaussian_denoiser(S))),
}


@pytest.mark.parametrize("n", RATIOS)
@pytest.mark.parametrize("name", SOLVERS)
def test_converged_students_of_gaussian_data(name, n):
    objective = Objective(KarrasGrid(n), Independent(), SOLVERS[name], SquaredL2(), Uniform())
    expected = RATIOS[n][name == "cd-heun"]
    assert converged(objective) / EXACT == pytest.approx(expected, abs=1e-6, rel=2e-6)


def test_pseudo_huber_has_the_same_optimum_when_wide():
    objective = Objective(KarrasGrid(11), Independent(), SOLVERS["ct"], PseudoHuber(1e4), Uniform())
    assert converged(objective) / EXACT == pytest.approx(RATIOS[11][0], rel=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("cd-euler", 2), ("cd-heun", 3)])
def test_error_order_per_step(solver, order):
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for h in (0.02, 0.01, 0.005):
        t, r = (torch.tensor([v], dtype=torch.float64) for v in (1.0, 1.0 - h))
        exact = ((S * S + r * r) / (S * S + t * t)).sqrt()
        errors.append(float((SOLVERS[solver](x, t, r, BATCH) - exact).abs().max()))
    for large, small in itertools.pairwise(errors):
        assert math.log2(large / small) == pytest.approx(order, abs=0.05)


def test_heun_steps_by_its_multiplier_and_by_euler_to_zero():
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    r = torch.tensor([1.0, 0.9, 0.0], dtype=torch.float64)
    heun = SOLVERS["cd-heun"](x, t, r, BATCH)
    s2 = S * S
    h = 1 + (r - t) / 2 * (t / (s2 + t * t) + r * (s2 + t * r) / ((s2 + t * t) * (s2 + r * r)))
    torch.testing.assert_close(heun[:2], expand(h, x)[:2] * x[:2], rtol=1e-14, atol=0)
    euler = SOLVERS["cd-euler"](x, t, r, BATCH)
    torch.testing.assert_close(heun[2], euler[2], rtol=0, atol=1e-15)


def test_gradient_with_an_averaged_target():
    """d/da per value: 2 [a (s^2 + t^2) - a' (s^2 + t r)]; 2 a t (t - r) if a' = a."""
    objective = Objective(ECTMapping(), Independent(), SOLVERS["ct"], SquaredL2(), Uniform())
    t, r, a, other = 2.0, 1.5, 0.7, 0.4
    expected = 2 * (a * (S * S + t * t) - other * (S * S + t * r))
    assert slope(objective, a, other, t, r) == pytest.approx(expected, rel=1e-12)
    assert slope(objective, a, a, t, r) == pytest.approx(2 * a * t * (t - r), rel=1e-12)


# --- a mixture of two Gaussians in one dimension: .3 N(-1, .1^2) + .7 N(1, .1^2) ---

WEIGHTS, MEANS, WIDTH = np.array([0.3, 0.7]), np.array([-1.0, 1.0]), 0.1
ENDS = (-100, -60, -40, 0, 40, 100)


def components(x: np.ndarray, t: float) -> np.ndarray:
    """Posterior probability of each component, (2, ...)."""
    variance = WIDTH**2 + t * t
    log = np.log(WEIGHTS)[:, None] - (x - MEANS[:, None]) ** 2 / (2 * variance)
    p = np.exp(log - log.max(0))
    return p / p.sum(0)


def posterior_means(x: np.ndarray, t: float) -> np.ndarray:
    """E[x0 | x_t = x, component], (2, ...)."""
    return (WIDTH**2 * x + t * t * MEANS[:, None]) / (WIDTH**2 + t * t)


def mixture_mean(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    flat, t = x.numpy().reshape(-1), float(sigma.reshape(-1)[0])
    mean = (components(flat, t) * posterior_means(flat, t)).sum(0)
    return torch.from_numpy(mean).reshape(x.shape)


def quantile_map(x: float, t: float, r: float) -> float:
    """Exact flow in one dimension."""

    def cdf(y, s):
        return float((WEIGHTS * norm.cdf((y - MEANS) / math.sqrt(WIDTH**2 + s * s))).sum())

    return brentq(lambda y: cdf(y, r) - cdf(x, t), -60, 60, xtol=1e-13)


@pytest.mark.parametrize(
    ("x", "t", "mean", "end", "half"),
    [
        (0.3, 1, 0.614187612, 0.916225863, 0.573622380),
        (-0.5, 1, -0.075524245, -0.896898094, -0.483391880),
        (0.0, 5, 0.399840064, 0.929508626, 0.641015766),
        (40.0, 80, 0.405298698, 1.014260150, 1.072726076),
    ],
)
def test_many_heun_steps_are_the_quantile_map(x, t, mean, end, half):
    """The teacher's mean, and the exact flow to 0 and to 0.5."""
    teacher = FunctionDenoiser(mixture_mean)
    start = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    assert float(teacher(start, torch.tensor([float(t)]).double())) == pytest.approx(mean, abs=1e-9)
    assert quantile_map(x, t, 0.0) == pytest.approx(end, abs=1e-8)
    for stop, expected in ((0.002, quantile_map(x, t, 0.002)), (0.5, half)):
        grid = KarrasGrid(2001, sigma_min=stop, sigma_max=float(t))
        assert float(follow(Heun(TeacherMean(teacher)), grid, start)) == pytest.approx(
            expected, abs=2e-6
        )


def follow(solver, grid: KarrasGrid, x: torch.Tensor) -> torch.Tensor:
    """Down a grid step by step."""
    levels = grid.levels(0).flip(0)
    for t, r in itertools.pairwise(levels):
        n = len(x)
        x = solver(x, t.expand(n), r.expand(n), Batch(x, None, torch.arange(n)))
    return x


@pytest.mark.parametrize(
    ("solver", "n", "expected"),
    [
        (Heun, 18, (-1.056821, -0.948830, 0.759510, 0.948208, 1.021696, 1.115433)),
        (Heun, 40, (-1.041439, -0.934585, 0.760779, 0.943087, 1.015332, 1.104785)),
        (Euler, 18, (-0.998293, -0.859864, 0.746510, 0.932271, 0.999987, 1.076890)),
    ],
)
def test_a_cd_student_is_its_solver(solver, n, expected):
    """Best f at each level: the level below, at the solver's step; so the whole trajectory."""
    start = torch.tensor(ENDS, dtype=torch.float64).reshape(-1, 1, 1, 1)
    ends = follow(solver(TeacherMean(FunctionDenoiser(mixture_mean))), KarrasGrid(n), start)
    assert ends.flatten().tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (11, (-0.541597, -0.083624, 0.154161, 0.567269, 0.843799, 1.038963)),
        (21, (-0.807358, -0.247434, 0.109950, 0.694998, 0.959921, 1.079426)),
        (81, (-1.024175, -0.583053, 0.083683, 0.907427, 1.010777, 1.096844)),
    ],
)
def test_ct_fixed_point_on_the_mixture(n, expected):
    """f(x, t) = E[f(x_r, r) | x_t = x] with x_r from the solver, by quadrature over x0."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    solver, levels = Euler(SampleMean()), KarrasGrid(n).levels(0)
    f = None
    for r, t in itertools.pairwise(levels):
        scale = math.sqrt(1 + float(t) ** 2)
        x = np.sinh(np.linspace(-np.arcsinh(9 * scale), np.arcsinh(9 * scale), 4001))
        deviation = WIDTH * float(t) / math.sqrt(WIDTH**2 + float(t) ** 2)
        x0 = posterior_means(x, float(t))[:, None] + deviation * nodes[:, None]
        flat = torch.from_numpy(x0.reshape(-1, 1, 1, 1))
        x_t = torch.from_numpy(np.broadcast_to(x, x0.shape).reshape(-1, 1, 1, 1).copy())
        count = len(flat)
        batch = Batch(flat, None, torch.arange(count))
        x_r = solver(x_t, t.expand(count), r.expand(count), batch).numpy().reshape(x0.shape)
        below = x_r if f is None else f(x_r)
        mean = (components(x, float(t)) * (below * weights[:, None]).sum(1)).sum(0)
        f = CubicSpline(x, mean)
    assert f(np.array(ENDS, dtype=float)) == pytest.approx(np.array(expected), abs=2e-5)
