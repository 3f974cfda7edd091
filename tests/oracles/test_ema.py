"""EMA profiles against closed forms."""

from __future__ import annotations

import pytest
import torch

from cm_lightning.ema import (
    ConstantEMA,
    HalfLifeEMA,
    PowerEMA,
    posthoc_coefficients,
    power_exponent,
    update_average,
)
from cm_lightning.types import InputError

WIDTHS = {
    0.010: 96.994898,
    0.015: 63.658934,
    0.020: 46.989582,
    0.030: 30.317372,
    0.040: 21.978250,
    0.050: 16.972199,
    0.060: 13.632531,
    0.075: 10.289116,
    0.100: 6.937204,
    0.150: 3.557869,
    0.200: 1.826214,
}


@pytest.mark.parametrize(("std", "gamma"), WIDTHS.items())
def test_power_exponent_table_and_inverse(std, gamma):
    assert power_exponent(std) == pytest.approx(gamma, abs=6e-7)
    width = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)
    assert width == pytest.approx(std, rel=1e-6)


def test_halflife_values():
    profile = HalfLifeEMA(kimg=500, rampup_ratio=0.05)
    assert profile.beta(100_000_000, 512) == pytest.approx(0.9992904691, abs=1e-10)
    assert profile.beta(51_200, 512) == pytest.approx(0.8705505632, abs=1e-10)
    assert profile.beta(0, 512) == 0
    assert HalfLifeEMA(kimg=500, rampup_ratio=None).beta(0, 512) == pytest.approx(0.9992904691)


def test_halflife_in_steps_of_the_constant_profile():
    average = [torch.ones(1)]
    for _ in range(6931):
        update_average(average, [torch.zeros(1)], ConstantEMA(0.9999).beta(0, 128))
    assert float(average[0]) == pytest.approx(0.5, abs=2e-4)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("k", [1, 2, 40, 100])
def test_power_profile_telescopes(std, k):
    """Weights that switch from 0 to 1 at step k of N: the average is 1 - ((k-1)/N)^(gamma+1)."""
    steps, batch = 100, 128
    average = [torch.zeros(3, dtype=torch.float64)]
    for n in range(1, steps + 1):
        weights = [torch.full((3,), float(n >= k), dtype=torch.float64)]
        beta = PowerEMA(std).beta((n - 1) * batch, batch)
        average[0].lerp_(weights[0], 1 - beta)
    expected = 1 - ((k - 1) / steps) ** (power_exponent(std) + 1)
    torch.testing.assert_close(average[0], torch.full((3,), expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ([(1, 0.05), (1, 0.10)], (0.34226942, 0.65773058)),
        (
            [(1, 0.05), (1, 0.10), (0.5, 0.05), (0.5, 0.10)],
            (0.34296904, 0.65932184, 0.00013575, -0.00242663),
        ),
    ],
)
def test_posthoc_coefficients(snapshots, expected):
    stored = [(t, power_exponent(std)) for t, std in snapshots]
    got = posthoc_coefficients(stored, (1, power_exponent(0.075)))
    assert got == pytest.approx(expected, abs=2e-8)
    assert posthoc_coefficients(stored, stored[0])[0] == pytest.approx(1, abs=1e-9)


def test_first_step_of_ramped_profiles_copies_exactly():
    average, weights = [torch.full((4,), 3.0)], [torch.randn(4)]
    update_average(average, weights, PowerEMA(0.05).beta(0, 64))
    assert torch.equal(average[0], weights[0])


def test_update_is_the_formula():
    average, weights = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    update_average(average, weights, 0.75)
    torch.testing.assert_close(average[0], torch.tensor([1.5, 1.0]))


def test_names_differ_and_are_stable():
    assert ConstantEMA(0.9999).name == "ema_0.9999"
    assert ConstantEMA(0.9999432189950708).name != ConstantEMA(0.9999).name
    assert HalfLifeEMA(500).name == "ema_halflife500k"
    assert PowerEMA(0.05).name == "ema_std0.050"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantEMA(1.0),
        lambda: ConstantEMA(-0.1),
        lambda: HalfLifeEMA(0),
        lambda: HalfLifeEMA(10, 0.0),
        lambda: PowerEMA(0.289),
        lambda: PowerEMA(0.0),
    ],
)
def test_bad_profiles_are_refused(make):
    with pytest.raises(InputError):
        make()
