"""Grids, target rates and weights against the published tables."""

from __future__ import annotations

import pytest
import torch

from cm_lightning.objective import (
    SNR,
    DoublingGrid,
    GrowingGrid,
    InverseStep,
    KarrasGrid,
    LogNormal,
)
from cm_lightning.types import InputError

STEPS = (0, 1, 100, 1_000, 10_000, 50_000, 100_000, 200_000, 400_000, 600_000, 799_999)
CIFAR = (2, 3, 3, 6, 17, 38, 54, 76, 107, 131, 151)
CIFAR_CODE = (
    *(0.81, 0.9, 0.9, 0.958732, 0.986916, 0.994321, 0.996032),
    *(0.997194, 0.998014, 0.998380, 0.998596),
)
CIFAR_PAPER = (
    *(0.9, 0.93217, 0.93217, 0.965489, 0.987681, 0.994470, 0.996105),
    *(0.997231, 0.998033, 0.998393, 0.998605),
)
IMAGENET = (2, 3, 4, 8, 23, 51, 72, 101, 143, 175, 201)
IMAGENET_CODE = (
    *(0.9025, 0.95, 0.966383, 0.985452, 0.995348, 0.997950, 0.998556),
    *(0.998975, 0.999278, 0.999411, 0.999487),
)


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize(
    ("arguments", "sizes", "rates"),
    [
        ({"s1": 150, "mu0": 0.9}, CIFAR, CIFAR_CODE),
        ({"s1": 150, "mu0": 0.9, "rate": "paper"}, CIFAR, CIFAR_PAPER),
        ({"s1": 200, "mu0": 0.95}, IMAGENET, IMAGENET_CODE),
    ],
)
def test_growing_grid_is_the_published_table(batch, arguments, sizes, rates):
    """In images: the same table whatever the batch."""
    grid = GrowingGrid(s0=2, total_kimg=800 * batch, **arguments)
    for step, size, rate in zip(STEPS, sizes, rates, strict=True):
        assert grid.size(step * batch) == size
        assert grid.target_rate(step * batch) == pytest.approx(rate, abs=6e-7)


def test_doubling_grid_spends_an_eighth_of_the_run_on_each_size():
    grid = DoublingGrid(total_kimg=400)
    sizes = (11, 21, 41, 81, 161, 321, 641, 1281)
    for stage, size in enumerate(sizes):
        for nimg in (50_000 * stage, 50_000 * stage + 49_999):
            assert (grid.size(nimg), grid.stage(nimg)) == (size, stage)
    assert grid.size(400_000) == 1281
    assert DoublingGrid(s0=10, s1=100, total_kimg=1).size(999) == 101


N11 = {
    "sigma": (0.002, 0.016721, 0.085087, 0.318283, 0.965417, 2.515219, 5.838948, 12.381576),
    "p": (0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580),
    "weight": (67.931307, 14.627058, 4.288237, 1.545276, 0.645244, 0.300867, 0.152844, 0.083148),
}


def test_ict_grid_of_11_levels_is_the_published_table():
    grid = DoublingGrid(total_kimg=8)
    levels, p = grid.levels(0), grid.probabilities(0)
    weights = InverseStep()(levels[1:], levels[:-1], 0.5)
    for ours, table in ((levels, "sigma"), (p, "p"), (weights, "weight")):
        expected = torch.tensor(N11[table], dtype=torch.float64)
        torch.testing.assert_close(ours[:8], expected, rtol=2e-6, atol=6e-7)
    assert float(p.sum()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("n", "first", "top", "top_p", "weight", "mean"),
    [
        (21, 0.0183777, 6, 0.1239257, (234.419727, 0.0514326), 17.45286),
        (1281, 1.498212e-4, 330, 0.00195569, (25584.724, 2.9360313), 1129.1356),
    ],
)
def test_ict_probabilities_and_weights(n, first, top, top_p, weight, mean):
    grid = KarrasGrid(n, noise=LogNormal(-1.1, 2.0))
    levels, p = grid.levels(0), grid.probabilities(0)
    weights = InverseStep()(levels[1:], levels[:-1], 0.5)
    assert float(p[0]) == pytest.approx(first, rel=1e-5)
    assert int(p.argmax()) + 1 == top
    assert float(p.max()) == pytest.approx(top_p, rel=1e-5)
    assert (float(weights[0]), float(weights[-1])) == pytest.approx(weight, rel=1e-6)
    assert float((p * weights).sum()) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("noise", [None, LogNormal(-1.1, 2.0)])
def test_pairs_are_neighbours_drawn_with_their_probability(noise, generator):
    grid = KarrasGrid(11, noise=noise)
    n = 100_000
    t, r = grid.sample(n, 0, torch.device("cpu"), generator)
    levels = grid.levels(0)
    index = torch.searchsorted(levels, r)
    assert torch.equal(levels[index], r)
    assert torch.equal(levels[index + 1], t)
    counted = torch.bincount(index, minlength=10) / n
    p = grid.probabilities(0)
    assert (counted - p).abs().lt(4.5 * (p * (1 - p) / n).sqrt()).all()


def test_both_ends_of_a_grid_are_exact():
    for n in (2, 18, 1281):
        levels = KarrasGrid(n).levels(0)
        assert (float(levels[0]), float(levels[-1]), len(levels)) == (0.002, 80.0, n)


def test_a_schedule_takes_the_length_of_the_run_unless_it_has_one():
    assert GrowingGrid().spanning(5).total_kimg == 5
    assert DoublingGrid(total_kimg=3).spanning(5).total_kimg == 3
    with pytest.raises(InputError, match="total_kimg"):
        DoublingGrid().size(0)


def test_signal_to_noise_weights_by_hand():
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert SNR("snr")(t, t, 0.5).tolist() == [4, 0.25]
    assert SNR("snr+1")(t, t, 0.5).tolist() == [5, 1.25]
    assert SNR("truncated-snr")(t, t, 0.5).tolist() == [4, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KarrasGrid(1),
        lambda: KarrasGrid(18, sigma_min=0),
        lambda: KarrasGrid(18, rho=0),
        lambda: GrowingGrid(s0=0),
        lambda: GrowingGrid(s0=5, s1=4),
        lambda: GrowingGrid(mu0=1),
        lambda: DoublingGrid(total_kimg=0),
    ],
)
def test_bad_arguments_are_named(make):
    with pytest.raises(InputError):
        make()
