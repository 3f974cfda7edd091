"""Losses and tables produced by the official implementations (see tests/golden/README.md)."""

from __future__ import annotations

import json

import pytest
import torch

from cm_lightning.networks import ConsistencyPrecond
from cm_lightning.objective import (
    L1,
    L2,
    COut,
    DoublingGrid,
    ECTMapping,
    Euler,
    Heun,
    Independent,
    InverseStep,
    KarrasGrid,
    Objective,
    PseudoHuber,
    SampleMean,
    SquaredL2,
    TeacherMean,
    Uniform,
)
from cm_lightning.types import Batch, expand
from tests.conftest import GOLDEN
from tests.toys import FunctionDenoiser

FILES = [path for path in sorted(GOLDEN.glob("*.json")) if "ect" in json.loads(path.read_text())]


def cases(part: str, official: str = "ect") -> list:
    return [
        pytest.param(case, id=f"{path.stem}-{number}")
        for path in FILES
        for number, case in enumerate(json.loads(path.read_text())[official][part])
    ]


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_files_were_found():
    assert FILES


@pytest.mark.parametrize("case", cases("t_to_r"))
def test_r_of_t_is_official(case):
    mapping = ECTMapping(q=case["q"], k=case["k"], b=case["b"])
    t = torch.tensor(case["t"], dtype=torch.float64)
    expected = torch.tensor(case["r"], dtype=torch.float64)
    torch.testing.assert_close(mapping.r(t, case["stage"]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases("loss"))
def test_ect_loss_is_official(case):
    mapping = ECTMapping(q=case["q"])
    x0, z = (torch.tensor(case[key], dtype=torch.float64) for key in ("x0", "eps"))
    t = (torch.tensor(case["normal"], dtype=torch.float64) * 2.0 - 1.1).exp()
    r = mapping.r(t, case["stage"])
    denoiser = FunctionDenoiser(lambda x, s: x / (1 + s * s) + 0.1 * x.sin() * s / (1 + s))
    distance = L2() if case["c"] == 0 else PseudoHuber(case["c"])
    objective = Objective(mapping, Independent(), Euler(SampleMean()), distance, InverseStep())
    batch = Batch(x0, None, torch.arange(len(x0)))
    output = objective.evaluate(denoiser, denoiser, batch, t, r, z, torch.zeros_like(t))
    expected = torch.tensor(case["weighted_loss"], dtype=torch.float64)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)


class Raw(torch.nn.Module):
    """A raw network of the golden file: F(c_in x, sigma), here from c_noise = ln(sigma) / 4."""

    def __init__(self, skip: float, function, scale: float) -> None:
        super().__init__()
        self.skip, self.function, self.scale = skip, function, scale

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        t = expand((4 * noise_labels).exp(), x)
        return self.skip * x / (1 + t * t) + self.scale * self.function(x) * t / (1 + t)


ONLINE, TARGET = Raw(1.0, torch.sin, 0.1), Raw(1.0, torch.sin, 0.08)
TEACHER = Raw(0.9, torch.cos, 0.05)


@pytest.mark.parametrize(
    ("regime", "case"),
    [
        pytest.param(regime, *case.values, id=f"{regime}-{case.id}")
        for regime in ("cd", "ct")
        for case in cases(regime, "openai")
    ],
)
def test_cd_and_ct_losses_are_official(regime, case):
    grid = KarrasGrid(case["num_scales"])
    levels = grid.levels(0).flip(0)
    index = torch.tensor(case["indices"])
    t, r = levels[index], levels[index + 1]
    x0, z = double(case["x0"]), double(case["eps"])
    # the file's teacher went through the student's preconditioning; a real one has EDM's
    mean = TeacherMean(ConsistencyPrecond(TEACHER)) if regime == "cd" else SampleMean()
    objective = Objective(
        grid,
        Independent(),
        Heun(mean),  # one sample as posterior mean: the same step as Euler's
        {"l1": L1(mean=True), "l2": SquaredL2(mean=True)}[case["loss_norm"]],
        {"uniform": Uniform(), "karras": COut()}[case["weight_schedule"]],
    )
    batch = Batch(x0, None, torch.arange(len(x0)))
    online, target = ConsistencyPrecond(ONLINE), ConsistencyPrecond(TARGET)
    output = objective.evaluate(online, target, batch, t, r, z, torch.zeros_like(t))
    torch.testing.assert_close(output.loss, double(case["loss"]), rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_boundary_scalings_and_grid_are_official(path):
    official = json.loads(path.read_text())["openai"]
    scalings = official["scalings_boundary"]
    c_skip, c_out, c_in, _ = ConsistencyPrecond(ONLINE).coefficients(double(scalings["sigma"]))
    torch.testing.assert_close(
        torch.stack([c_skip, c_out, c_in]), double(scalings["c"]), rtol=1e-12, atol=1e-15
    )
    grid = double(official["sigmas_karras_5"][:-1])
    torch.testing.assert_close(KarrasGrid(5).levels(0).flip(0), grid, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ict_of_the_official_gc_code(path):
    official = json.loads(path.read_text())["gc_official"]
    for case in official["ict_num_timesteps"]:
        grid = DoublingGrid(total_kimg=case["total"] / 1000)
        assert grid.size(case["step"]) == case["n"]
    grid = DoublingGrid(total_kimg=1)
    levels = grid.levels(0)
    torch.testing.assert_close(levels, double(official["sigmas_11"]), rtol=1e-12, atol=0)
    weights = InverseStep()(levels[1:], levels[:-1], 0.5)
    torch.testing.assert_close(weights, double(official["ict_weights_11"]), rtol=1e-8, atol=0)
    counted = double(official["ict_pmf_11_empirical_200k"])
    error = (counted * (1 - counted) / 200_000).sqrt()
    assert (grid.probabilities(0) - counted).abs().lt(4 * error).all()
    a, b, d = (double(official["huber"][key]) for key in ("a", "b", "d"))
    torch.testing.assert_close(PseudoHuber()(a, b), d, rtol=1e-8, atol=0)
