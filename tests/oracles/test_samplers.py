"""Samplers on Gaussian data, where their output is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from cm_lightning.sampling import (
    EulerSampler,
    HeunSampler,
    MultistepSampler,
    check_samplers,
    euler,
    heun,
    image_noise,
    multistep,
)
from cm_lightning.sigmas import karras_sigmas
from cm_lightning.types import InputError
from tests.toys import FunctionDenoiser, gaussian_denoiser, gaussian_endpoint

ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "std"),
    [
        (5, 1.257886),
        (10, 0.609798),
        (18, 0.527625),
        (40, 0.504877),
        (79, 0.501176),
        (256, 0.500095),
    ],
)
def test_heun_output_std(steps, std):
    """The sampler is linear in the noise, so the image of unit noise is the standard deviation."""
    out = heun(gaussian_denoiser(), ONE, karras_sigmas(steps))
    assert float(out) == pytest.approx(std, abs=6e-7)


def test_euler_is_first_order_and_heun_second():
    """The image of unit noise on N(0, s^2), s = 0.5, by the exact flow."""
    exact = 0.5 * 80 / math.sqrt(80**2 + 0.5**2)
    errors = {
        sampler: [
            abs(float(sampler(gaussian_denoiser(), ONE, karras_sigmas(steps))) - exact)
            for steps in (200, 400)
        ]
        for sampler in (euler, heun)
    }
    assert errors[euler][0] / errors[euler][1] == pytest.approx(2, abs=0.15)
    assert errors[heun][0] / errors[heun][1] == pytest.approx(4, abs=0.6)
    assert errors[heun][0] < errors[euler][0] / 20


def test_euler_by_hand():
    """Every step of DDIM towards a constant estimate lands on it."""
    target = 0.3 * ONE
    denoiser = FunctionDenoiser(lambda x, t: target + 0 * x)
    assert float(euler(denoiser, ONE, karras_sigmas(5))) == pytest.approx(0.3, abs=1e-12)
    linear = FunctionDenoiser(lambda x, t: 0.5 * x)  # slope x / (2 sigma)
    out = euler(linear, ONE, torch.tensor([4.0, 2.0, 1.0]))
    assert float(out) == pytest.approx(4 * (1 - 0.25) * (1 - 0.25) * 0.5, abs=1e-12)
    calls = []
    counting = FunctionDenoiser(lambda x, t: calls.append(t) or x * 0)
    sampler = EulerSampler(7)
    sampler(counting, ONE[None], None)
    assert len(calls) == sampler.nfe == 7
    assert sampler.name == "euler_nfe7"


def test_heun_costs_two_calls_per_step_but_one():
    calls = []
    denoiser = FunctionDenoiser(lambda x, t: calls.append(t) or x * 0)
    sampler = HeunSampler(18)
    sampler(denoiser, ONE[None], None)
    assert len(calls) == sampler.nfe == 35


@pytest.mark.parametrize(("middle", "std"), [(0.821, 0.49999736), (1.526, 0.49999905)])
def test_two_step_output_std(middle, std):
    """Variances of the two independent noises add."""
    zero = ONE * 0
    parts = [
        float(multistep(gaussian_endpoint(), noise, [80.0, middle]))
        for noise in (torch.stack([ONE, zero]), torch.stack([zero, ONE]))
    ]
    assert math.hypot(*parts) == pytest.approx(std, abs=6e-9)


def test_one_step_is_the_endpoint_of_the_noise():
    out = multistep(gaussian_endpoint(m=0.2), ONE[None], [80.0])
    assert float(out) == pytest.approx(0.2 + 0.5 / math.hypot(0.5, 80) * (80 - 0.2), rel=1e-12)


def test_karras_grid_values():
    grid = karras_sigmas(18)
    assert float(grid[0]) == 80
    assert float(grid[-1]) == 0.002
    assert float(grid[11]) == pytest.approx(0.5853481231945, abs=1e-12)
    assert float(karras_sigmas(40)[22]) == pytest.approx(1.3823679566485, abs=1e-12)
    assert float(karras_sigmas(201)[106]) == pytest.approx(1.9128436206954, abs=1e-12)


def test_noise_is_a_function_of_seed_and_image_number():
    both = image_noise(3, [0, 7], 2, (1, 4, 4))
    assert torch.equal(image_noise(3, [7], 1, (1, 4, 4))[0, 0], both[0, 1])
    assert not torch.equal(both[0, 0], both[0, 1])
    assert not torch.equal(both[0, 0], both[1, 0])
    assert not torch.equal(image_noise(4, [7], 1, (1, 4, 4))[0, 0], both[0, 1])
    large = image_noise(0, range(400), 1, (1, 8, 8))
    assert float(large.mean()) == pytest.approx(0, abs=0.03)
    assert float(large.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [([], "empty"), ([-1.0], "must lie in"), ([80.0, 80.0], "decrease"), ([1.0, 2.0], "decrease")],
)
def test_bad_sigmas_are_refused(sigmas, words):
    with pytest.raises(InputError, match=words):
        MultistepSampler(sigmas)


def test_samplers_must_be_told_apart():
    with pytest.raises(InputError, match="differ"):
        check_samplers([MultistepSampler([80.0]), MultistepSampler([40.0])])
